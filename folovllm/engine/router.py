"""Router: which of several engines computes a request.

Milestone: M10. vLLM counterpart: `DPLBAsyncMPClient.get_core_engine_for_request` in vllm/v1/engine/core_client.py,
which sends a request to the engine with the fewest; the production stack of vLLM, SGLang and Dynamo route by prefix.
Left out: several front ends that share what they know, and weights for engines of different speed.

Row 1: no torch. The simulator and the server use the same class, the part "serve.router".

A *replica* is an engine with all weights and a KV cache of its own. A prefix that one replica has cached helps no other
one, so a router has two wishes that contradict each other:

    same prefix -> same replica       its blocks are there already: less to compute
    even load                         a replica with fewer requests computes each of them faster

    router = load_part("serve.router", parts)(num_replicas=2, block_size=16, num_blocks=4096)
    replica = router.route(request, loads)              # loads: one entry for each replica that lives
    router.started(request, replica)                    # the request has been sent there
    router.finished(request, replica, output_token_ids) # it has ended there; the blocks of its answer are cached, too
    router.forget(replica)                              # the replica has lost its cache: it died, or it was told to

The caller counts the loads. A router only decides, and remembers what it needs to decide.
"""

import random
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from folovllm.core.block_hash import (
    BYTES_PER_TOKEN,
    BlockHash,
    extra_keys,
    get_hash_function,
    pack_tokens,
    root_hash,
)
from folovllm.request import Request

MAX_LEAD = 4  # requests; the hit of a prompt is not worth a longer queue than that


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a living replica has to do now."""

    replica: int  # its number, from 0
    num_requests: int  # sent to it and unfinished; a request with n > 1 counts n times
    num_prompt_tokens: int = 0  # of those among them that have no token yet


class Router(ABC):
    """Chooses a replica for each request. All methods are called in one thread."""

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int) -> None:
        """`num_blocks` is the size of each replica's prefix cache, 0 without one."""
        assert num_replicas >= 1 and block_size >= 1 and num_blocks >= 0
        self.num_replicas = num_replicas
        self.block_size = block_size
        self.num_blocks = num_blocks

    @abstractmethod
    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        """Returns the number of one of the replicas in `loads`, which is not empty. Changes nothing."""

    # What follows is for routers that remember something.

    def started(self, request: Request, replica: int) -> None:  # noqa: B027
        """`request` has been sent to `replica`."""

    def finished(self, request: Request, replica: int, output_token_ids: Sequence[int]) -> None:  # noqa: B027
        """`request` has ended in `replica`, for whatever reason, after these tokens."""

    def forget(self, replica: int) -> None:  # noqa: B027
        """The prefix cache of `replica` is empty now."""


class RandomRouter(Router):
    """Any replica. With many requests the loads are even on average, and a prefix is cached everywhere."""

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int, seed: int = 0) -> None:
        super().__init__(num_replicas, block_size, num_blocks)
        self._random = random.Random(seed)

    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        return self._random.choice(loads).replica


class RoundRobinRouter(Router):
    """One after another. The counts are even, but a replica with long requests gets as many as the others."""

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int) -> None:
        super().__init__(num_replicas, block_size, num_blocks)
        self._next = 0

    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        return min(loads, key=lambda load: (load.replica - self._next) % self.num_replicas).replica

    def started(self, request: Request, replica: int) -> None:
        self._next = replica + 1


class LeastLoadedRouter(Router):
    """The replica with the fewest requests. Of equal ones, the one whose last request was sent longest ago."""

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int) -> None:
        super().__init__(num_replicas, block_size, num_blocks)
        self._num_started = 0
        self._last_started = [0] * num_replicas  # the value of _num_started then

    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        return min(loads, key=self.cost).replica

    def started(self, request: Request, replica: int) -> None:
        self._num_started += 1
        self._last_started[replica] = self._num_started

    def cost(self, load: ReplicaLoad) -> tuple[int, int, int]:
        """The smallest one is chosen."""
        return load.num_requests, load.num_prompt_tokens, self._last_started[load.replica]


class PrefixRouter(LeastLoadedRouter):
    """The replica that knows the longest prefix of the request, unless it has MAX_LEAD requests more than another one.

    Of replicas that know equally much, it is the least loaded. A popular prefix spreads by itself: when its replica is
    that much ahead, the next request goes elsewhere, and from then on two replicas know the prefix.

    The router cannot see the caches. It remembers which blocks it has sent to each replica, as many as fit there, and
    assumes that a replica evicts as it does itself, the least recently used first. If it is wrong, the request computes
    more than was expected, and nothing else happens.
    """

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int, max_lead: int = MAX_LEAD) -> None:
        super().__init__(num_replicas, block_size, num_blocks)
        self.max_lead = max_lead
        self.known = [KnownBlocks(num_blocks) for _ in range(num_replicas)]
        self._hash_function = get_hash_function("sha256")
        self._root = root_hash(0, self._hash_function)

    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        least = min(load.num_requests for load in loads)
        near = [load for load in loads if load.num_requests <= least + self.max_lead]
        names = self.block_names(request)
        return min(near, key=lambda load: (-self.known[load.replica].match(names), self.cost(load))).replica

    def started(self, request: Request, replica: int) -> None:
        super().started(request, replica)
        self.known[replica].add(self.block_names(request))

    def finished(self, request: Request, replica: int, output_token_ids: Sequence[int]) -> None:
        # The last token was sampled and never computed, so a block that it fills is not cached.
        self.known[replica].add(self.block_names(request, output_token_ids[:-1]))

    def forget(self, replica: int) -> None:
        self.known[replica].clear()

    def block_names(self, request: Request, output_token_ids: Sequence[int] = ()) -> list[BlockHash]:
        """The chain of hashes of the full blocks of the prompt and these tokens, as in core/block_hash.py.

        The request's own names are left alone: they belong to the engine that computes it.
        """
        if not self.num_blocks:
            return []
        size = self.block_size * BYTES_PER_TOKEN
        packed = pack_tokens([*request.prompt_token_ids, *output_token_ids])
        names, parent, extra = list[BlockHash](), self._root, extra_keys(request)
        for start in range(0, len(packed) - size + 1, size):
            parent = self._hash_function(parent + packed[start : start + size] + extra)
            names.append(parent)
            extra = b""
        return names


class KnownBlocks:
    """The blocks that one replica is believed to have cached, at most `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._names: OrderedDict[BlockHash, None] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._names)

    def match(self, names: Iterable[BlockHash]) -> int:
        """How many blocks from the beginning are known."""
        count = 0
        for name in names:
            if name not in self._names:
                break
            count += 1
        return count

    def add(self, names: Sequence[BlockHash]) -> None:
        """These blocks have been used now. The end of a prefix is forgotten before its beginning."""
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self.capacity:
            self._names.popitem(last=False)

    def clear(self) -> None:
        self._names.clear()
