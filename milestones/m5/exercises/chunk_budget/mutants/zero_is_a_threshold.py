# killed-by: the_threshold_cuts_a_prompt_too | a threshold of 0 is none
"""The threshold is applied when it is 0, which means that there is none: no request ever gets a token."""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        missing = request.num_tokens - num_computed_tokens
        missing = min(missing, self.long_prefill_token_threshold)
        if missing > token_budget and not self.enable_chunked_prefill:
            return 0
        return min(missing, token_budget)
