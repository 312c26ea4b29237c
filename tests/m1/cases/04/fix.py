"""Case 4, solved: one rule for every step."""

from folovllm.executor.fake import FakeRequest
from folovllm.learn.toy_runner import ToyRunner as EngineToyRunner


class ToyRunner(EngineToyRunner):
    def positions(self, state: FakeRequest, num_tokens: int) -> list[int]:
        """Returns the positions of the `num_tokens` tokens that this step computes."""
        start = state.num_computed_tokens
        return list(range(start, start + num_tokens))
