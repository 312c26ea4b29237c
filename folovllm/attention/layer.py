"""Attention: the layer that model files use. It knows neither pages nor kernels; its backend does.

Milestone: M1. vLLM counterpart: vllm/attention/layer.py.
"""

import torch
from torch import nn

from folovllm.attention.backend import AttentionBackend
from folovllm.forward_context import get_attn_metadata


class Attention(nn.Module):
    """Causal attention with grouped KV heads over the paged cache.

    `bind` gives it a backend and its slice of the KV cache before the first forward pass.
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
        """query [num_tokens, num_heads * head_size], key and value [num_tokens, num_kv_heads * head_size]."""
        metadata = get_attn_metadata()
        query = query.view(-1, self.num_heads, self.head_size)  # [num_tokens, num_heads, head_size]
        key = key.view(-1, self.num_kv_heads, self.head_size)  # [num_tokens, num_kv_heads, head_size]
        value = value.view(-1, self.num_kv_heads, self.head_size)  # [num_tokens, num_kv_heads, head_size]
        self.backend.write(key, value, self.kv_cache, metadata)
        output = self.backend.forward(query, self.kv_cache, metadata)  # [num_tokens, num_heads, head_size]
        return output.view(-1, self.num_heads * self.head_size)
