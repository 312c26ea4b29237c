"""What our GPU kernels read, write and compute, and the least that any kernel for the same result must.

Milestones: M4 (attention/ops/triton_attention.py) and M7 (quantization/triton_gptq.py). vLLM counterpart: none.
This module imports no torch. So the sizes of the tiles, which the backends choose, are arguments.

Two amounts of work are kept apart:

    does    bytes that the loads and stores of all programs name, and operations of the products that they compute.
            Idle rows of a tile, zeros that fill up a head and everything that is read again are included. Caches are
            not: a second read of the same bytes is often served by the L2 cache, so `does.bytes` is more than what
            comes from memory. tests/m4/test_triton_paged.py and tests/m7/test_triton_gptq.py count the loads and stores
            in Triton's interpreter and demand these numbers.
    least   every input is read once, every output is written once, and nothing is computed in vain.

    floor = max(least bytes / bandwidth, least FLOPs / peak)

No kernel can be faster than its floor on that GPU, if its inputs are not in a cache already. The floor leaves out what
a real kernel pays as well: the launch, exp and sums, the instructions that unpack weights, block tables, and the wait
for the first bytes. The peak is that of the matrix units, also for `gemv_kernel`, which does not use them.

The launches are counted apart (`step_launches`), since the host makes them while the GPU computes. A step takes at
least the longer of the two times: that of the floor, and that of the launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from folovllm.hf_config import ModelArchitecture
from folovllm.sim.cost import COMPUTE, MEMORY, kv_bytes, layer_weights, step_flops, visible_pairs
from folovllm.sim.hardware import Hardware
from folovllm.utils import cdiv

_INT32, _INT64, _FP32 = 4, 8, 4  # bytes

# Kernels and copies that the host launches in a greedy decode step on `triton_paged` with torch >= 2.9, which has one
# kernel for RMSNorm (https://github.com/pytorch/pytorch/pull/153666). tests/m4/test_gpu_floor.py counts them.
LAYER_LAUNCHES = 16  # per layer, each linear layer being one kernel
QK_NORM_LAUNCHES = 3  # more per layer of a model that normalises queries and keys
STEP_LAUNCHES = 17  # copies to the GPU and back, embedding, last norm, output head, sampling
# An estimate of the host's time per launch, not measured by us. Others report 9 us for a kernel of Triton's on a GB200
# (https://github.com/vllm-project/vllm/pull/34838) and 11 (https://github.com/meta-pytorch/tritonbench/pull/1002).
LAUNCH_SECONDS = (5e-6, 15e-6)


@dataclass(frozen=True)
class Work:
    """An amount of work. `flops` are those of matrix products: 2 for each product of two numbers."""

    read: float = 0  # bytes
    written: float = 0  # bytes
    flops: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.read + other.read, self.written + other.written, self.flops + other.flops)

    def __mul__(self, times: int) -> "Work":
        return Work(self.read * times, self.written * times, self.flops * times)

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def seconds(self, hardware: Hardware) -> float:
        """Returns how long the work takes if arithmetic and memory run at their peaks at the same time."""
        return max(self.bytes / hardware.bandwidth, self.flops / hardware.flops)

    def bound(self, hardware: Hardware) -> str:
        """Returns which of the two takes longer."""
        return COMPUTE if self.flops > self.bytes * hardware.knee else MEMORY


@dataclass(frozen=True)
class Operation:
    """One or two kernels that are launched after each other for one result."""

    kernels: dict[str, Work]  # what each of them does, by name
    least: Work

    @property
    def does(self) -> Work:
        return sum(self.kernels.values(), Work())

    def floor(self, hardware: Hardware) -> float:
        """Returns the seconds below which no kernel for this result can get, if its inputs are in no cache."""
        return self.least.seconds(hardware)


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    """One layer's heads."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype_bytes: int = 2

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def head_bytes(self) -> int:
        return self.head_size * self.dtype_bytes


class AttentionTile(Protocol):
    """`Tile` there."""

    @property
    def rows(self) -> int: ...
    @property
    def keys(self) -> int: ...


class AttentionTiles(Protocol):
    """What the model must know of `Tiles` in attention/backends/triton_paged.py."""

    @property
    def head_pad(self) -> int: ...
    @property
    def chunk(self) -> AttentionTile: ...
    @property
    def single(self) -> AttentionTile: ...
    @property
    def split_kv(self) -> int: ...


