"""The attention layer that model files use. It knows neither blocks nor kernels, because its backend handles both.

Milestone: M1. vLLM counterpart: vllm/attention/layer.py.
"""

import torch
from torch import nn

from folovllm.attention.backend import AttentionBackend
from folovllm.forward_context import get_attn_metadata


class Attention(nn.Module):
    """Causal attention with grouped KV heads over the paged cache.

    Before the first forward pass, `bind` gives the layer a backend and the layer's own slice of the KV cache.
    """

    kv_cache: torch.Tensor
    backend: AttentionBackend

    def __init__(self, num_heads: int, head_size: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads

    def bind(self, backend: AttentionBackend, kv_cache: torch.Tensor) -> None:
        self.backend = backend
        self.kv_cache = kv_cache

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Stores this step's keys and values in the cache and returns the attention output, shaped like `query`.

        `query` is [num_tokens, num_heads * head_size]; `key` and `value` are [num_tokens, num_kv_heads * head_size].
        """
        metadata = get_attn_metadata()
        query = query.view(-1, self.num_heads, self.head_size)  # [num_tokens, num_heads, head_size]
        key = key.view(-1, self.num_kv_heads, self.head_size)  # [num_tokens, num_kv_heads, head_size]
        value = value.view(-1, self.num_kv_heads, self.head_size)  # [num_tokens, num_kv_heads, head_size]
        self.backend.write(key, value, self.kv_cache, metadata)
        output = self.backend.forward(query, self.kv_cache, metadata)  # [num_tokens, num_heads, head_size]
        return output.view(-1, self.num_heads * self.head_size)
