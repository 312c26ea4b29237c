"""Exercise m5/chunk_budget: how many tokens of a request a step computes. Everything else is inherited."""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    """Has `self.enable_chunked_prefill` (bool) and `self.long_prefill_token_threshold` (int, 0 if there is none)."""

    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        """Returns how many tokens of `request` this step computes, if its first `num_computed_tokens` are in the cache.

        That is what it lacks of its `request.num_tokens` known tokens, at most `self.long_prefill_token_threshold` (if
        that is not 0), and at most `token_budget`. If chunked prefill is off, a request that lacks more than the
        budget gets 0 instead of a part.
        """
        raise NotImplementedError("m5/chunk_budget: num_tokens_to_compute")
