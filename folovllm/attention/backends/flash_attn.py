"""flash_attn: FlashAttention's own kernels on our blocks, with one call for the whole batch.

Milestone: M4. vLLM counterpart: vllm/v1/attention/backends/flash_attn.py. Left out: FlashAttention 4, split-KV for long
contexts with few requests, and the variant with a preallocated output, which CUDA graphs need.

torch >= 2.12 contains the kernel (`torch.nn.attention.varlen.varlen_attn` with `block_table`). For an older torch, the
flash-attn package has the same kernel. Both take what AttentionMetadata holds:

    query_start_loc = [0, 2, 5]           cu_seq_q    where the rows of each request begin
    seq_lens        = [5, 3]              seqused_k   how many keys each has;  cu_seq_k = [0, 5, 8]
    block_table     = [[7, 2], [4, 0]]    block_table
    kv_cache[0], kv_cache[1]              key, value  pages [num_blocks, block_size, num_kv_heads, head_size]

Both align the causal triangle with the bottom right corner, as a chunk at the end of a sequence needs.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.block_major import BlockMajorBackend
from folovllm.platforms import refusal_of_gpu
from folovllm.transfers import to_device_packed

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
HEAD_MULTIPLE = 8
# FlashAttention 2 copies K in tiles that must not cross a page. FlashAttention 3 (Hopper) accepts pages of any size.
PAGE_MULTIPLE = 256
_CAUSAL = (-1, 0)  # a window: any number of keys to the left of a query's own, none to the right
# With pages, torch 2.13's FlashAttention 2 returns wrong rows if it splits the keys, also if it chooses the number of
# splits itself (pytorch issue 194167). Without splits, decoding a few long sequences is slow; triton_paged splits them.
_NUM_SPLITS = 1

Kernel = Callable[[torch.Tensor, torch.Tensor, "FlashMetadata", float], torch.Tensor]


@dataclass(frozen=True)
class FlashMetadata:
    """The arguments that all layers of a step share."""

    cu_seq_q: torch.Tensor  # [num_reqs + 1] int32
    cu_seq_k: torch.Tensor  # [num_reqs + 1] int32; with pages only its differences matter
    seqused_k: torch.Tensor  # [num_reqs] int32
    block_table: torch.Tensor  # [num_reqs, max_blocks_per_req] int32, rows contiguous
    max_q: int
    max_k: int


class FlashAttnBackend(BlockMajorBackend):
    """Calls the library's kernel, which reads the block-major layout as it is."""

    name = "flash_attn"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        kernel = find_kernel()
        assert kernel is not None, "refusal() said that there is one"
        self.kernel = kernel

    @classmethod
    def refusal(cls, spec: AttentionSpec) -> str | None:
        return _refusal_of_spec(spec) or _refusal_of_machine(spec)

    def prepare(self, metadata: AttentionMetadata) -> None:
        start, lens = metadata.query_start_loc, metadata.seq_lens
        lists = (start, [0, *accumulate(lens)], lens)
        cu_seq_q, cu_seq_k, seqused_k = to_device_packed(lists, metadata.block_table.device, np.int32)
        metadata.prepared = FlashMetadata(
            cu_seq_q=cu_seq_q,
            cu_seq_k=cu_seq_k,
            seqused_k=seqused_k,
            block_table=metadata.block_table.contiguous(),
            max_q=max(end - first for first, end in pairwise(start)),
            max_k=max(lens),
        )

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        return self.kernel(query.contiguous(), kv_cache, metadata.prepared, self.spec.scale)


def call_torch(query: torch.Tensor, kv_cache: torch.Tensor, step: FlashMetadata, scale: float) -> torch.Tensor:
    """Calls torch's kernel on `query` [num_tokens, num_heads, head_size] and returns the same shape."""
    from torch.nn.attention.varlen import varlen_attn

    key, value = kv_cache  # each [num_blocks, block_size, num_kv_heads, head_size]
    out = varlen_attn(
        query, key, value, step.cu_seq_q, step.cu_seq_k, step.max_q, step.max_k,
        scale=scale, window_size=_CAUSAL, enable_gqa=query.shape[1] != key.shape[2],
        seqused_k=step.seqused_k, block_table=step.block_table, num_splits=_NUM_SPLITS,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)  # a tuple only when the log-sum-exp was asked for
    return out


def call_package(query: torch.Tensor, kv_cache: torch.Tensor, step: FlashMetadata, scale: float) -> torch.Tensor:
    """Calls flash-attn >= 2.5, which takes the lengths of the keys from the differences of `cu_seq_k`."""
    from flash_attn import flash_attn_varlen_func

    key, value = kv_cache  # each [num_blocks, block_size, num_kv_heads, head_size]
    out: torch.Tensor = flash_attn_varlen_func(
        query, key, value, step.cu_seq_q, step.cu_seq_k, step.max_q, step.max_k,
        softmax_scale=scale, causal=True, block_table=step.block_table,
    )  # fmt: skip
    return out


def find_kernel() -> Kernel | None:
    """Returns torch's own kernel, or else the package's, or None without either."""
    if _torch_has_pages():
        return call_torch
    return call_package if _package_is_there() else None


def _torch_has_pages() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"block_table", "seqused_k", "num_splits"} <= inspect.signature(varlen_attn).parameters.keys()


def _package_is_there() -> bool:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:  # not installed, or built for another torch
        return False
    return True


def page_multiple() -> int:
    """Returns what the block size must be divisible by. It is 1 if the user has activated FlashAttention 3 in torch."""
    if not _torch_has_pages():
        return PAGE_MULTIPLE
    from torch.nn.attention import current_flash_attention_impl

    return 1 if current_flash_attention_impl() == "FA3" else PAGE_MULTIPLE


def _refusal_of_spec(spec: AttentionSpec) -> str | None:
    if spec.device.type != "cuda":
        return f"it runs on an NVIDIA GPU, not on {spec.device.type}; use 'torch_flash', the same algorithm"
    if spec.dtype not in DTYPES:
        return f"it computes in bfloat16 and float16, not in {spec.dtype}; use 'triton_paged' or another dtype"
    if spec.head_size > MAX_HEAD_SIZE or spec.head_size % HEAD_MULTIPLE:
        return (
            f"it wants a head size up to {MAX_HEAD_SIZE} that is divisible by {HEAD_MULTIPLE}, not {spec.head_size}; "
            f"use 'triton_paged'"
        )
    return None


def _refusal_of_machine(spec: AttentionSpec) -> str | None:
    if find_kernel() is None:
        return "neither torch >= 2.12 nor the flash-attn package is installed; use 'triton_paged'"
    multiple = page_multiple()
    if spec.block_size % multiple:
        return (
            f"its pages must be divisible by {multiple} tokens, not hold {spec.block_size}; "
            f"use block_size={multiple} or 'triton_paged'"
        )
    reason = refusal_of_gpu(spec.device)
    return None if reason is None else f"it {reason}; use 'torch_sdpa'"
