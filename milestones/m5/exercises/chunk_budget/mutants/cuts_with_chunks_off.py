# killed-by: without_chunks_it_is_the_whole_or_nothing | whole or not at all
"""The budget cuts a prompt although chunked prefill is off.

The model below M5 has never been asked to go on in the middle of a prompt.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        missing = request.num_tokens - num_computed_tokens
        if self.long_prefill_token_threshold > 0:
            missing = min(missing, self.long_prefill_token_threshold)
        return min(missing, token_budget)
