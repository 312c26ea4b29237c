# killed-by: a_head_is_not_divided | Half a head does not exist
"""K and V are divided by the number of GPUs, whatever the number of heads is.

Right up to one GPU per KV head. Llama-3.1-70B has 8 KV heads, so on 16 GPUs the plan promises twice the cache that
there is.
"""

from folovllm.sim.executor import WEIGHTS_AND_CACHE
from folovllm.sim.sizing import Sizing as Reference


class Sizing(Reference):
    def kv_tokens(self, tp_size: int) -> int:
        room = WEIGHTS_AND_CACHE * self.hardware.memory - self.arch.num_parameters() * self.weight_bits / 8 / tp_size
        heads = self.arch.num_key_value_heads / tp_size
        per_token = 2 * self.arch.num_hidden_layers * heads * self.arch.head_dim * self.dtype_bytes
        return max(int(room // per_token), 0)

    def split(self, num_gpus: int, tokens: int) -> tuple[int, int]:
        for tp_size in range(1, num_gpus + 1):
            if self.divides_heads(tp_size) and self.kv_tokens(tp_size) >= tokens:
                return tp_size, num_gpus // tp_size
        raise ValueError("too few GPUs")
