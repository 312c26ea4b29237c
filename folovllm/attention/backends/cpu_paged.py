"""cpu_paged: attention of the whole batch in one C++ call that reads the blocks in place (folovllm/csrc/attention.cpp).

Milestone: M4. vLLM counterpart: vllm/v1/attention/backends/cpu_attn.py. Left out: AMX, sliding windows.

`torch_naive` gathers the keys and values of every sequence into new tensors before it multiplies. This backend copies
nothing, so a decoding step takes about as long as reading the KV cache once.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from folovllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from folovllm.csrc.build import load_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Limits of the kernel's scratch memory (kMaxHeadSize in csrc/kv_pages.h, kMaxRows in csrc/attention_plan.h).
MAX_HEAD_SIZE = 256
MAX_QUERIES_PER_KV = 64
HEAD_MULTIPLE = 16


@dataclass(frozen=True)
class CpuMetadata:
    """The lists of `AttentionMetadata` as the tensors that the operator takes."""

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_reqs] int32


class CpuPagedBackend(AttentionBackend):
    """KV layout: [num_blocks, num_kv_heads, 2, block_size * head_size]. Inside a block, K is transposed (see the C++).

    If the head size is not a multiple of 16, heads are padded with zeros, which add nothing to a score.
    """

    name = "cpu_paged"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.ops: Any = load_ops(spec.cpu_isa)
        assert self.ops is not None, "refusal() said that there are kernels"
        self.padding = -spec.head_size % HEAD_MULTIPLE

    @classmethod
    def refusal(cls, spec: AttentionSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"it runs on the CPU, not on {spec.device.type}; use 'torch_sdpa'"
        if spec.dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {spec.dtype}; use 'torch_naive'"
        if spec.head_size > MAX_HEAD_SIZE or spec.num_queries_per_kv > MAX_QUERIES_PER_KV:
            return (
                f"head size {spec.head_size} with {spec.num_queries_per_kv} query heads per KV head is beyond its "
                f"{MAX_HEAD_SIZE} and {MAX_QUERIES_PER_KV}; use 'torch_sdpa'"
            )
        if load_ops(spec.cpu_isa) is None:
            return "its C++ kernels could not be built or loaded (see the warning); use 'torch_sdpa'"
        return None

    def kv_cache_shape(self, num_blocks: int) -> tuple[int, ...]:
        page = self.spec.block_size * (self.spec.head_size + self.padding)
        return (num_blocks, self.spec.num_kv_heads, 2, page)

    def prepare(self, metadata: AttentionMetadata) -> None:
        metadata.prepared = CpuMetadata(
            query_start_loc=torch.from_numpy(np.array(metadata.query_start_loc, dtype=np.int32)),
            seq_lens=torch.from_numpy(np.array(metadata.seq_lens, dtype=np.int32)),
        )

    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        if self.padding:
            key, value = F.pad(key, (0, self.padding)), F.pad(value, (0, self.padding))
        self.ops.write_kv(key, value, kv_cache, metadata.slot_mapping)

    def copy_blocks(self, kv_caches: torch.Tensor, copies: list[tuple[int, int]]) -> None:
        for source, destination in copies:
            kv_caches[:, destination].copy_(kv_caches[:, source])

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        if self.padding:
            query = F.pad(query, (0, self.padding))
        out = torch.empty(query.shape, dtype=query.dtype)  # [num_tokens, num_heads, head_size], contiguous
        prepared = metadata.prepared
        self.ops.paged_attention(
            out,
            query,
            kv_cache,
            prepared.query_start_loc,
            prepared.seq_lens,
            metadata.block_table,
            self.spec.scale,
        )
        return out[..., : self.spec.head_size].contiguous() if self.padding else out
