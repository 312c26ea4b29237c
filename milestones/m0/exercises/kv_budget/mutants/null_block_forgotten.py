# killed-by: no_more_than_can_be_used | the count is 21, expected 22
"""The largest useful count leaves out the null block, so the last request waits although its memory is free.

vLLM takes the null block out of the pool as well: num_gpu_blocks counts it, and block 0 is never handed out.
"""

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheBudget as EngineKVCacheBudget
from folovllm.hf_config import ModelArchitecture
from folovllm.utils import cdiv


class KVCacheBudget(EngineKVCacheBudget):
    def bytes_per_token(self, arch: ModelArchitecture, dtype_bytes: int) -> int:
        return 2 * arch.num_hidden_layers * arch.num_key_value_heads * arch.head_dim * dtype_bytes

    def num_blocks(self, config: EngineConfig, available_bytes: int, bytes_per_block: int) -> int:
        cache = config.cache_config
        if cache.num_kv_blocks is not None:
            return cache.num_kv_blocks
        if cache.kv_cache_memory is not None:
            return cache.kv_cache_memory // bytes_per_block
        most = config.max_num_seqs * cdiv(config.max_model_len, config.block_size)
        return min(available_bytes // bytes_per_block, most)
