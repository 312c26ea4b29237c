"""Sequences in a paged KV cache, ready for attention: a backend can be tried without an engine around it.

Milestone: M4. vLLM counterpart: tests/v1/attention/utils.py (`create_and_prepopulate_kv_cache`). Notebook 05 uses it.
"""

import torch

from folovllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from folovllm.utils import cdiv


class CachedSequences:
    """`num_seqs` sequences of `length` random tokens, with K and V in blocks that lie anywhere in the cache.

    All slots that do not belong to a sequence hold NaN.
    """

    def __init__(self, backend: type[AttentionBackend], spec: AttentionSpec, length: int, num_seqs: int = 1) -> None:
        self.backend, self.spec, self.length, self.num_seqs = backend(spec), spec, length, num_seqs
        generator = torch.Generator().manual_seed(0)
        blocks_each = cdiv(length, spec.block_size)
        order = 1 + torch.randperm(num_seqs * blocks_each, generator=generator)
        self.table = order.view(num_seqs, blocks_each).int()  # [num_seqs, blocks_each]
        num_tokens, num_heads = num_seqs * length, spec.num_kv_heads
        key, value = torch.randn(2, num_tokens, num_heads, spec.head_size, generator=generator).to(spec.dtype)
        query = torch.randn(num_tokens, spec.num_heads, spec.head_size, generator=generator)
        self.query = query.to(spec.dtype)  # [num_tokens, num_heads, head_size]
        shape = self.backend.kv_cache_shape(1 + num_seqs * blocks_each)
        self.cache = torch.full(shape, float("nan"), dtype=spec.dtype)
        self.backend.write(key, value, self.cache, self.step(length))

    def step(self, num_new: int) -> AttentionMetadata:
        """The metadata of a step that computes the last `num_new` tokens of every sequence."""
        size = self.spec.block_size
        positions = torch.arange(self.length - num_new, self.length)  # [num_new]
        slots = (self.table[:, positions // size].long() * size + positions % size).flatten()  # [num_seqs * num_new]
        starts = [i * num_new for i in range(self.num_seqs + 1)]
        metadata = AttentionMetadata(starts, [self.length] * self.num_seqs, self.table, slots, size)
        self.backend.prepare(metadata)
        return metadata

    def last_queries(self, num_new: int) -> torch.Tensor:
        """The queries of the last `num_new` tokens of every sequence: [num_seqs * num_new, num_heads, head_size]."""
        by_sequence = self.query.view(self.num_seqs, self.length, *self.query.shape[1:])
        return by_sequence[:, self.length - num_new :].flatten(0, 1)

    def attend(self, num_new: int) -> torch.Tensor:
        """The attention of these tokens: [num_seqs * num_new, num_heads, head_size]."""
        return self.backend.forward(self.last_queries(num_new), self.cache, self.step(num_new))
