"""Sizing: how many GPUs an engine needs, and how many engines the GPUs of a service make.

Milestone: M10. vLLM counterpart: none (it profiles a running engine). Left out: activations that grow with the step,
and the embedding of the first stage of a pipeline.

Row 1: no torch.
"""

from dataclasses import dataclass

from folovllm.hf_config import ModelArchitecture
from folovllm.sim.executor import WEIGHTS_AND_CACHE
from folovllm.sim.hardware import Hardware


@dataclass(frozen=True)
class Sizing:
    """A model on GPUs of one kind. E.g. Sizing(shape_architecture("llama-3.1-70b"), HARDWARE["h100"])."""

    arch: ModelArchitecture
    hardware: Hardware
    weight_bits: int = 16
    dtype_bytes: int = 2  # of K and V

    def kv_tokens(self, tp_size: int) -> int:
        """Returns how many tokens the KV cache of one engine holds if `tp_size` GPUs share the model.

        Each GPU has its part of the weights, and WEIGHTS_AND_CACHE of its memory for them and the cache. Returns 0 if
        the weights do not fit.
        """
        room = WEIGHTS_AND_CACHE * self.hardware.memory - self.arch.num_parameters() * self.weight_bits / 8 / tp_size
        heads = max(self.arch.num_key_value_heads // tp_size, 1)  # beyond one GPU per head, GPUs hold the same head
        per_token = 2 * self.arch.num_hidden_layers * heads * self.arch.head_dim * self.dtype_bytes
        return max(int(room // per_token), 0)

    def split(self, num_gpus: int, tokens: int) -> tuple[int, int]:
        """Returns (tensor_parallel_size, number of engines) for a service of `num_gpus`.

        Every engine must hold `tokens` tokens of KV cache. Of the sizes that divide the heads and hold them, the
        smallest leaves the most engines. Raises ValueError if there is none.
        """
        for tp_size in range(1, num_gpus + 1):
            if self.divides_heads(tp_size) and self.kv_tokens(tp_size) >= tokens:
                return tp_size, num_gpus // tp_size
        raise ValueError(f"{num_gpus} x {self.hardware.name} hold no engine with {tokens:,} tokens of KV cache")

    def divides_heads(self, tp_size: int) -> bool:
        """Whether each of `tp_size` GPUs gets whole heads."""
        kv_heads = self.arch.num_key_value_heads
        return self.arch.num_attention_heads % tp_size == 0 and (kv_heads % tp_size == 0 or tp_size % kv_heads == 0)
