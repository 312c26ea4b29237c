# killed-by: a_resumed_request_computes_its_output_again | expected [11, 9, 2, 1]
"""A request that has generated something is taken for a decode of one token (nano-vllm issue 144).

After a preemption it has output and nothing in the cache.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        missing = 1 if request.num_output_tokens > 0 else request.num_tokens - num_computed_tokens
        if self.long_prefill_token_threshold > 0:
            missing = min(missing, self.long_prefill_token_threshold)
        if missing > token_budget and not self.enable_chunked_prefill:
            return 0
        return min(missing, token_budget)
