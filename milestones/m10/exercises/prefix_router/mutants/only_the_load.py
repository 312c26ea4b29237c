# killed-by: the_longest_prefix_decides | 3 blocks are there
"""The number of requests decides, and the prefix only breaks ties, as in a load balancer for web servers."""

from collections.abc import Sequence

from folovllm.engine.router import LeastLoadedRouter, ReplicaLoad
from folovllm.engine.router import PrefixRouter as Reference
from folovllm.request import Request


class PrefixRouter(Reference):
    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        least = min(load.num_requests for load in loads)
        near = [load for load in loads if load.num_requests <= least + self.max_lead]
        names = self.block_names(request)
        return min(near, key=lambda load: (load.num_requests, -self.known[load.replica].match(names))).replica

    def started(self, request: Request, replica: int) -> None:
        LeastLoadedRouter.started(self, request, replica)
        self.known[replica].add(self.block_names(request))

    def finished(self, request: Request, replica: int, output_token_ids: Sequence[int]) -> None:
        self.known[replica].add(self.block_names(request, output_token_ids[:-1]))

    def forget(self, replica: int) -> None:
        self.known[replica].clear()
