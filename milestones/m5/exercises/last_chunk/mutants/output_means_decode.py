# killed-by: a_resumed_request_samples_after_its_output_is_computed | output is no sign
"""A request with output is taken for a decode, which always samples (nano-vllm issue 144)."""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def choose_sampling(self, step: Step) -> frozenset[str]:
        return frozenset(i for i, n in step.num_scheduled_tokens.items() if self._is_complete(self.requests[i], n))

    def _is_complete(self, request: Request, n: int) -> bool:
        return request.num_output_tokens > 0 or request.num_computed_tokens + n >= request.num_tokens

    def advance(self, step: Step) -> None:
        for request_id, n in step.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += n
