"""no_cache: attention over the keys and values of this step alone, for `generate_naive`.

Milestone: M1. vLLM counterpart: none. The batch is one sequence, complete from its first token. Without a KV cache,
nothing can be wrong about the cache.
"""

import torch

from folovllm.attention.backend import AttentionBackend, AttentionMetadata


class NoCacheBackend(AttentionBackend):
    """The textbook formula on one whole sequence. The selector does not list it, because the engine never runs it."""

    name = "no_cache"

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        return (0,)

    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        self.key, self.value = key, value

    def copy_blocks(self, kv_caches: torch.Tensor, copies: list[tuple[int, int]]) -> None:
        assert not copies, "there are no blocks"

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        assert metadata.num_reqs == 1
        length, group = query.shape[0], self.spec.num_queries_per_kv
        q = query.float().transpose(0, 1)  # [num_heads, length, head_size]
        k = self.key.float().repeat_interleave(group, dim=1).transpose(0, 1)  # [num_heads, length, head_size]
        v = self.value.float().repeat_interleave(group, dim=1).transpose(0, 1)  # [num_heads, length, head_size]
        scores = q @ k.transpose(1, 2) * self.spec.scale  # [num_heads, length, length]
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)  # [length, length]
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)  # [num_heads, length, length]
        return (weights @ v).transpose(0, 1).to(query.dtype).contiguous()  # [length, num_heads, head_size]
