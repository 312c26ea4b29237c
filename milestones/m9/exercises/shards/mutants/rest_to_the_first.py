# killed-by: six_layers_in_four_stages | have the sizes [2, 2, 1, 1]
"""Gives what is left over to the first stages, as `numpy.array_split` does. vLLM changed its rule because the first
stage holds the embedding, and the last the head.
"""

import dataclasses

from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import ModelShard as _Real


class ModelShard(_Real):
    def layers(self, num_hidden_layers: int) -> range:
        size, rest = divmod(num_hidden_layers, self.pp_size)
        start = size * self.pp_rank + min(self.pp_rank, rest)
        return range(start, start + size + (self.pp_rank < rest))

    def num_kv_heads(self, total: int) -> int:
        return max(total // self.tp_size, 1)

    def attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        return dataclasses.replace(
            arch,
            num_attention_heads=arch.num_attention_heads // self.tp_size,
            num_key_value_heads=self.num_kv_heads(arch.num_key_value_heads),
            num_hidden_layers=len(self.layers(arch.num_hidden_layers)),
        )
