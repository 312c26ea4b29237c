"""Case 2: the scheduler that the engine of the report ran with. Mend `schedule_waiting`."""

from folovllm.core.sched.scheduler import Scheduler as EngineScheduler
from folovllm.core.sched.step import Step


class Scheduler(EngineScheduler):
    def schedule_waiting(self, step: Step) -> None:
        """Admits requests from the head of the queue while budget, seats and blocks last."""
        while self.waiting and step.token_budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting.peek_request()
            num_new_tokens = self.num_tokens_to_compute(request, request.num_computed_tokens, step.token_budget)
            if num_new_tokens == 0:
                break
            hit_blocks, num_hit_tokens = self.kv_cache_manager.get_computed_blocks(request)
            new_blocks = self.kv_cache_manager.allocate_slots(
                request,
                num_new_tokens,
                hit_blocks,
                full_sequence_must_fit=self.reserve_full_sequence,
                num_new_computed_tokens=num_hit_tokens,
            )
            if new_blocks is None:
                break
            self.waiting.pop_request()
            self.admit(request, num_hit_tokens, step)
            step.record(request, num_new_tokens, new_blocks)
