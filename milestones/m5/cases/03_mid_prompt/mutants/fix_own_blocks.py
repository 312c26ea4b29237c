# refused-by: seq_lens_end_with_the_chunk | [8, 11, 11]
"""Reads to the end of the blocks that the request owns: no foreign slot any more, but slots that are not written."""

from folovllm.executor.fake import FakeRequest
from folovllm.learn.toy_runner import ToyRunner as EngineToyRunner


class ToyRunner(EngineToyRunner):
    def seq_len(self, state: FakeRequest, num_tokens: int) -> int:
        """Returns how many slots of the request the attention of this step reads."""
        return min(len(state.token_ids), len(state.block_ids) * self.block_size)
