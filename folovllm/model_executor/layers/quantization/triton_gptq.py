"""The GPTQ kernel `triton`, for GPUs: weights stay packed in memory and are unpacked by the program that multiplies.

Milestone: M7. vLLM counterparts: vllm/model_executor/layers/quantization/awq_triton.py and, for speed, gptq_marlin in
CUDA. Left out: tile sizes found by measuring, unpacking two weights with one instruction. Sources: Frantar et al. 2022
(GPTQ, which multiplies packed matrices with a vector), Tillet et al. 2019 (Triton). How to read a kernel: the beginning
of attention/ops/triton_attention.py.

    y[m, n] = sum over k of  x[m, k] * scale[g, n] * (level[k, n] - zero[g, n])        g: the group of input k

**What is saved.** One token multiplies with every weight once, so a GPU spends its time on fetching them, and 4 bits
are a quarter of bf16's. To unpack them into memory first, as `dequant` does, costs more than plain weights would: they
are written, and read again.

**Where the scale goes.** Inputs are cut into tiles that end where groups end, so the scale comes out of the sum:

    acc[m, n] += scale[g, n] * (sum over the tile of x[m, k] * (level[k, n] - zero[g, n]))

and what the matrix unit multiplies is a small whole number, which bf16 holds exactly. No weight is ever rounded.

**How the work is cut.** A program has a block of rows, a block of outputs, and of the inputs all tiles or a part:

                       BLOCK_N outputs
                       +-----------+
    part 0    BLOCK_K  |   words   |  and for each tile      1 row       `gemv_kernel`: no matrix unit, which would
              inputs   +-----------+  a row of scales,                   multiply 15 rows of zeros
                       |   words   |  a row of zeros         up to 16    `tile_kernel`, 16 rows: 64 operations per
                       +-----------+                                     byte where a GPU can do 150, so memory is
    part 1             |   words   |                                     still what it waits for
                       +-----------+                         more        `tile_kernel`, 64 rows: a weight is
                       |   words   |                                     unpacked once for all of them
                       +-----------+

A GPU wants several hundred programs. Where blocks make fewer, the inputs are cut, too (split-K), and `merge_kernel`
adds the parts. Nothing is added with atomics: the order of additions would change from run to run, and the answer with
it. It does depend on the number of rows, which decides about the cuts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.cpu.int4_weight import input_order
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.quantization.kernels import GPTQKernel, KernelOptions
from folovllm.model_executor.layers.quantization.packing import Packing
from folovllm.model_executor.layers.quantization.quantized_linear import LEAVES, QuantizedLinear
from folovllm.platforms import refusal_of_gpu
from folovllm.utils import cdiv

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        f"Triton is not installed ({error}); it comes with the CUDA builds of torch on Linux, or install it with "
        f"`pip install triton`; use gptq_kernel='dequant'"
    ) from error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_TILE = 32  # inputs; groups are filled up to a multiple, so that no tile has inputs of two groups
PROGRAMS_PER_PROCESSOR = 4  # as one waits for memory, others compute
_INTERPRETED_PROGRAMS = 8
_MERGE_BLOCK = 1024
MAGIC = tl.constexpr(0x4B000000)  # the bits of 2^23 as an fp32 number, whose last digit is worth 1


# --- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def load_weights(
    words_ptr: tl.tensor,  # [num_inputs * BITS / 32, num_outputs] int32
    scales_ptr: tl.tensor,  # [num_groups, num_outputs]
    zeros_ptr: tl.tensor,  # [num_groups, num_outputs] uint8
    start: tl.tensor,  # the tile's first input
    outputs: tl.tensor,  # [BLOCK_N]
    num_outputs: tl.tensor,
    group_size: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """A tile of level - zero [BLOCK_K, BLOCK_N] int32, and its scales [BLOCK_N] fp32.

    A word holds inputs that follow each other, the first one lowest. E.g. 4 bits, BLOCK_K 32: 4 words per output, and

        words [4, BLOCK_N] --one axis more--> [4, 8, BLOCK_N] >> 0, 4, ..., 28 --two axes as one--> [32, BLOCK_N]

    What has to go from one thread to another, as the compiler sees fit, are words: an eighth of the levels.
    """
    exists = outputs < num_outputs  # [BLOCK_N]
    group_offsets = (start // group_size) * num_outputs + outputs  # [BLOCK_N]
    scales = tl.load(scales_ptr + group_offsets, mask=exists, other=0.0).to(tl.float32)
    zeros = tl.load(zeros_ptr + group_offsets, mask=exists, other=0).to(tl.int32)

    per_word: tl.constexpr = 32 // BITS
    word_rows = start // per_word + tl.arange(0, BLOCK_K // per_word)
    word_offsets = word_rows[:, None] * num_outputs + outputs[None, :]
    words = tl.load(words_ptr + word_offsets, mask=exists[None, :], other=0)  # [BLOCK_K / per_word, BLOCK_N]
    shifts = tl.arange(0, per_word) * BITS
    # The sign bit of a word is copied in from the left; what is kept are the BITS on the right.
    levels = (words[:, None, :] >> shifts[None, :, None]) & (2**BITS - 1)  # [BLOCK_K / per_word, per_word, BLOCK_N]
    return tl.reshape(levels, [BLOCK_K, BLOCK_N]) - zeros[None, :], scales


@triton.jit
def first_sum(
    bias_ptr: tl.tensor,  # [num_outputs], or None
    outputs: tl.tensor,  # [BLOCK_N]
    num_outputs: tl.tensor,
    part: tl.tensor,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Where a sum begins, [BLOCK_N] fp32: at the bias in part 0, as only one of the parts may add it, else at 0."""
    first = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:  # known when the kernel is compiled: without a bias nothing is left of this
        first += tl.load(bias_ptr + outputs, mask=(outputs < num_outputs) & (part == 0), other=0.0)
    return first


