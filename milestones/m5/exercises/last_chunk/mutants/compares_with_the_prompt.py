# killed-by: a_resumed_request_samples_after_its_output_is_computed | nor is a computed prompt
"""A request is complete when its prompt is computed.

After a preemption, that is the middle of the known tokens: the request samples its first output token again, or a wrong
one (vllm-ascend pull request 11334 compared with the prompt's length after a resume).
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def choose_sampling(self, step: Step) -> frozenset[str]:
        return frozenset(i for i, n in step.num_scheduled_tokens.items() if self._is_complete(self.requests[i], n))

    def _is_complete(self, request: Request, n: int) -> bool:
        return request.num_computed_tokens + n >= request.num_prompt_tokens

    def advance(self, step: Step) -> None:
        for request_id, n in step.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += n
