# refused-by: seq_lens_end_with_the_chunk | [0, 5, 10]
"""Reads what earlier steps wrote. A token then does not see itself, nor the rest of its chunk."""

from folovllm.executor.fake import FakeRequest
from folovllm.learn.toy_runner import ToyRunner as EngineToyRunner


class ToyRunner(EngineToyRunner):
    def seq_len(self, state: FakeRequest, num_tokens: int) -> int:
        """Returns how many slots of the request the attention of this step reads."""
        return state.num_computed_tokens
