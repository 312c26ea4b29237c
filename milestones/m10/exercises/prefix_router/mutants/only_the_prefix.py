# killed-by: a_long_queue_is_not_worth_it | max_lead is 4
"""The longest prefix decides alone.

All users of one system prompt wait in one replica while the others are idle. vLLM's production stack had such a router
and added one that weighs the load (https://github.com/vllm-project/production-stack/pull/1035).
"""

from collections.abc import Sequence

from folovllm.engine.router import LeastLoadedRouter, ReplicaLoad
from folovllm.engine.router import PrefixRouter as Reference
from folovllm.request import Request


class PrefixRouter(Reference):
    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        names = self.block_names(request)
        return min(loads, key=lambda load: (-self.known[load.replica].match(names), self.cost(load))).replica

    def started(self, request: Request, replica: int) -> None:
        LeastLoadedRouter.started(self, request, replica)
        self.known[replica].add(self.block_names(request))

    def finished(self, request: Request, replica: int, output_token_ids: Sequence[int]) -> None:
        self.known[replica].add(self.block_names(request, output_token_ids[:-1]))

    def forget(self, replica: int) -> None:
        self.known[replica].clear()
