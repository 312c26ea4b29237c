# killed-by: the_threshold_cuts_a_prompt_too | also for one that has output
"""The threshold cuts requests without output only, so a resumed one takes all of the budget."""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        missing = request.num_tokens - num_computed_tokens
        if self.long_prefill_token_threshold > 0 and request.num_output_tokens == 0:
            missing = min(missing, self.long_prefill_token_threshold)
        if missing > token_budget:
            return token_budget if self.enable_chunked_prefill else 0
        return missing
