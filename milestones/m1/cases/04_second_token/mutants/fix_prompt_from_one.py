# refused-by: token_by_token_is_all_at_once | [1, 2, 3, 4]
"""Makes both halves agree, on positions that begin at 1. The model was trained with positions that begin at 0."""

from folovllm.executor.fake import FakeRequest
from folovllm.learn.toy_runner import ToyRunner as EngineToyRunner


class ToyRunner(EngineToyRunner):
    def positions(self, state: FakeRequest, num_tokens: int) -> list[int]:
        """Returns the positions of the `num_tokens` tokens that this step computes."""
        if num_tokens == 1:  # a decode: the newest token
            return [len(state.token_ids)]
        return list(range(state.num_computed_tokens + 1, state.num_computed_tokens + num_tokens + 1))
