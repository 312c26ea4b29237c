"""Routing: the real router in front of simulated engines, and the loads that it is told.

Milestone: M10. vLLM counterpart: none. Row 1: no torch. In the server, folovllm/engine/data_parallel_client.py does
the same for real engines.
"""

from collections.abc import Callable, Sequence

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.engine.router import (
    LeastLoadedRouter,
    PrefixRouter,
    RandomRouter,
    ReplicaLoad,
    RoundRobinRouter,
    Router,
)
from folovllm.parts import load_part
from folovllm.request import Request
from folovllm.utils import unknown_name_message

PART = "serve.router"


class PrefixOnlyRouter(PrefixRouter):
    """The replica that knows the longest prefix, however long its queue is: what a router without a limit does."""

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int) -> None:
        super().__init__(num_replicas, block_size, num_blocks, max_lead=2**60)


ROUTERS: dict[str, Callable[[int, int, int], Router]] = {
    "prefix": PrefixRouter,
    "prefix-only": PrefixOnlyRouter,
    "least-loaded": LeastLoadedRouter,
    "round-robin": RoundRobinRouter,
    "random": RandomRouter,
}


class Routing:
    """Routes requests, and counts what each replica has to do as the front end of a server counts it."""

    def __init__(self, router: Router, num_replicas: int) -> None:
        self.router = router
        self.num_requests = [0] * num_replicas  # unfinished, by replica
        self.prompts: list[dict[str, int]] = [{} for _ in range(num_replicas)]  # id -> tokens, until the first token
        self.replica_of: dict[str, int] = {}

    def start(self, request: Request) -> int:
        """Chooses the replica for a request, which is sent there now."""
        loads = [ReplicaLoad(i, n, sum(self.prompts[i].values())) for i, n in enumerate(self.num_requests)]
        replica = self.router.route(request, loads)
        if replica not in range(len(loads)):
            raise ValueError(f"the router chose replica {replica!r}, and there are {len(loads)}, counted from 0")
        self.router.started(request, replica)
        self.num_requests[replica] += 1
        self.prompts[replica][request.request_id] = request.num_prompt_tokens
        self.replica_of[request.request_id] = replica
        return replica

    def got_token(self, request_id: str) -> None:
        self.prompts[self.replica_of[request_id]].pop(request_id, None)

    def finish(self, request: Request) -> None:
        replica = self.replica_of.pop(request.request_id)
        self.num_requests[replica] -= 1
        self.router.finished(request, replica, request.output_token_ids)


def make_routing(name: str, config: EngineConfig, cores: Sequence[EngineCore]) -> Routing:
    """The router called `name`, or the one that replaces the part. Raises ValueError for another name."""
    if name not in ROUTERS:
        raise ValueError(unknown_name_message("router", name, ROUTERS))
    replaced = PART in (config.parts or {})
    if replaced and name != "prefix":
        raise ValueError(f"the router {name!r} and the part {PART} both choose the replica: keep one")
    cls = load_part(PART, config.parts) if replaced else ROUTERS[name]
    num_blocks = cores[0].kv_cache_config.num_usable_blocks if config.cache_config.enable_prefix_caching else 0
    return Routing(cls(len(cores), config.block_size, num_blocks), len(cores))
