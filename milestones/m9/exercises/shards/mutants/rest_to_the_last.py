# killed-by: six_layers_in_four_stages | have the sizes [1, 1, 1, 3], expected [1, 2, 2, 1]
"""Gives everything that is left over to the last stage, which computes the logits as well: the slowest stage sets the
pace of the whole pipeline. A division by integers that ends with `end = num_layers if last` does this.
"""

import dataclasses

from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import ModelShard as _Real


class ModelShard(_Real):
    def layers(self, num_hidden_layers: int) -> range:
        size = num_hidden_layers // self.pp_size
        start = size * self.pp_rank
        return range(start, num_hidden_layers if self.is_last_stage else start + size)

    def num_kv_heads(self, total: int) -> int:
        return max(total // self.tp_size, 1)

    def attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        return dataclasses.replace(
            arch,
            num_attention_heads=arch.num_attention_heads // self.tp_size,
            num_key_value_heads=self.num_kv_heads(arch.num_key_value_heads),
            num_hidden_layers=len(self.layers(arch.num_hidden_layers)),
        )
