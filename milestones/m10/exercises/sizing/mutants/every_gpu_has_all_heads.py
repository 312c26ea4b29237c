# killed-by: weights_are_divided_and_so_are_heads | 500 tokens, expected 1,000
"""Each GPU is charged with K and V of all heads, as if the cache were copied and not divided."""

from folovllm.sim.executor import WEIGHTS_AND_CACHE
from folovllm.sim.sizing import Sizing as Reference


class Sizing(Reference):
    def kv_tokens(self, tp_size: int) -> int:
        room = WEIGHTS_AND_CACHE * self.hardware.memory - self.arch.num_parameters() * self.weight_bits / 8 / tp_size
        heads = self.arch.num_key_value_heads
        per_token = 2 * self.arch.num_hidden_layers * heads * self.arch.head_dim * self.dtype_bytes
        return max(int(room // per_token), 0)

    def split(self, num_gpus: int, tokens: int) -> tuple[int, int]:
        for tp_size in range(1, num_gpus + 1):
            if self.divides_heads(tp_size) and self.kv_tokens(tp_size) >= tokens:
                return tp_size, num_gpus // tp_size
        raise ValueError("too few GPUs")
