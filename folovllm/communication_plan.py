"""CommunicationPlan: how often, and with how many bytes, the ranks of a model talk to each other in one forward pass.

Milestone: M9. vLLM counterpart: none (its layers communicate, and no code adds it up).
Left out: the message with the scheduler's output, which is a few kilobytes per step whatever the model is.

Row 0: plain numbers, no torch. The tests compare the plan with what the communicators of a real model have counted, and
the simulator turns it into time.
"""

from dataclasses import dataclass

from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import WHOLE_MODEL, ModelShard
from folovllm.utils import cdiv

ALL_REDUCE, ALL_GATHER, SEND = "all_reduce", "all_gather", "send"
ALL_REDUCES_PER_LAYER = 2  # one behind the attention, one behind the MLP
TENSORS_BETWEEN_STAGES = 2  # hidden and residual


@dataclass(frozen=True)
class CommunicationPlan:
    """What one rank hands to its groups in a forward pass. The keys of both results are the operations.

    E.g. 30 layers, tensor_parallel_size 3, one stage: 61 all-reduces, and 1 all-gather of the logits.
    """

    arch: ModelArchitecture
    shard: ModelShard = WHOLE_MODEL
    dtype_bytes: int = 2  # of the hidden states and the logits

    def calls(self, num_sampled: int) -> dict[str, int]:
        """Returns the number of calls of a pass that computes the logits of `num_sampled` tokens."""
        shard, calls = self.shard, {}
        if shard.tp_size > 1:
            num_layers = len(shard.layers(self.arch.num_hidden_layers))
            calls[ALL_REDUCE] = ALL_REDUCES_PER_LAYER * num_layers + shard.is_first_stage  # the embedding's
            calls[ALL_GATHER] = int(shard.is_last_stage and num_sampled > 0)
        if not shard.is_last_stage:
            calls[SEND] = TENSORS_BETWEEN_STAGES
        return {operation: count for operation, count in calls.items() if count}

    def bytes(self, num_tokens: int, num_sampled: int) -> dict[str, int]:
        """Returns the bytes that the rank hands over in a pass of `num_tokens` tokens.

        E.g. hidden_size 576 in 2 bytes, 4 tokens: each all-reduce is about 4 * 576 * 2 = 4,608 bytes.
        """
        hidden = num_tokens * self.arch.hidden_size * self.dtype_bytes
        part_of_vocab = cdiv(self.arch.vocab_size, self.shard.tp_size)
        logits = num_sampled * part_of_vocab * self.dtype_bytes
        size = {ALL_REDUCE: hidden, ALL_GATHER: logits, SEND: hidden}
        return {operation: count * size[operation] for operation, count in self.calls(num_sampled).items()}


def ring_bytes(operation: str, num_bytes: float, size: int) -> float:
    """Returns how many bytes each rank of a group of `size` really sends for a call that hands over `num_bytes`.

    In a ring, an all-reduce passes every piece around twice: once to add it up, and once to tell the sum. An all-gather
    passes each rank's tensor around once. E.g. an all-reduce of 1,200 bytes among 3 ranks: 2 * 2 / 3 * 1,200 = 1,600.
    """
    rounds = {ALL_REDUCE: 2 * (size - 1) / size, ALL_GATHER: size - 1, SEND: 1}
    return rounds[operation] * num_bytes
