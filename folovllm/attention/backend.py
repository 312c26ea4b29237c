"""The interface of an attention backend, and the metadata of one step's flat batch.

Milestone: M1 (fast backends arrive with M4). vLLM counterpart: vllm/attention/backends/abstract.py and
CommonAttentionMetadata. Left out: encoder attention, cascade attention.

The backend owns the layout of the KV cache. No other code knows how keys and values are arranged inside a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from folovllm.hf_config import ModelArchitecture


@dataclass
class AttentionMetadata:
    """Where every token of the flat batch belongs.

    E.g. the first of two requests computes the last 2 tokens of a sequence of 5, the second all 3 tokens of its
    sequence, and blocks hold 4 tokens:

        query_start_loc = [0, 2, 5]            rows 0-1 of the batch are request 0, rows 2-4 are request 1
        seq_lens        = [5, 3]               length after this step
        block_table     = [[7, 2], [4, 0]]     logical block -> physical block (the 0 is padding)
        slot_mapping    = [31, 8, 16, 17, 18]  slot = block * 4 + position % 4, for each new token
    """

    query_start_loc: list[int]  # [num_reqs + 1]
    seq_lens: list[int]  # [num_reqs]
    # [num_reqs, max_blocks_per_req] int32. Behind the blocks of a sequence its row may hold anything.
    block_table: torch.Tensor
    slot_mapping: torch.Tensor  # [num_tokens] int64
    block_size: int
    # Rows whose hidden states the model returns, ascending, [num_selected] int64; None: all rows. Of each request they
    # are its last rows: the last one if it samples, all of them if it wants prompt logprobs, none in mid-prompt.
    logits_indices: torch.Tensor | None = None
    prepared: Any = None  # what `AttentionBackend.prepare` made of it, once per step

    @classmethod
    def single_sequence(
        cls, seq_len: int, block_ids: Sequence[int] = (), block_size: int = 1, num_computed_tokens: int = 0
    ) -> "AttentionMetadata":
        """Returns the metadata of a batch with one request, whose first `num_computed_tokens` are in the cache already.

        Without `block_ids` the metadata names no slots: for backends that keep no cache.
        """
        table = torch.tensor([list(block_ids)], dtype=torch.int32)  # [1, num_blocks]
        slots = sequence_slots(table[0], seq_len if block_ids else 0, block_size)  # [seq_len]
        return cls([0, seq_len - num_computed_tokens], [seq_len], table, slots[num_computed_tokens:], block_size)

    @property
    def num_reqs(self) -> int:
        return len(self.seq_lens)


def sequence_slots(block_ids: torch.Tensor, seq_len: int, block_size: int) -> torch.Tensor:
    """Returns the slots of positions 0 .. seq_len - 1. E.g. blocks [7, 2] of 4, seq_len 6 -> [28, 29, 30, 31, 8, 9]."""
    positions = torch.arange(seq_len, device=block_ids.device)  # [seq_len]
    return block_ids[positions // block_size].long() * block_size + positions % block_size


@dataclass(frozen=True)
class AttentionSpec:
    """What a backend must know about the model. Every attention layer of a model has the same spec."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device
    block_size: int
    cpu_isa: str = "native"  # the level of our C++ kernels, for the backend that runs on them

    @classmethod
    def from_arch(
        cls,
        arch: ModelArchitecture,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        cpu_isa: str = "native",
    ) -> "AttentionSpec":
        heads = (arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim)
        return cls(*heads, dtype, device, block_size, cpu_isa)

    @property
    def scale(self) -> float:
        return float(self.head_size**-0.5)

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


class AttentionBackend(ABC):
    """Stores keys and values, and computes attention over them. One instance serves every layer of a model.

    In each layer, `write` stores the keys and values of the *whole step* before `forward` reads any. Two requests of
    one step may share a block that the first of them is only now filling, so a backend that read before everything is
    written would read stale values (R3.18).
    """

    name: str

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec

    @classmethod
    def refusal(cls, spec: AttentionSpec) -> str | None:
        """Returns why this backend cannot run `spec`, with an alternative, or None if it can."""
        return None

    @abstractmethod
    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Returns the shape of one layer's cache."""

    def prepare(self, metadata: AttentionMetadata) -> None:  # noqa: B027 - an optional hook, not forgotten
        """Computes, once per step, what all layers share, and leaves it in `metadata.prepared`."""

    @abstractmethod
    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        """Stores `key` and `value`, both [num_tokens, num_kv_heads, head_size], in their slots."""

    @abstractmethod
    def copy_blocks(self, kv_caches: torch.Tensor, copies: list[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination) in all layers; `kv_caches` is [num_layers, *kv_cache_shape]."""

    @abstractmethod
    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Returns the attention of `query` [num_tokens, num_heads, head_size] over the cache, in the same shape."""