@triton.jit
def gemv_kernel(
    out_ptr: tl.tensor,  # [num_parts, 1, num_outputs], contiguous
    x_ptr: tl.tensor,  # [1, num_inputs]
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
    group_size: tl.tensor,
    part_size: tl.tensor,  # inputs per part, a multiple of BLOCK_K
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """One row times BLOCK_N outputs, over one part of the inputs. Grid: (blocks of outputs, num_parts).

    Every word holds several inputs of one output, and the thread that has loaded it takes it apart: nothing goes from
    one thread to another in the loop. Each thread keeps sums of its own, of the places it has in every tile, and they
    are added up once, at the end. Words are asked for STAGES - 1 tiles ahead; for a loop with tl.dot the compiler does
    that unasked, as far ahead as the launch's option num_stages says.

    With 4 bits, a GPU fetches a weight in the time of a few instructions, so the loop must not have many: shift, mask,
    subtract, multiply and add. None converts a level to fp32, and none scales it. Or-ed into the bits of 2^23 (MAGIC),
    a level is the float 2^23 + level, from which 2^23 + zero is subtracted without rounding. The scale multiplies the
    sum of a tile.
    """
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    exists = outputs < num_outputs  # [BLOCK_N]
    part = tl.program_id(1)
    per_word: tl.constexpr = 32 // BITS
    word_rows = tl.arange(0, BLOCK_K // per_word)  # [BLOCK_K / per_word]
    sums = tl.zeros([BLOCK_K // per_word, BLOCK_N], tl.float32)
    for start in tl.range(part * part_size, tl.minimum((part + 1) * part_size, num_inputs), BLOCK_K, num_stages=STAGES):
        word_offsets = (start // per_word + word_rows)[:, None] * num_outputs + outputs[None, :]
        words = tl.load(words_ptr + word_offsets, mask=exists[None, :], other=0)  # [BLOCK_K / per_word, BLOCK_N]
        group_offsets = (start // group_size) * num_outputs + outputs  # [BLOCK_N]
        scales = tl.load(scales_ptr + group_offsets, mask=exists, other=0.0).to(tl.float32)
        zeros = tl.load(zeros_ptr + group_offsets, mask=exists, other=0)
        magic_zeros = (zeros.to(tl.int32) | MAGIC).to(tl.float32, bitcast=True)  # [BLOCK_N] 2^23 + zero
        tile = tl.zeros([BLOCK_K // per_word, BLOCK_N], tl.float32)
        for i in tl.static_range(per_word):
            x = tl.load(x_ptr + start + word_rows * per_word + i).to(tl.float32)  # [BLOCK_K / per_word]
            levels = (words >> (i * BITS)) & (2**BITS - 1) | MAGIC  # the sign bit is copied in, and masked away
            tile += x[:, None] * (levels.to(tl.float32, bitcast=True) - magic_zeros[None, :])
        sums += tile * scales[None, :]
    out = tl.sum(sums, axis=0) + first_sum(bias_ptr, outputs, num_outputs, part, BLOCK_N)  # [BLOCK_N]
    tl.store(out_ptr + part * num_outputs + outputs, out.to(out_ptr.dtype.element_ty), mask=exists)


@triton.jit
def tile_kernel(
    out_ptr: tl.tensor,  # [num_parts, num_rows, num_outputs], contiguous
    x_ptr: tl.tensor,  # [num_rows, num_inputs]
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
    group_size: tl.tensor,
    part_size: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    BITS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """BLOCK_M rows times BLOCK_N outputs, over a part of the inputs. Grid: (blocks of outputs, of rows, num_parts)."""
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]; long batches need 64 bits
    part = tl.program_id(2)
    bias = first_sum(bias_ptr, outputs, num_outputs, part, BLOCK_N)  # [BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + bias[None, :]
    for start in range(part * part_size, tl.minimum((part + 1) * part_size, num_inputs), BLOCK_K):
        x_offsets = rows[:, None] * x_stride + start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + x_offsets, mask=rows[:, None] < num_rows, other=0.0)  # [BLOCK_M, BLOCK_K]
        weights, scales = load_weights(
            words_ptr, scales_ptr, zeros_ptr, start, outputs, num_outputs, group_size, BITS, BLOCK_N, BLOCK_K
        )
        # "ieee": in fp32 a GPU would otherwise multiply in TF32, with 10 bits of mantissa.
        dot = tl.dot(x.to(DOT_DTYPE), weights.to(DOT_DTYPE), input_precision="ieee")  # [BLOCK_M, BLOCK_N] fp32
        acc += dot * scales[None, :]
    out_offsets = (part * num_rows + rows)[:, None] * num_outputs + outputs[None, :]
    mask = (rows[:, None] < num_rows) & (outputs[None, :] < num_outputs)
    tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge_kernel(
    out_ptr: tl.tensor,  # [size]
    parts_ptr: tl.tensor,  # [num_parts, size] fp32
    size: tl.tensor,
    num_parts: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Add the parts, the first one first; rounded once, after that. Grid: (blocks of numbers,)."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    acc = tl.zeros([BLOCK], tl.float32)
    for part in range(num_parts):
        acc += tl.load(parts_ptr + part * size + places, mask=places < size, other=0.0)
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=places < size)


# --- what they multiply with ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TritonWeight:
    """A layer's weights, sorted by group. Where that changes nothing, `words` is the qweight of the file.

    The kernels count on contiguous tensors.
    """

    words: torch.Tensor  # [num_inputs * bits / 32, output_size] int32
    scales: torch.Tensor  # [num_groups, output_size] fp16, or fp32 if fp16 cannot hold them
    zeros: torch.Tensor  # [num_groups, output_size] uint8
    order: torch.Tensor | None  # [num_inputs] which input comes at each place; None: as they come
    bits: int  # 2, 4 or 8
    group_size: int  # places per group, a multiple of SMALLEST_TILE

    @property
    def num_inputs(self) -> int:
        """Places, rather: more than the layer has inputs if groups had to be filled up."""
        return self.group_size * len(self.scales)


def pack_weight(linear: QuantizedLinear, bits: int) -> TritonWeight:
    """From levels of 2, 3, 4 or 8 bits. Three are kept in four: then no level lies across two words.

    Act-order ends here: sorted by group, inputs of a group are neighbours again, and no kernel asks for g_idx. A place
    that a group has left over gets the level that stands for 0, and any input. E.g. g_idx [1, 0, 0], tiles of 2:
    order [1, 2, 0, any].
    """
    stored_bits = 4 if bits == 3 else bits
    num_groups, device = len(linear.scales), linear.levels.device
    order = input_order(linear.g_idx.cpu(), num_groups).to(device)  # [num_groups, places]
    order = F.pad(order, (0, -order.shape[1] % SMALLEST_TILE), value=-1).long()
    zeros = linear.zeros.to(torch.uint8).contiguous()  # [num_groups, output_size]
    levels = linear.levels.t()[order.clamp(min=0)]  # [num_groups, places, output_size]
    levels = torch.where(order[:, :, None] < 0, zeros[:, None], levels)
    in_order = torch.equal(order.flatten(), torch.arange(linear.g_idx.numel(), device=device))
    scales = linear.scales.contiguous()
    half = scales.half()
    return TritonWeight(
        words=Packing(stored_bits).pack_rows(levels.flatten(0, 1)),
        scales=half if torch.equal(half.float(), scales) else scales,
        zeros=zeros,
        order=None if in_order else order.flatten().clamp(min=0),
        bits=stored_bits,
        group_size=order.shape[1],
    )


# --- launching them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks that a program computes with; all are powers of two."""

    rows: int  # 1: gemv_kernel
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int = 3  # tiles of inputs on the chip: while one is computed, the next ones are fetched


def tile_sizes(num_rows: int, group_size: int, dtype: torch.dtype) -> Tiles:
    """Blocks that fit into registers (tests/m7/test_triton_gptq.py asks the compiler).

    Only a GPU can tell which are fastest: scripts/dev/gpu_tiles.py measures them.
    """
    power = group_size & -group_size  # the largest power of two that divides it
    if num_rows == 1:
        return Tiles(rows=1, outputs=64, inputs=min(power, 128), num_warps=4)
    inputs = min(power, 64)
    if dtype is torch.float32:  # no matrix unit, so more rows per block gain little and take registers
        return Tiles(rows=16, outputs=64, inputs=32, num_warps=4)
    if num_rows <= 16:
        return Tiles(rows=16, outputs=64, inputs=inputs, num_warps=4)
    return Tiles(rows=64, outputs=128, inputs=inputs, num_warps=8)


def inputs_per_part(num_blocks: int, num_inputs: int, tile: int, num_programs: int) -> int:
    """So that about `num_programs` have something to do. E.g. 9 blocks, 640 inputs in tiles of 32, 27 programs -> 224.

    That makes three parts: 20 tiles are 7, 7 and 6.
    """
    num_tiles = num_inputs // tile
    num_parts = max(1, min(num_tiles, num_programs // num_blocks))
    return cdiv(num_tiles, num_parts) * tile


def multiply(
    x: torch.Tensor, weight: TritonWeight, bias: torch.Tensor | None, num_programs: int, tiles: Tiles | None = None
) -> torch.Tensor:
    """x [num_rows, input_size] -> [num_rows, output_size]. `tiles`: others than `tile_sizes`, for measurements."""
    if weight.order is not None:
        x = x.index_select(1, weight.order)  # [num_rows, num_inputs]; once, rather than in every program
    assert x.stride(1) == 1 and x.shape[1] == weight.num_inputs
    num_rows, num_outputs = x.shape[0], weight.words.shape[1]
    tiles = tiles or tile_sizes(num_rows, weight.group_size, x.dtype)
    blocks = (triton.cdiv(num_outputs, tiles.outputs), triton.cdiv(num_rows, tiles.rows))
    part_size = inputs_per_part(blocks[0] * blocks[1], weight.num_inputs, tiles.inputs, num_programs)
    num_parts = triton.cdiv(weight.num_inputs, part_size)

    out = x.new_empty(num_rows, num_outputs)
    # Parts stay in fp32: they are rounded once, after they are added.
    parts = out if num_parts == 1 else x.new_empty(num_parts, num_rows, num_outputs, dtype=torch.float32)
    tensors = (parts, x, weight.words, weight.scales, weight.zeros, bias)
    sizes = (weight.num_inputs, num_outputs, weight.group_size, part_size)
    arguments = launch_arguments(weight.bits, x.dtype, tiles)
    if tiles.rows == 1:
        gemv_kernel[(blocks[0], num_parts)](*tensors, *sizes, **arguments)
    else:
        tile_kernel[(*blocks, num_parts)](*tensors, *sizes, num_rows, x.stride(0), **arguments)
    if num_parts > 1:
        merge_kernel[(triton.cdiv(out.numel(), _MERGE_BLOCK),)](out, parts, out.numel(), num_parts, BLOCK=_MERGE_BLOCK)
    return out


def launch_arguments(bits: int, dtype: torch.dtype, tiles: Tiles) -> dict[str, Any]:
    """What the kernel for these tiles is compiled for; `num_warps` and `num_stages` are options of the compiler."""
    shape = {"BITS": bits, "BLOCK_N": tiles.outputs, "BLOCK_K": tiles.inputs, "num_warps": tiles.num_warps}
    if tiles.rows == 1:
        return shape | {"STAGES": tiles.num_stages}
    return shape | {"DOT_DTYPE": dot_dtype(dtype), "BLOCK_M": tiles.rows, "num_stages": tiles.num_stages}


class TritonGPTQKernel(GPTQKernel):
    """One multiplication per layer, or several where the parts of a fused layer have inputs in different groups."""

    def __init__(self, config: GPTQConfig, options: KernelOptions) -> None:
        super().__init__(config, options)
        reason = triton_refusal(options)
        if reason is not None:
            raise ValueError(f"triton {reason}; use gptq_kernel='auto' or 'dequant'")
        self.num_programs = _INTERPRETED_PROGRAMS
        if not is_interpreted():
            processors = torch.cuda.get_device_properties(options.device).multi_processor_count
            self.num_programs = PROGRAMS_PER_PROCESSOR * processors

    def process(self, layer: LinearBase) -> None:
        merged = self.merged_parts(layer)
        layer.triton_parts = [pack_weight(part, self.config.bits) for part in merged]  # type: ignore[assignment]
        for name in LEAVES:
            layer.register_parameter(name, None)

    def apply(self, layer: LinearBase, x: torch.Tensor) -> torch.Tensor:
        parts: list[TritonWeight] = layer.triton_parts  # type: ignore[assignment]
        sizes = [part.words.shape[1] for part in parts]
        biases = [None] * len(parts) if layer.bias is None else layer.bias.split(sizes)
        outputs = [multiply(x, part, bias, self.num_programs) for part, bias in zip(parts, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU: TRITON_INTERPRET=1 when they were imported (tests)."""
    return not isinstance(tile_kernel, triton.JITFunction)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What a matrix unit multiplies x and weights in. The interpreter cannot multiply bf16; its products fit fp32."""
    if dtype is torch.bfloat16 and is_interpreted():
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def triton_refusal(options: KernelOptions) -> str | None:
    """Why the kernels cannot run here, or None. Any checkpoint will do."""
    if options.dtype not in DTYPES:
        return f"computes in float32, bfloat16 and float16, not {str(options.dtype).removeprefix('torch.')}"
    if is_interpreted():
        return None if options.device == "cpu" else "is interpreted on a CPU (TRITON_INTERPRET is set)"
    return refusal_of_gpu(torch.device(options.device))
