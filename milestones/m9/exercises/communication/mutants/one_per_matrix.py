# killed-by: one_stage_of_three_parts | says all_reduce: 121, expected 61
"""Counts an all-reduce for each of the four matrices. The point of column, then row is that the first of a pair needs
none.
"""

from folovllm.communication_plan import ALL_GATHER, ALL_REDUCE, SEND
from folovllm.communication_plan import CommunicationPlan as _Real
from folovllm.utils import cdiv


class CommunicationPlan(_Real):
    def calls(self, num_sampled: int) -> dict[str, int]:
        shard, calls = self.shard, {}
        if shard.tp_size > 1:
            calls[ALL_REDUCE] = 4 * len(shard.layers(self.arch.num_hidden_layers)) + shard.is_first_stage
            calls[ALL_GATHER] = int(shard.is_last_stage and num_sampled > 0)
        if not shard.is_last_stage:
            calls[SEND] = 2
        return {operation: count for operation, count in calls.items() if count}

    def bytes(self, num_tokens: int, num_sampled: int) -> dict[str, int]:
        hidden = num_tokens * self.arch.hidden_size * self.dtype_bytes
        logits = num_sampled * cdiv(self.arch.vocab_size, self.shard.tp_size) * self.dtype_bytes
        size = {ALL_REDUCE: hidden, ALL_GATHER: logits, SEND: hidden}
        return {operation: count * size[operation] for operation, count in self.calls(num_sampled).items()}
