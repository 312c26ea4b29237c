# killed-by: asking_changes_nothing | only `started` says
"""route notes the prompt already, so a router that is asked and not used remembers what no replica has computed."""

from collections.abc import Sequence

from folovllm.engine.router import LeastLoadedRouter, ReplicaLoad
from folovllm.engine.router import PrefixRouter as Reference
from folovllm.request import Request


class PrefixRouter(Reference):
    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        least = min(load.num_requests for load in loads)
        near = [load for load in loads if load.num_requests <= least + self.max_lead]
        names = self.block_names(request)
        chosen = min(near, key=lambda load: (-self.known[load.replica].match(names), self.cost(load))).replica
        self.known[chosen].add(names)
        return chosen

    def started(self, request: Request, replica: int) -> None:
        LeastLoadedRouter.started(self, request, replica)
        self.known[replica].add(self.block_names(request))

    def finished(self, request: Request, replica: int, output_token_ids: Sequence[int]) -> None:
        self.known[replica].add(self.block_names(request, output_token_ids[:-1]))

    def forget(self, replica: int) -> None:
        self.known[replica].clear()
