"""triton_paged: our own GPU attention, which reads the blocks in place (kernels: attention/ops/triton_attention.py).

Milestone: M4. vLLM counterpart: vllm/v1/attention/backends/triton_attn.py. Left out: CUDA graphs (the lists of
`prepare` have the size of the batch), tile sizes found by measuring.

This file decides which programs are launched. The queries of a request with several new tokens are split into tiles,
and the keys of a request with one new token are split into parts. Neither kernel waits for the other.
"""

from dataclasses import dataclass

import numpy as np
import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.block_major import BlockMajorBackend
from folovllm.platforms import refusal_of_gpu
from folovllm.transfers import to_device_packed
from folovllm.utils import cdiv

try:
    import triton

    from folovllm.attention.ops import triton_attention as kernels
except ImportError as error:
    raise ImportError(
        f"Triton is not installed ({error}); it comes with the CUDA builds of torch on Linux, or install it with "
        f"`pip install triton`; use 'torch_sdpa'"
    ) from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256
MAX_QUERIES_PER_KV = 64
_SMALLEST_TILE = 16  # what a matrix unit multiplies at once


@dataclass(frozen=True)
class Tile:
    """How one kernel is launched. Rows and keys are powers of two."""

    rows: int  # (new token, head) pairs in `chunk_kernel`, heads in `single_kernel`
    keys: int
    num_warps: int = 4  # of 32 threads, in one program
    # Of the compiler's pipeline. The slots of a tile are fetched before its keys, so 3 stages fetch K and V one tile
    # ahead, and 5 stages two.
    num_stages: int = 3


@dataclass(frozen=True)
class Tiles:
    """All sizes that the launches pass."""

    head_pad: int  # a power of two
    chunk: Tile
    single: Tile
    # Keys per program of a single query. Fewer keys give more parallel programs; more keys leave fewer parts to merge.
    split_kv: int = 256

    def __post_init__(self) -> None:
        assert self.split_kv % self.single.keys == 0


@dataclass(frozen=True)
class TritonMetadata:
    """The lists of `AttentionMetadata` on the device, and the work of each program."""

    query_start_loc: torch.Tensor  # [num_reqs + 1] int32
    seq_lens: torch.Tensor  # [num_reqs] int32
    tiles: torch.Tensor  # [num_tiles, 2] int32 (request, first new token)
    singles: torch.Tensor  # [num_singles] int32 requests with one new token
    max_splits: int  # parts of the longest of them


