# killed-by: the_smallest_engine_that_is_large_enough | expected (2, 4)
"""All GPUs share one model. It holds the most tokens, and leaves one engine where there could be four."""

from folovllm.sim.executor import WEIGHTS_AND_CACHE
from folovllm.sim.sizing import Sizing as Reference


class Sizing(Reference):
    def kv_tokens(self, tp_size: int) -> int:
        room = WEIGHTS_AND_CACHE * self.hardware.memory - self.arch.num_parameters() * self.weight_bits / 8 / tp_size
        heads = max(self.arch.num_key_value_heads // tp_size, 1)
        per_token = 2 * self.arch.num_hidden_layers * heads * self.arch.head_dim * self.dtype_bytes
        return max(int(room // per_token), 0)

    def split(self, num_gpus: int, tokens: int) -> tuple[int, int]:
        for tp_size in range(num_gpus, 0, -1):
            if self.divides_heads(tp_size) and self.kv_tokens(tp_size) >= tokens:
                return tp_size, num_gpus // tp_size
        raise ValueError("too few GPUs")