def attention_operation(shape: AttentionShape, requests: Sequence[tuple[int, int]], tiles: AttentionTiles) -> Operation:
    """Attention of one layer for requests (computed, new): `new` tokens behind `computed` others.

    Requests with one new token go through `single_kernel` and `merge_kernel`, the others through `chunk_kernel`.
    """
    chunks = [(computed, new) for computed, new in requests if new > 1]
    seq_lens = [computed + 1 for computed, new in requests if new == 1]
    kernels = {}
    if chunks:
        kernels["chunk_kernel"] = sum((_chunk(shape, tiles, *chunk) for chunk in chunks), Work()) * shape.num_kv_heads
    if seq_lens:
        kernels["single_kernel"] = _singles(shape, tiles, seq_lens) * shape.num_kv_heads
        kernels["merge_kernel"] = _merges(shape, seq_lens, tiles.split_kv) * shape.num_heads
    return Operation(kernels, _least_attention(shape, requests))


def _least_attention(shape: AttentionShape, requests: Sequence[tuple[int, int]]) -> Work:
    """Q, K and V are read once, and the output is written; no score beyond the diagonal is computed."""
    num_keys = sum(computed + new for computed, new in requests)
    queries = sum(new for _, new in requests) * shape.num_heads * shape.head_bytes
    keys = 2 * num_keys * shape.num_kv_heads * shape.head_bytes
    pairs = sum(visible_pairs(computed, new) for computed, new in requests)
    return Work(queries + keys, queries, 4 * pairs * shape.num_heads * shape.head_size)


def _chunk(shape: AttentionShape, tiles: AttentionTiles, computed: int, new: int) -> Work:
    """`chunk_kernel` for one request and one KV head. A row of tiles ends at its last query: what is above is skipped.

    E.g. 6 new tokens behind 100, 4 to a tile: the programs read 104 and 106 keys.
    """
    per_tile = tiles.chunk.rows // shape.group
    lists = Work(5 * _INT32)  # (request, first token), where the request starts and ends, its length
    total = Work()
    for first in range(0, new, per_tile):
        tokens = min(per_tile, new - first)
        queries = tokens * shape.group * shape.head_bytes
        keys = _row_of_tiles(shape, tiles.head_pad, tiles.chunk, computed + first + tokens)
        total += lists + Work(queries, queries) + keys
    return total


def _row_of_tiles(shape: AttentionShape, head_pad: int, tile: AttentionTile, num_keys: int) -> Work:
    """`attend_tiles`: K and V of the keys, found through the block table. The last tile is computed as if it were full.

    Two products, of queries with keys and of weights with values; a head is filled up to `head_pad`.
    """
    padded_keys = cdiv(num_keys, tile.keys) * tile.keys
    return Work(num_keys * (_INT32 + 2 * shape.head_bytes), 0, 2 * 2 * tile.rows * padded_keys * head_pad)


def _singles(shape: AttentionShape, tiles: AttentionTiles, seq_lens: Sequence[int]) -> Work:
    """`single_kernel` for one KV head: each request has as many programs as the longest one, and some find no keys."""
    programs = len(seq_lens) * cdiv(max(seq_lens), tiles.split_kv)
    total = Work(2 * _INT32) * programs  # which request, and its length
    part = Work(_INT32 + shape.group * shape.head_bytes, shape.group * (shape.head_size + 1) * _FP32)  # out and lse
    for seq_len in seq_lens:
        for first in range(0, seq_len, tiles.split_kv):
            num_keys = min(tiles.split_kv, seq_len - first)
            total += part + _row_of_tiles(shape, tiles.head_pad, tiles.single, num_keys)
    return total


def _merges(shape: AttentionShape, seq_lens: Sequence[int], split_kv: int) -> Work:
    """`merge_kernel` for one head: the parts, which `single_kernel` has written in fp32, are read again."""
    parts = sum(cdiv(seq_len, split_kv) for seq_len in seq_lens)
    once = Work(3 * _INT32, shape.head_bytes) * len(seq_lens)  # which request, its length and place; the output
    return once + Work(parts * (shape.head_size + 1) * _FP32)


def write_operation(shape: AttentionShape, num_tokens: int) -> Operation:
    """`write_kernel`: K and V of the new tokens are read and stored in their slots. It is the least possible."""
    rows = 2 * shape.num_kv_heads * shape.head_bytes
    work = Work(_INT64 + rows, rows) * num_tokens
    return Operation({"write_kernel": work}, work)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTQShape:
    """A linear layer's packed weights. `inputs` counts the places of its groups, as `TritonWeight.num_inputs` does."""

    inputs: int
    outputs: int
    bits: int = 4
    group_size: int = 128
    dtype_bytes: int = 2  # of x, of the bias and of the result
    scale_bytes: int = 2
    bias: bool = False

    @property
    def word_bytes(self) -> int:
        return self.inputs * self.outputs * self.bits // 8

    @property
    def group_bytes(self) -> int:
        """Of one row of scales and zeros, which all outputs of a group of inputs have."""
        return self.outputs * (self.scale_bytes + 1)

    @property
    def bias_bytes(self) -> int:
        return self.outputs * self.dtype_bytes * self.bias


