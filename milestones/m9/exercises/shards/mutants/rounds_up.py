# killed-by: six_layers_in_four_stages | have the sizes
"""Rounds the size of a stage up. The last stages are then empty or reach beyond the model, and their weights are
missing when the checkpoint is loaded.
"""

import dataclasses

from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import ModelShard as _Real


class ModelShard(_Real):
    def layers(self, num_hidden_layers: int) -> range:
        size = -(-num_hidden_layers // self.pp_size)
        return range(size * self.pp_rank, size * (self.pp_rank + 1))

    def num_kv_heads(self, total: int) -> int:
        return max(total // self.tp_size, 1)

    def attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        return dataclasses.replace(
            arch,
            num_attention_heads=arch.num_attention_heads // self.tp_size,
            num_key_value_heads=self.num_kv_heads(arch.num_key_value_heads),
            num_hidden_layers=len(self.layers(arch.num_hidden_layers)),
        )
