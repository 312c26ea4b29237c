# killed-by: nothing_is_sampled | says all_gather: 1, expected nothing
"""Gathers the logits in every step, also if no token is sampled."""

from folovllm.communication_plan import ALL_GATHER, ALL_REDUCE, SEND
from folovllm.communication_plan import CommunicationPlan as _Real
from folovllm.utils import cdiv


class CommunicationPlan(_Real):
    def calls(self, num_sampled: int) -> dict[str, int]:
        shard, calls = self.shard, {}
        if shard.tp_size > 1:
            calls[ALL_REDUCE] = 2 * len(shard.layers(self.arch.num_hidden_layers)) + shard.is_first_stage
            calls[ALL_GATHER] = int(shard.is_last_stage)
        if not shard.is_last_stage:
            calls[SEND] = 2
        return {operation: count for operation, count in calls.items() if count}

    def bytes(self, num_tokens: int, num_sampled: int) -> dict[str, int]:
        hidden = num_tokens * self.arch.hidden_size * self.dtype_bytes
        logits = num_sampled * cdiv(self.arch.vocab_size, self.shard.tp_size) * self.dtype_bytes
        size = {ALL_REDUCE: hidden, ALL_GATHER: logits, SEND: hidden}
        return {operation: count * size[operation] for operation, count in self.calls(num_sampled).items()}