class GPTQTiles(Protocol):
    """What the model must know of `Tiles` in model_executor/layers/quantization/triton_gptq.py."""

    @property
    def rows(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...


def gptq_operation(shape: GPTQShape, rows: int, tiles: GPTQTiles, part_size: int) -> Operation:
    """`multiply` of triton_gptq.py: rows of x times the packed weights, whose inputs are cut into parts of `part_size`.

    Each block of rows reads the weights again, each tile of inputs a row of scales and zeros, and each block of outputs
    its rows of x.
    """
    row_blocks, output_blocks = cdiv(rows, tiles.rows), cdiv(shape.outputs, tiles.outputs)
    num_parts = cdiv(shape.inputs, part_size)
    weights = shape.word_bytes + shape.inputs // tiles.inputs * shape.group_bytes + shape.bias_bytes
    x = rows * shape.inputs * shape.dtype_bytes
    result = rows * shape.outputs
    sums = num_parts * result * _FP32 if num_parts > 1 else result * shape.dtype_bytes
    flops = 2 * row_blocks * tiles.rows * output_blocks * tiles.outputs * shape.inputs
    kernel = "gemv_kernel" if tiles.rows == 1 else "tile_kernel"
    kernels = {kernel: Work(row_blocks * weights + output_blocks * x, sums, flops)}
    if num_parts > 1:
        kernels["merge_kernel"] = Work(sums, result * shape.dtype_bytes)
    return Operation(kernels, _least_gptq(shape, rows))


def _least_gptq(shape: GPTQShape, rows: int) -> Work:
    weights = shape.word_bytes + cdiv(shape.inputs, shape.group_size) * shape.group_bytes + shape.bias_bytes
    x, result = rows * shape.inputs * shape.dtype_bytes, rows * shape.outputs * shape.dtype_bytes
    return Work(weights + x, result, 2 * rows * shape.inputs * shape.outputs)


# --- a whole step -----------------------------------------------------------------------------------------------------


def linear_sizes(arch: ModelArchitecture) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one decoder layer, fused as the engine has them."""
    return {
        "qkv": (arch.hidden_size, arch.q_size + 2 * arch.kv_size),
        "o": (arch.q_size, arch.hidden_size),
        "gate_up": (arch.hidden_size, 2 * arch.intermediate_size),
        "down": (arch.intermediate_size, arch.hidden_size),
    }


def gptq_bytes_per_weight(bits: int = 4, group_size: int = 128) -> float:
    """E.g. 4 bits, groups of 128: 0.5 for the level, and 3 / 128 for the scale (2 bytes) and the zero (1)."""
    return bits / 8 + 3 / group_size


def step_work(
    arch: ModelArchitecture,
    requests: Sequence[tuple[int, int]],
    bytes_per_linear_weight: float = 2,
    dtype_bytes: int = 2,
) -> Work:
    """Returns the least work of a step of the whole model in which every request (computed, new) samples one token.

    Weights, K and V are read once, the new K and V are written, and all else stays on the chip. Of an input embedding
    that is not the head as well, only the rows of the new tokens are read.
    """
    num_tokens = sum(new for _, new in requests)
    linear = arch.num_hidden_layers * sum(inputs * outputs for inputs, outputs in linear_sizes(arch).values())
    head = arch.vocab_size * arch.hidden_size
    embedded = 0 if arch.tie_word_embeddings else num_tokens * arch.hidden_size
    others = layer_weights(arch) - linear + head + embedded  # norms and biases, too
    old_kv = kv_bytes(arch, [(computed, 0) for computed, _ in requests], dtype_bytes)
    return Work(
        read=linear * bytes_per_linear_weight + others * dtype_bytes + old_kv,
        written=kv_bytes(arch, requests, dtype_bytes) - old_kv,
        flops=step_flops(arch, requests, num_sampled=len(requests)),
    )


def step_launches(arch: ModelArchitecture, more_per_layer: int = 0) -> int:
    """Returns how many kernels and copies the host launches in a greedy decode step, whatever the number of requests.

    `more_per_layer`: those of linear layers that take more than one kernel.
    """
    per_layer = LAYER_LAUNCHES + QK_NORM_LAUNCHES * arch.qk_norm + more_per_layer
    return STEP_LAUNCHES + arch.num_hidden_layers * per_layer


def weight_bytes(arch: ModelArchitecture, bytes_per_linear_weight: float = 2, dtype_bytes: int = 2) -> float:
    """Returns the size of all weights. Embeddings, the output head and norms are not quantised."""
    linear = arch.num_hidden_layers * sum(inputs * outputs for inputs, outputs in linear_sizes(arch).values())
    return linear * bytes_per_linear_weight + (arch.num_parameters() - linear) * dtype_bytes
