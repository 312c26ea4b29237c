# killed-by: a_victim_gives_back_its_blocks_and_starts_again | its K/V are gone with its blocks
"""The victim keeps its num_computed_tokens, though its blocks are gone.

It goes on where it was and reads what other requests wrote. vllm-project/vllm pull 5349 is about a state of this kind
after a recompute; vllm-gaudi pull 541 lists what its tokens looked like.
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
        self.kv_cache_manager.preempt(request)
        request.set_status(RequestStatus.PREEMPTED)
        request.prompt_logprobs = []
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.prepend_request(request)
