# killed-by: a_chunk_in_mid_prompt_does_not_sample | the next token of the prompt, which is known
"""Every request of the step samples, whether its prompt is complete or not.

The client receives a token for each chunk. A review of vllm-project/vllm pull 41194 caught the same step from the other
side: a request that was to end after its prompt ended after its first chunk.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def choose_sampling(self, step: Step) -> frozenset[str]:
        return frozenset(i for i, n in step.num_scheduled_tokens.items() if self._is_complete(self.requests[i], n))

    def _is_complete(self, request: Request, n: int) -> bool:
        return True

    def advance(self, step: Step) -> None:
        for request_id, n in step.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += n
