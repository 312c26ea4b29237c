# killed-by: the_request_that_needs_a_block_may_be_the_victim | expected a to compute 1 token and b to preempt itself
"""The request that needs blocks is never its own victim, so the latest one takes the blocks of an older one.

Two requests that do not fit together take the blocks from each other in every step.
"""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request, RequestStatus


class Scheduler(ReferenceScheduler):
    def allocate_or_preempt(self, request: Request, num_new_tokens: int, step: Step) -> list[KVCacheBlock] | None:
        while (blocks := self.kv_cache_manager.allocate_slots(request, num_new_tokens)) is None:
            victim = self.choose_victim()
            if victim is request and len(self.running) > 1:
                victim = self.running[-2]
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
        self.kv_cache_manager.preempt(request)
        request.set_status(RequestStatus.PREEMPTED)
        request.num_computed_tokens = 0
        request.prompt_logprobs = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.prepend_request(request)
