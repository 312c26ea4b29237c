"""Case 3, solved."""

from folovllm.executor.fake import FakeRequest
from folovllm.learn.toy_runner import ToyRunner as EngineToyRunner


class ToyRunner(EngineToyRunner):
    def seq_len(self, state: FakeRequest, num_tokens: int) -> int:
        """Returns how many slots of the request the attention of this step reads."""
        return state.num_computed_tokens + num_tokens
