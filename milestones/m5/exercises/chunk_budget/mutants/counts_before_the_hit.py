# killed-by: tokens_are_counted_from_the_end_of_the_hit | count from num_computed_tokens
"""The missing tokens are counted from what the request itself says, which is 0 before it is admitted.

nano-vllm counted before the prefix cache was asked (pull requests 207, 210, 211): the first chunk was too long by the
hit, and ran past the block table.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        missing = request.num_tokens - (request.num_computed_tokens or 0)
        if self.long_prefill_token_threshold > 0:
            missing = min(missing, self.long_prefill_token_threshold)
        if missing > token_budget and not self.enable_chunked_prefill:
            return 0
        return min(missing, token_budget)
