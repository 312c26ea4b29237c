# killed-by: a_victim_unpublishes_what_it_has_not_computed | which unpublishes
"""The victim's blocks are freed, and those of this step stay in the prefix index although they will not be computed.

The next request with the same prefix reads them. vLLM's pull request 29387 is about hits on blocks of the same step.
"""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request, RequestStatus


class Scheduler(ReferenceScheduler):
    def allocate_or_preempt(self, request: Request, num_new_tokens: int, step: Step) -> list[KVCacheBlock] | None:
        while (blocks := self.kv_cache_manager.allocate_slots(request, num_new_tokens)) is None:
            victim = self.choose_victim()
            self.running.remove(victim)
            step.undo(victim)
            self.preempt(victim)
            step.preempted.append(victim)
            if victim is request:
                return None
        return blocks

    def choose_victim(self) -> Request:
        if self.scheduling_policy == "priority":
            return max(self.running, key=lambda request: request.sort_key())
        return self.running[-1]

    def preempt(self, request: Request) -> None:
        self.kv_cache_manager.free(request)
        request.set_status(RequestStatus.PREEMPTED)
        request.num_computed_tokens = 0
        request.prompt_logprobs = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.prepend_request(request)
