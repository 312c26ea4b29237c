"""m3/paged_gather: attention over keys and values that lie in blocks. The reference supplies write and the rest."""

import torch

from folovllm.attention.backend import AttentionMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend as Reference


class TorchNaiveBackend(Reference):
    def prepare(self, metadata: AttentionMetadata) -> None:
        """Computes, once per step, what `forward` needs in every layer, and leaves it in `metadata.prepared`.

        For each request these are the slots of its positions 0 .. seq_len - 1 ([seq_len] int64) and the causal mask of
        its queries. The form is yours.
        """
        raise NotImplementedError("m3/paged_gather: prepare")

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Returns the attention of each request's queries over its own sequence, in the shape of `query`.

        `query` is [num_tokens, num_heads, head_size]; `kv_cache` [2, num_blocks, block_size, num_kv_heads, head_size].
        """
        raise NotImplementedError("m3/paged_gather: forward")
