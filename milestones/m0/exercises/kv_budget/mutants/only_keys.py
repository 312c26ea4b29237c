# killed-by: four_real_models | 11,520 bytes per token, expected 23,040
"""K is counted and V is forgotten: half of the truth."""

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheBudget as EngineKVCacheBudget
from folovllm.hf_config import ModelArchitecture
from folovllm.utils import cdiv


class KVCacheBudget(EngineKVCacheBudget):
    def bytes_per_token(self, arch: ModelArchitecture, dtype_bytes: int) -> int:
        return arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * dtype_bytes

    def num_blocks(self, config: EngineConfig, available_bytes: int, bytes_per_block: int) -> int:
        cache = config.cache_config
        if cache.num_kv_blocks is not None:
            return cache.num_kv_blocks
        if cache.kv_cache_memory is not None:
            return cache.kv_cache_memory // bytes_per_block
        most = config.max_num_seqs * cdiv(config.max_model_len, config.block_size) + 1
        return min(available_bytes // bytes_per_block, most)
