"""Case 3: the model runner that the engine of the report ran with. Mend `seq_len`."""

from folovllm.executor.fake import FakeRequest
from folovllm.learn.toy_runner import ToyRunner as EngineToyRunner


class ToyRunner(EngineToyRunner):
    def seq_len(self, state: FakeRequest, num_tokens: int) -> int:
        """Returns how many slots of the request the attention of this step reads."""
        return len(state.token_ids)
