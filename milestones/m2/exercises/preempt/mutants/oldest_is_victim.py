# killed-by: the_latest_admitted_request_is_the_victim | the oldest has computed most
"""The first of the running requests is preempted.

It loses the most work, and comes back to the end of the list only to push out the next oldest: the requests take the
blocks from each other in turn. vLLM takes the last (or, by priority, the least urgent) for this reason.
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
        return self.running[0]

    def preempt(self, request: Request) -> None:
        self.kv_cache_manager.preempt(request)
        request.set_status(RequestStatus.PREEMPTED)
        request.num_computed_tokens = 0
        request.prompt_logprobs = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.prepend_request(request)
