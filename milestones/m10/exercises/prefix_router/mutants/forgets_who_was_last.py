# killed-by: an_unknown_prompt_goes_to_the_least_loaded | longest ago
"""The base class does not hear of the start, so ties always go to the replica with the smallest number.

vLLM rotates its choice for this reason (https://github.com/vllm-project/vllm/pull/47420).
"""

from collections.abc import Sequence

from folovllm.engine.router import PrefixRouter as Reference
from folovllm.engine.router import ReplicaLoad
from folovllm.request import Request


class PrefixRouter(Reference):
    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        least = min(load.num_requests for load in loads)
        near = [load for load in loads if load.num_requests <= least + self.max_lead]
        names = self.block_names(request)
        return min(near, key=lambda load: (-self.known[load.replica].match(names), self.cost(load))).replica

    def started(self, request: Request, replica: int) -> None:
        self.known[replica].add(self.block_names(request))

    def finished(self, request: Request, replica: int, output_token_ids: Sequence[int]) -> None:
        self.known[replica].add(self.block_names(request, output_token_ids[:-1]))

    def forget(self, replica: int) -> None:
        self.known[replica].clear()
