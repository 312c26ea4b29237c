"""m1/kv_contiguous: keys and values go into the page of their request, and attention reads them back."""

import torch

from folovllm.attention.backend import AttentionMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend


class Backend(TorchNaiveBackend):
    """`self.spec` has num_heads, num_kv_heads, head_size and scale (head_size ** -0.5).

    kv_cache is [2, num_blocks, block_size, num_kv_heads, head_size], where 0 holds the keys and 1 the values. Request i
    has one block, `metadata.block_table[i, 0]`: its token at position p (from 0) is entry p of that block.

    Of `metadata` you need query_start_loc (a list of num_reqs + 1 integers), seq_lens (a list of num_reqs integers),
    block_table (int32 tensor, [num_reqs, n]), slot_mapping (int64 tensor, [num_tokens]), block_size and num_reqs.
    """

    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        """Stores the new tokens' `key` and `value` [num_tokens, num_kv_heads, head_size], in place.

        Row r belongs to slot metadata.slot_mapping[r] = page * block_size + position.
        """
        raise NotImplementedError("m1/kv_contiguous: write")

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Returns the causal attention of `query` [num_tokens, num_heads, head_size], in the same shape and dtype.

        Raises ValueError if a request is longer than its page.
        """
        raise NotImplementedError("m1/kv_contiguous: forward")
