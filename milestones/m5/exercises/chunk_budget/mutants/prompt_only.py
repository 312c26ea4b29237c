# killed-by: a_resumed_request_computes_its_output_again | no rule asks whether this 'is a prompt'
"""A request is "in prefill" until its prompt is computed, and a decode of one token after that.

A request that was preempted computes its prompt and never its earlier output (vllm-ascend pull request 11334).
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        if num_computed_tokens < request.num_prompt_tokens:
            missing = request.num_prompt_tokens - num_computed_tokens
        else:
            missing = min(1, request.num_tokens - num_computed_tokens)
        if self.long_prefill_token_threshold > 0:
            missing = min(missing, self.long_prefill_token_threshold)
        if missing > token_budget and not self.enable_chunked_prefill:
            return 0
        return min(missing, token_budget)
