# killed-by: computed_tokens_end_at_the_end_of_the_chunk | attention ends where the chunk ends
"""After its first chunk, a request counts as computed to the end of its prompt.

The rest is never computed, and attention reads slots that were never written. nano-vllm passed the length of the whole
sequence instead of the chunk's end to attention (issue 212).
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def choose_sampling(self, step: Step) -> frozenset[str]:
        return frozenset(i for i, n in step.num_scheduled_tokens.items() if self._is_complete(self.requests[i], n))

    def _is_complete(self, request: Request, n: int) -> bool:
        return request.num_computed_tokens + n >= request.num_tokens

    def advance(self, step: Step) -> None:
        for request_id in step.num_scheduled_tokens:
            self.requests[request_id].num_computed_tokens = self.requests[request_id].num_tokens
