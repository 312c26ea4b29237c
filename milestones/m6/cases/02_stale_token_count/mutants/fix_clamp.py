# refused-by: the_budget_is_charged_with_what_is_computed | 10 more
"""Clamps the count where it is recorded. The budget still pays for tokens that were hit (nano-vllm 233)."""

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
            num_to_compute = min(num_new_tokens, request.num_tokens - num_hit_tokens)
            step.record(request, num_to_compute, new_blocks)
            step.token_budget -= num_new_tokens - num_to_compute