class TritonPagedBackend(BlockMajorBackend):
    """Launches our Triton kernels on the block-major layout. `write` is a kernel, too."""

    name = "triton_paged"

    def __init__(self, spec: AttentionSpec, tiles: Tiles | None = None) -> None:
        """`tiles`: sizes other than those of `tile_sizes`, for measurements."""
        super().__init__(spec)
        self.tiles = tiles or tile_sizes(spec)
        self.chunk_args = launch_arguments(spec, self.tiles, self.tiles.chunk)
        self.single_args = launch_arguments(spec, self.tiles, self.tiles.single) | {"SPLIT_KV": self.tiles.split_kv}

    @classmethod
    def refusal(cls, spec: AttentionSpec) -> str | None:
        if spec.dtype not in DTYPES:
            return f"it computes in float32, bfloat16 and float16, not in {spec.dtype}; use 'torch_naive'"
        if spec.head_size > MAX_HEAD_SIZE or spec.num_queries_per_kv > MAX_QUERIES_PER_KV:
            return (
                f"head size {spec.head_size} with {spec.num_queries_per_kv} query heads per KV head is beyond its "
                f"{MAX_HEAD_SIZE} and {MAX_QUERIES_PER_KV}; use 'torch_sdpa'"
            )
        return _refusal_of_interpreter(spec) if is_interpreted() else _refusal_of_gpu(spec)

    def prepare(self, metadata: AttentionMetadata) -> None:
        """Splits the step into programs. E.g. 6, 1, 3 new tokens, 4 a tile: tiles (0, 0), (0, 4), (2, 0), single 1."""
        start, device = metadata.query_start_loc, metadata.block_table.device
        q_lens = [start[i + 1] - start[i] for i in range(metadata.num_reqs)]
        per_tile = self.tiles.chunk.rows // self.spec.num_queries_per_kv
        tiles = [(i, first) for i, q_len in enumerate(q_lens) if q_len > 1 for first in range(0, q_len, per_tile)]
        singles = [i for i, q_len in enumerate(q_lens) if q_len == 1]
        longest = max((metadata.seq_lens[i] for i in singles), default=0)
        lists = (start, metadata.seq_lens, [number for tile in tiles for number in tile], singles)
        query_start_loc, seq_lens, flat_tiles, singles_on_device = to_device_packed(lists, device, np.int32)
        metadata.prepared = TritonMetadata(
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            tiles=flat_tiles.view(-1, 2),
            singles=singles_on_device,
            max_splits=cdiv(longest, self.tiles.split_kv),
        )

    def write(
        self, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        row_size = self.spec.num_kv_heads * self.spec.head_size
        key, value = key.reshape(-1, row_size), value.reshape(-1, row_size)  # [num_tokens, row_size], mostly views
        kernels.write_kernel[(key.shape[0],)](
            key, value, kv_cache[0], kv_cache[1], metadata.slot_mapping, key.stride(0), value.stride(0),
            ROW_SIZE=row_size, ROW_PAD=triton.next_power_of_2(row_size),
        )  # fmt: skip

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        assert query.stride(2) == 1
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_size]
        prepared: TritonMetadata = metadata.prepared
        if len(prepared.tiles):
            self._attend_chunks(out, query, kv_cache, metadata.block_table, prepared)
        if len(prepared.singles):
            self._attend_singles(out, query, kv_cache, metadata.block_table, prepared)
        return out

    def _attend_chunks(
        self, out: torch.Tensor, query: torch.Tensor, kv_cache: torch.Tensor, table: torch.Tensor, step: TritonMetadata
    ) -> None:
        kernels.chunk_kernel[(len(step.tiles), self.spec.num_kv_heads)](
            out, query, kv_cache[0], kv_cache[1], table, step.query_start_loc, step.seq_lens, step.tiles,
            self.spec.scale, query.stride(0), query.stride(1), out.stride(0), table.stride(0), kv_cache.stride(2),
            **self.chunk_args,
        )  # fmt: skip

    def _attend_singles(
        self, out: torch.Tensor, query: torch.Tensor, kv_cache: torch.Tensor, table: torch.Tensor, step: TritonMetadata
    ) -> None:
        num_singles, num_heads, head_size = len(step.singles), self.spec.num_heads, self.spec.head_size
        # Parts stay in fp32: they are rounded once, after the merge.
        lse = torch.empty(num_singles, num_heads, step.max_splits, device=out.device, dtype=torch.float32)
        parts = torch.empty(*lse.shape, head_size, device=out.device, dtype=torch.float32)
        kernels.single_kernel[(num_singles, self.spec.num_kv_heads, step.max_splits)](
            parts, lse, query, kv_cache[0], kv_cache[1], table, step.query_start_loc, step.seq_lens, step.singles,
            self.spec.scale, query.stride(0), query.stride(1), table.stride(0), kv_cache.stride(2),
            **self.single_args,
        )  # fmt: skip
        kernels.merge_kernel[(num_singles, num_heads)](
            out, parts, lse, step.query_start_loc, step.seq_lens, step.singles, out.stride(0), step.max_splits,
            HEAD_SIZE=head_size, HEAD_PAD=self.tiles.head_pad, SPLIT_KV=self.tiles.split_kv,
        )  # fmt: skip


def tile_sizes(spec: AttentionSpec) -> Tiles:
    """Returns tiles that fit into the registers of a program and into the on-chip memory of its GPU.

    With tiles twice as large, four warps have too few registers for many shapes, and the compiler must move some to
    memory and back. In fp32, where no matrix unit helps, this happens soonest. tests/m4/test_triton_paged.py checks
    what the compiler had to move. Only a GPU can tell which sizes are fastest: scripts/dev/gpu_tiles.py measures them.
    """
    head_pad = max(_SMALLEST_TILE, triton.next_power_of_2(spec.head_size))
    group = triton.next_power_of_2(spec.num_queries_per_kv)
    keys = 32 if head_pad * spec.dtype.itemsize <= 256 else 16
    return Tiles(
        head_pad=head_pad,
        chunk=Tile(max(64 if spec.dtype.itemsize == 2 and head_pad <= 128 else 32, group), keys),
        single=Tile(max(_SMALLEST_TILE, group), keys),
    )


def launch_arguments(spec: AttentionSpec, tiles: Tiles, tile: Tile) -> dict[str, int]:
    """Returns what an attention kernel is compiled for; `num_warps` and `num_stages` are options of the compiler."""
    return {
        "BLOCK_SIZE": spec.block_size,
        "HEAD_SIZE": spec.head_size,
        "HEAD_PAD": tiles.head_pad,
        "GROUP": spec.num_queries_per_kv,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_KV": tile.keys,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def is_interpreted() -> bool:
    """Returns whether Triton's interpreter runs the kernels on a CPU, as TRITON_INTERPRET=1 makes it (tests)."""
    return not isinstance(kernels.chunk_kernel, triton.JITFunction)


def _refusal_of_interpreter(spec: AttentionSpec) -> str | None:
    if spec.dtype is not torch.float32:
        return f"Triton's interpreter does not multiply {spec.dtype} (TRITON_INTERPRET=1 is set); use 'torch_flash'"
    return None


def _refusal_of_gpu(spec: AttentionSpec) -> str | None:
    reason = refusal_of_gpu(spec.device)
    alternative = "'torch_sdpa'" if spec.device.type == "cuda" else "'torch_flash', the same algorithm"
    return None if reason is None else f"it {reason}; use {alternative}"
