# killed-by: the_budget_cuts_a_prompt | expected 8
"""A chunk is rounded down to whole blocks, as engines do that cannot start in the middle of one.

The rest of the budget is lost in every step, and a budget below the block size starves every prompt.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        missing = request.num_tokens - num_computed_tokens
        if self.long_prefill_token_threshold > 0:
            missing = min(missing, self.long_prefill_token_threshold)
        if missing > token_budget and not self.enable_chunked_prefill:
            return 0
        if missing <= token_budget:
            return missing
        return token_budget // 16 * 16
