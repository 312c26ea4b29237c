# killed-by: a_victim_scheduled_earlier_in_the_step_is_taken_back | returns to the budget
"""What this step had granted the victim is not taken back.

The worker is told to compute tokens of a request without blocks, and the budget is short by as many. vLLM's V1
scheduler had this under priority scheduling in 2025.
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
            if victim is request:
                step.undo(victim)
            elif victim.request_id in step.num_scheduled_tokens:
                step.continued.remove(victim)
                del step.num_scheduled_tokens[victim.request_id]
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
        self.kv_cache_manager.preempt(request)
        request.set_status(RequestStatus.PREEMPTED)
        request.num_computed_tokens = 0
        request.prompt_logprobs = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.prepend_request(request)
