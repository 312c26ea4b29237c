# killed-by: a_chunk_in_mid_prompt_does_not_sample | which is known
"""The step is taken for one that `advance` has not counted yet, and counted twice.

The last chunk but one samples if it is as long as the rest.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def choose_sampling(self, step: Step) -> frozenset[str]:
        return frozenset(i for i, n in step.num_scheduled_tokens.items() if self._is_complete(self.requests[i], n))

    def _is_complete(self, request: Request, n: int) -> bool:
        return request.num_computed_tokens + 2 * n >= request.num_tokens

    def advance(self, step: Step) -> None:
        for request_id, n in step.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += n
