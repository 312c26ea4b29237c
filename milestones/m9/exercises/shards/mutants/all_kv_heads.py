# killed-by: a_rank_has_at_least_one_kv_head | holds 8 of 8 KV heads, expected 2
"""Leaves every rank all KV heads. The answers are right, and every rank keeps the whole KV cache, so that more ranks
hold no more requests.
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
        return total

    def attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        return dataclasses.replace(
            arch,
            num_attention_heads=arch.num_attention_heads // self.tp_size,
            num_key_value_heads=self.num_kv_heads(arch.num_key_value_heads),
            num_hidden_layers=len(self.layers(arch.num_hidden_layers)),
        )
