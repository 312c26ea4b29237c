# killed-by: the_attention_of_a_rank | num_hidden_layers is 30, expected 15
"""Sizes the KV cache of a stage for all layers of the model. It takes twice the memory on two stages, and half of it is
never written.
"""

import dataclasses

from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import ModelShard as _Real


class ModelShard(_Real):
    def layers(self, num_hidden_layers: int) -> range:
        size, rest = divmod(num_hidden_layers, self.pp_size)
        sizes = [size] * self.pp_size
        for i in range(rest):
            sizes[-2 - i] += 1
        start = sum(sizes[: self.pp_rank])
        return range(start, start + sizes[self.pp_rank])

    def num_kv_heads(self, total: int) -> int:
        return max(total // self.tp_size, 1)

    def attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        return dataclasses.replace(
            arch,
            num_attention_heads=arch.num_attention_heads // self.tp_size,
            num_key_value_heads=self.num_kv_heads(arch.num_key_value_heads),
        )
