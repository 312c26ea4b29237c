"""Case 4: the model runner that the engine of the report ran with. Mend `positions`."""

from folovllm.executor.fake import FakeRequest
from folovllm.learn.toy_runner import ToyRunner as EngineToyRunner


class ToyRunner(EngineToyRunner):
    def positions(self, state: FakeRequest, num_tokens: int) -> list[int]:
        """Returns the positions of the `num_tokens` tokens that this step computes."""
        if num_tokens == 1:  # a decode: the newest token
            return [len(state.token_ids)]
        return list(range(state.num_computed_tokens, state.num_computed_tokens + num_tokens))
