# refused-by: token_by_token_is_all_at_once | [3]
"""Subtracts one too many."""

from folovllm.executor.fake import FakeRequest
from folovllm.learn.toy_runner import ToyRunner as EngineToyRunner


class ToyRunner(EngineToyRunner):
    def positions(self, state: FakeRequest, num_tokens: int) -> list[int]:
        """Returns the positions of the `num_tokens` tokens that this step computes."""
        if num_tokens == 1:  # a decode: the newest token
            return [len(state.token_ids) - 2]
        return list(range(state.num_computed_tokens, state.num_computed_tokens + num_tokens))
