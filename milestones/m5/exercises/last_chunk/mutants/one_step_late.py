# killed-by: the_last_chunk_and_a_decode_sample | samples in that very step
"""The comparison is strict, so that a request whose last token is being computed does not sample.

In the next step it lacks nothing and gets no tokens: it waits forever.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def choose_sampling(self, step: Step) -> frozenset[str]:
        return frozenset(i for i, n in step.num_scheduled_tokens.items() if self._is_complete(self.requests[i], n))

    def _is_complete(self, request: Request, n: int) -> bool:
        return request.num_computed_tokens + n > request.num_tokens

    def advance(self, step: Step) -> None:
        for request_id, n in step.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += n
