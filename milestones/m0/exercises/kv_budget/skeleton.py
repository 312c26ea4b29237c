"""m0/kv_budget: how many bytes one token takes in the KV cache, and how many blocks of it fit into the memory."""

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheBudget as EngineKVCacheBudget
from folovllm.hf_config import ModelArchitecture


class KVCacheBudget(EngineKVCacheBudget):
    def bytes_per_token(self, arch: ModelArchitecture, dtype_bytes: int) -> int:
        """Returns how many bytes of K and V one token adds to the cache, over all layers.

        Of `arch` you need some of: num_hidden_layers, hidden_size, num_attention_heads, num_key_value_heads, head_dim.
        """
        raise NotImplementedError("m0/kv_budget: bytes_per_token")

    def num_blocks(self, config: EngineConfig, available_bytes: int, bytes_per_block: int) -> int:
        """Returns the number of blocks of the cache, the null block included.

        The first of these that applies decides:
        1. config.cache_config.num_kv_blocks, if it is not None: that many.
        2. config.cache_config.kv_cache_memory (bytes), if it is not None: as many blocks as fit into it.
        3. as many blocks as fit into `available_bytes`, but no more than can ever be in use: config.max_num_seqs
           requests of config.max_model_len tokens each, in blocks of config.block_size tokens, and the null block.
        """
        raise NotImplementedError("m0/kv_budget: num_blocks")
