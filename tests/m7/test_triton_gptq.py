"""The GPTQ kernel `triton` without a GPU: interpreted, and compiled for GPUs that are not here (R7.26).

Milestone: M7. Run as a program with TRITON_INTERPRET=1, this file is the process that interprets (see
tests/m4/triton_interpreter.py): the functions under "the cases" are its own. What only a GPU can show is at the end.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from folovllm.gptq_config import BITS, GPTQConfig
from folovllm.model_executor.layers.quantization.gptq import GPTQQuantization
from folovllm.model_executor.layers.quantization.kernels import KernelOptions
from folovllm.model_executor.layers.quantization.packing import Packing
from folovllm.model_executor.layers.quantization.quantized_linear import QuantizedLinear
from folovllm.model_executor.layers.quantization.select import get_kernel
from folovllm.sim.kernel_cost import GPTQShape, gptq_operation

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from folovllm.model_executor.layers.quantization import triton_gptq
from folovllm.model_executor.layers.quantization.triton_gptq import pack_weight
from tests.m4 import triton_interpreter
from tests.m7.quant_helpers import make_quantizable, quantize, random_layer
from tests.m7.test_gptq_linear import INPUT, LAYERS
from tests.script_loader import load_script
from tests.triton_helpers import (
    CAPABILITIES,
    MATRIX_UNITS,
    check_candidate,
    check_fits,
    compile_kernel,
    counted,
    loop_instructions,
    matrix_units,
)

pytestmark = pytest.mark.m7

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What one rounding can lose. The interpreter cuts bf16's digits off instead of rounding: twice as much.
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
INTERPRETED_BF16 = 2.0**-7


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in double, one input longer: the bias is the weight of a 1."""
    x, weight = x.double(), weight.double()
    return (
        (x, weight) if bias is None else (F.pad(x, (0, 1), value=1.0), torch.cat([weight, bias.double()[:, None]], 1))
    )


def assert_close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Within fp32's rounding of every product and every sum, and one rounding of the result."""
    x, weight = with_bias(x, weight, bias)
    exact = x @ weight.T
    # A matrix unit cuts digits off where an adder rounds.
    step = 2.0**-22 if got.is_cuda else 2.0**-24
    lost = (x.shape[1] + 4) * step * (x.abs() @ weight.abs().T)
    unit = INTERPRETED_BF16 if got.dtype is torch.bfloat16 and not got.is_cuda else UNITS[got.dtype]
    assert got.shape == exact.shape
    excess = (got.double() - exact).abs() - (unit * exact.abs() + lost)
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} of {excess.numel()} numbers are off, by {excess.max():.3}"


# --- the cases: only the interpreting process calls these -------------------------------------------------------------


def product(
    bits: int = 4, group_size: int = 32, sym: bool = False, desc_act: bool = False, inputs: int = 96, outputs: int = 72,
    rows: int = 1, dtype: str = "fp32", programs: int = 8, bias: bool = False, mistake: str = "none",
) -> int:  # fmt: skip
    """One multiplication, against the dequantised weights. Returns the number of parts of the inputs."""
    config = GPTQConfig(bits, group_size, sym=sym, desc_act=desc_act)
    linear = random_layer(config, inputs, outputs)
    if sym:
        linear = dataclasses.replace(linear, zeros=torch.full_like(linear.zeros, 2 ** (bits - 1)))
    x = some(rows, inputs).to(DTYPES[dtype])
    b = some(outputs, seed=1).to(x.dtype) if bias else None
    weight = MISTAKES[mistake](pack_weight(linear, bits))
    got = triton_gptq.multiply(x, weight, b, programs)
    assert_close(got, x, linear.dequantize(), b)
    return num_parts(weight, rows, x.dtype, programs)


def num_parts(weight: triton_gptq.TritonWeight, rows: int, dtype: torch.dtype, programs: int) -> int:
    tiles = triton_gptq.tile_sizes(rows, weight.group_size, dtype)
    blocks = -(-weight.words.shape[1] // tiles.outputs) * -(-rows // tiles.rows)
    return -(-weight.num_inputs // triton_gptq.inputs_per_part(blocks, weight.num_inputs, tiles.inputs, programs))


def cost(rows: int, programs: int, outputs: int = 200, bits: int = 4, bias: bool = True) -> int:
    """One multiplication, counted load by load, against the cost model. Returns the number of kernels."""
    linear = random_layer(GPTQConfig(bits, 64, sym=False), 192, outputs)
    weight = pack_weight(linear, bits)
    tiles = triton_gptq.tile_sizes(rows, weight.group_size, torch.float16)
    num_blocks = -(-outputs // tiles.outputs) * -(-rows // tiles.rows)
    part_size = triton_gptq.inputs_per_part(num_blocks, weight.num_inputs, tiles.inputs, programs)
    shape = GPTQShape(weight.num_inputs, outputs, bits, weight.group_size, bias=bias)
    with counted() as works:
        triton_gptq.multiply(some(rows, 192).half(), weight, some(outputs).half() if bias else None, programs)
    expected = gptq_operation(shape, rows, tiles, part_size).kernels
    assert works == expected, f"counted {works}, the model says {expected}"
    return len(works)


MISTAKES: dict[str, Any] = {
    "none": lambda weight: weight,
    "zeros of v1 as they are stored": lambda weight: dataclasses.replace(weight, zeros=weight.zeros - 1),
    "inputs as they come": lambda weight: dataclasses.replace(weight, order=weight.order.sort().values),
    "scales of another group": lambda weight: dataclasses.replace(weight, scales=weight.scales.roll(1, 0)),
    "one level": lambda weight: dataclasses.replace(weight, words=weight.words ^ F.pad(torch.ones(1, 1).int(), (
        0, weight.words.shape[1] - 1, weight.words.shape[0] - 1, 0))),
}  # fmt: skip


def any_groups(rows: int) -> None:
    """g_idx as none of our tools writes it: groups of 1, 7, none and 56 inputs."""
    g_idx = torch.tensor([0] + [1] * 7 + [3] * 56)[torch.randperm(64, generator=torch.Generator().manual_seed(3))]
    base = random_layer(GPTQConfig(4, 16, sym=False), 64, 40)
    linear = QuantizedLinear(base.levels, base.scales, base.zeros, g_idx.int())
    x = some(rows, 64)
    assert_close(triton_gptq.multiply(x, pack_weight(linear, 4), None, 8), x, linear.dequantize())


def whole_numbers(dtype: str, rows: int, programs: int) -> None:
    """No weight is rounded: scales of 257 / 256, which bf16 does not have, times whole numbers, are exact."""
    linear = random_layer(GPTQConfig(8, 32, sym=False), 96, 64)
    linear = dataclasses.replace(linear, scales=torch.full_like(linear.scales, 257 / 256))
    x = torch.randint(-8, 9, (rows, 96), generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    got = triton_gptq.multiply(x, pack_weight(linear, 8), None, programs)
    exact = x.double() @ linear.dequantize().double().T
    if dtype != "fp32":  # what is stored is rounded, or cut off
        assert not torch.equal(got.double(), x.double() @ linear.dequantize().to(x.dtype).double().T)
        assert ((got.double() - exact).abs() <= INTERPRETED_BF16 * exact.abs()).all()
    else:
        assert torch.equal(got.double(), exact)


def strided_rows() -> None:
    """x as a slice of something wider."""
    linear = random_layer(GPTQConfig(4, 32), 64, 32)
    for rows in (1, 3):
        x = some(rows, 160)[:, 32:96]
        assert_close(triton_gptq.multiply(x, pack_weight(linear, 4), None, 8), x, linear.dequantize())


def layer(kind: str, desc_act: bool, one_order: bool, dtype: str) -> int:
    """A layer of the model, loaded and multiplied. Returns the number of multiplications."""
    make, sizes = LAYERS[kind]
    config, options = GPTQConfig(4, 32, sym=False, desc_act=desc_act), KernelOptions(DTYPES[dtype])
    made = make(bias=True, quant_config=GPTQQuantization(config, "triton", options), prefix="x")
    parts = [random_layer(config, INPUT, size, seed) for seed, size in enumerate(sizes.values())]
    if one_order:
        parts = [dataclasses.replace(part, g_idx=parts[0].g_idx) for part in parts]
    for shard_id, part in zip(sizes, parts, strict=True):
        for name, tensor in part.pack(config).items():
            getattr(made, name).weight_loader(getattr(made, name), tensor, shard_id)
    made.bias.data = some(sum(sizes.values()), seed=9).to(options.dtype)
    made.quant_method.process_weights_after_loading(made)
    assert made.qweight is None and made.scales is None  # what was loaded is not kept beside what is used
    weight = torch.cat([part.dequantize() for part in parts])
    for rows in (1, 5):
        x = some(rows, INPUT).to(options.dtype)
        assert_close(made(x), x, weight, made.bias.detach())
    return len(made.triton_parts)


def engine(folder: str) -> None:
    """The engine on these kernels: the tokens of `generate_naive` on the dequantised weights, in chunks and batches."""
    from folovllm.model_executor import model_loader
    from tests.parity_helpers import GapNaiveModel, make_engine, make_job, run_jobs

    naive = GapNaiveModel(Path(folder))
    jobs = [make_job(naive, length, 2, seed) for seed, length in enumerate((9, 3))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_gptq, "_INTERPRETED_PROGRAMS", 1)  # fewer take less time
        patch.setattr(model_loader, "choose_kernel", lambda *args: "triton")
        llm = make_engine(
            Path(folder), max_model_len=32, quantization="auto", linear_backend="torch",
            enable_chunked_prefill=True, max_num_batched_tokens=7,
        )  # fmt: skip
    model: Any = llm.engine_core.executor.worker.model_runner.model  # type: ignore[attr-defined]
    assert len(model.model.layers[0].self_attn.qkv_proj.triton_parts) == 1
    assert run_jobs(llm, jobs, late=1) == [job.tokens for job in jobs]


def refusals() -> list[str | None]:
    options = [KernelOptions(torch.bfloat16), KernelOptions(torch.float64), KernelOptions(device="cuda")]
    return [triton_gptq.triton_refusal(each) for each in options]


# --- under the interpreter --------------------------------------------------------------------------------------------


class Interpreter(triton_interpreter.Interpreter):
    """Answers with the cases of this file."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.m7.test_triton_gptq"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )  # fmt: skip


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size, desc_act", [(32, False), (64, True), (-1, False), (40, True)])
@pytest.mark.parametrize("rows", [1, 5])
def test_it_is_the_linear_of_the_dequantised_weights(
    interpreter: Interpreter, bits: int, group_size: int, desc_act: bool, rows: int
) -> None:
    """Any levels and zeros; 96 inputs leave a ragged last group of 32 or 16. 96 outputs are a block and a half."""
    dtype = list(DTYPES)[(bits + rows + group_size) % 3]
    interpreter.call(
        "product", bits=bits, group_size=group_size, desc_act=desc_act, rows=rows, outputs=96, dtype=dtype, bias=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 9, 15, 16, 17, 33])
def test_every_number_of_rows(interpreter: Interpreter, dtype: str, rows: int) -> None:
    """Around a tile of 16 and beyond: both kernels, full and ragged blocks of rows."""
    interpreter.call("product", rows=rows, dtype=dtype, desc_act=rows % 2 == 0)


@pytest.mark.parametrize("inputs, group_size", [(8, 32), (72, 32), (104, -1), (16, 8), (200, 48)])
@pytest.mark.parametrize("rows", [1, 3])
def test_groups_that_do_not_fill_tiles(interpreter: Interpreter, inputs: int, group_size: int, rows: int) -> None:
    interpreter.call("product", inputs=inputs, group_size=group_size, rows=rows, sym=True)


@pytest.mark.parametrize("rows", [1, 4])
def test_groups_of_any_number_of_inputs(interpreter: Interpreter, rows: int) -> None:
    interpreter.call("any_groups", rows=rows)


@pytest.mark.parametrize("rows, programs, parts", [(1, 1, 1), (1, 4, 2), (1, 6, 3), (1, 99, 6), (7, 6, 3), (17, 99, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_cut_into_parts(interpreter: Interpreter, rows: int, programs: int, parts: int, bias: bool) -> None:
    """Two blocks of outputs and 6 tiles of inputs; a bias is added by one part only."""
    case = {"inputs": 192, "rows": rows, "programs": programs, "bias": bias, "dtype": "fp16"}
    assert interpreter.call("product", **case) == parts


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rows, programs", [(1, 1), (1, 99), (5, 1), (5, 99)])
def test_no_weight_is_rounded(interpreter: Interpreter, dtype: str, rows: int, programs: int) -> None:
    interpreter.call("whole_numbers", dtype=dtype, rows=rows, programs=programs)


@pytest.mark.parametrize("rows, programs, kernels", [(1, 1, 1), (1, 99, 2), (5, 1, 1), (17, 99, 2), (80, 1, 1)])
def test_the_cost_model_names_what_the_kernels_move(
    interpreter: Interpreter, rows: int, programs: int, kernels: int
) -> None:
    """Both kernels, alone and in parts, with blocks of rows and of outputs that are not full."""
    assert (
        interpreter.call("cost", rows=rows, programs=programs, bits=8 if rows == 5 else 4, bias=rows != 17) == kernels
    )


def test_rows_of_something_wider(interpreter: Interpreter) -> None:
    interpreter.call("strided_rows")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("desc_act, one_order", [(False, True), (True, True), (True, False)])
def test_layers(interpreter: Interpreter, kind: str, desc_act: bool, one_order: bool) -> None:
    """Fused layers are one multiplication if the groups of their parts agree, and right if they do not."""
    got = interpreter.call("layer", kind=kind, desc_act=desc_act, one_order=one_order, dtype="bf16")
    assert got == (1 if one_order else len(LAYERS[kind][1]))


def test_the_engine_runs_on_it(interpreter: Interpreter, tmp_path: Path) -> None:
    folder = quantize(make_quantizable("Qwen2", tmp_path / "plain"), tmp_path / "gptq", desc_act=True)
    interpreter.call("engine", folder=str(folder))


@pytest.mark.parametrize("mistake", [name for name in MISTAKES if name != "none"])
@pytest.mark.parametrize("rows", [1, 2])
def test_mistakes_are_found(interpreter: Interpreter, mistake: str, rows: int) -> None:
    with pytest.raises(AssertionError, match="numbers are off"):
        interpreter.call("product", desc_act=True, rows=rows, mistake=mistake)


def test_who_may_be_interpreted(interpreter: Interpreter) -> None:
    bf16, double, cuda = interpreter.call("refusals")
    assert bf16 is None and "not float64" in double and "is interpreted on a CPU" in cuda


# --- what they multiply with ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_act_order_the_words_are_the_file_s(bits: int) -> None:
    config = GPTQConfig(bits, 32)
    linear = random_layer(config, 96, 32)
    weight = pack_weight(linear, bits)
    assert torch.equal(weight.words, linear.pack(config)["qweight"])
    assert weight.order is None and weight.group_size == 32 and weight.scales.dtype is torch.float16


def test_act_order_ends_at_load() -> None:
    """The weights of a layer whose inputs were shuffled are, sorted, those of the layer that was not."""
    plain = random_layer(GPTQConfig(4, 32), 96, 32)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(plain, levels=plain.levels[:, order], g_idx=plain.g_idx[order])
    weight = pack_weight(shuffled, 4)
    assert weight.order is not None and weight.group_size == 32
    assert torch.equal(shuffled.g_idx[weight.order], plain.g_idx)  # groups one after the other
    resorted = pack_weight(dataclasses.replace(plain, levels=shuffled.levels[:, weight.order]), 4)
    assert torch.equal(weight.words, resorted.words)


def test_groups_are_filled_up_with_zeros() -> None:
    """The example of `pack_weight`, with tiles of 32: groups of 2 and of 1 input."""
    base = random_layer(GPTQConfig(4, 2, sym=False), 4, 8)
    linear = QuantizedLinear(base.levels[:, :3], base.scales, base.zeros, torch.tensor([1, 0, 0]).int())
    weight = pack_weight(linear, 4)
    assert weight.group_size == 32 and weight.num_inputs == 64 and weight.order is not None
    assert weight.order[[0, 1, 32]].tolist() == [1, 2, 0]
    levels = Packing(weight.bits).unpack_rows(weight.words)
    assert torch.equal(levels[:2], linear.levels.t()[[1, 2]]) and torch.equal(levels[32], linear.levels[:, 0])
    assert torch.equal(levels[2:32].int(), linear.zeros[:1].expand(30, -1))
    assert torch.equal(levels[33:].int(), linear.zeros[1:].expand(31, -1))


def test_three_bits_are_kept_in_four() -> None:
    linear = random_layer(GPTQConfig(3, 32), 64, 32)
    weight = pack_weight(linear, 3)
    assert weight.bits == 4 and torch.equal(Packing(weight.bits).unpack_rows(weight.words), linear.levels.t())


def test_scales_beyond_fp16_stay_fp32() -> None:
    linear = random_layer(GPTQConfig(4, 32), 64, 32)
    large = dataclasses.replace(linear, scales=linear.scales * 2.0**20)  # a checkpoint in bf16 has such
    assert torch.equal(pack_weight(large, 4).scales, large.scales)


def test_bytes() -> None:
    """4 bits in groups of 64: scales take 2 bytes and zeros 1 for 32 bytes of levels."""
    weight = pack_weight(random_layer(GPTQConfig(4, 64), 256, 64), 4)
    assert weight.words.nbytes + weight.scales.nbytes + weight.zeros.nbytes == 256 * 64 // 2 * 35 // 32


def test_how_the_work_is_cut() -> None:
    assert triton_gptq.inputs_per_part(9, 640, 32, 27) == 224
    assert triton_gptq.inputs_per_part(1000, 640, 32, 27) == 640  # enough blocks: one part
    assert triton_gptq.inputs_per_part(1, 640, 32, 1000) == 32  # no more parts than tiles
    for rows in (1, 2, 16, 17, 4096):
        for group_size in (32, 64, 96, 128, 576, 4096):
            for dtype in DTYPES.values():
                tiles = triton_gptq.tile_sizes(rows, group_size, dtype)
                assert group_size % tiles.inputs == 0 and tiles.inputs >= triton_gptq.SMALLEST_TILE


# --- who may run it ---------------------------------------------------------------------------------------------------


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"triton runs on an NVIDIA GPU, not on cpu; use gptq_kernel='auto'"):
        get_kernel("triton", GPTQConfig(4))
    bf16 = KernelOptions(torch.bfloat16, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in str(triton_gptq.triton_refusal(bf16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((7, 5), "(Ampere) or later, this GPU has 7.5"), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        got = triton_gptq.triton_refusal(bf16)
        assert got is None if reason is None else reason in str(got)


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, triton_gptq.__name__)
    with pytest.raises(ValueError, match=r"Triton is not installed .*pip install triton.*gptq_kernel='dequant'"):
        get_kernel("triton", GPTQConfig(4), KernelOptions(device="cuda"))


# --- compiled, not run ------------------------------------------------------------------------------------------------

KERNELS = (("gemv_kernel", 1), ("tile_kernel", 16), ("tile_kernel", 64), ("merge_kernel", 1))  # and rows of x
CHECKPOINTS = [(torch.bfloat16, 4, 64), (torch.float16, 8, 128), (torch.bfloat16, 2, 32), (torch.float32, 4, 64)]


def compile_gptq(name: str, dtype: torch.dtype, bits: int, tiles: triton_gptq.Tiles, capability: int) -> Any:
    """As `multiply` launches it."""
    kernel = getattr(triton_gptq, name)
    arguments: dict[str, Any] = {"BLOCK": 1024} | triton_gptq.launch_arguments(bits, dtype, tiles)
    options = {option: arguments.pop(option) for option in ("num_warps", "num_stages") if option in arguments}
    constants = {arg: value for arg, value in arguments.items() if arg in kernel.arg_names}
    if bits == 8 and "bias_ptr" in kernel.arg_names:
        constants["bias_ptr"] = None
    types = {"words_ptr": "*i32", "zeros_ptr": "*u8", "scales_ptr": "*fp16", "parts_ptr": "*fp32"}
    unaligned = ("num_rows", "num_parts")
    return compile_kernel(kernel, types, constants, dtype, capability, unaligned, **options)


def check_checkpoint(
    dtype: torch.dtype, bits: int, group_size: int, capability: int, folder: Path, patch: pytest.MonkeyPatch
) -> None:
    """Compiles the kernels to machine code and asks what they take; matrix units in half precision only."""
    import triton

    patch.setattr(triton.knobs.cache, "dir", str(folder))
    for name, rows in KERNELS:
        compiled = compile_gptq(name, dtype, bits, triton_gptq.tile_sizes(rows, group_size, dtype), capability)
        check_fits(f"{name}, {rows} rows, {dtype}, {bits} bits", compiled, capability, folder)
        multiplies = name == "tile_kernel" and dtype is not torch.float32
        assert matrix_units(compiled) == ({MATRIX_UNITS[capability if rows >= 64 else 80]} if multiplies else set())


@pytest.mark.parametrize(
    "checkpoint, capability",
    [(CHECKPOINTS[0], 90), (CHECKPOINTS[0], 100), (CHECKPOINTS[1], 86), (CHECKPOINTS[3], 80)],
    ids=str,
)
def test_it_compiles(
    checkpoint: tuple[torch.dtype, int, int], capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_checkpoint(*checkpoint, capability, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=str)
def test_every_checkpoint_compiles_for_every_gpu(
    checkpoint: tuple[torch.dtype, int, int], capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_checkpoint(*checkpoint, capability, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_every_candidate_compiles(rows: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that scripts/dev/gpu_tiles.py tries on 4 bits in groups of 128, on GPUs with much shared memory."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    name = "gemv_kernel" if rows == 1 else "tile_kernel"
    for tiles in load_script("gpu_tiles").gptq_candidates(rows, 128, torch.bfloat16):
        compiled = compile_gptq(name, torch.bfloat16, 4, tiles, capability)
        check_candidate(f"{name}, {tiles}", compiled, capability, tmp_path, most_spilled=8)


def test_how_many_instructions_a_weight_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of gemv_kernel unpacks and multiplies; docs/dev/gpu_status.md says what that costs."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    tiles = triton_gptq.tile_sizes(1, 128, torch.bfloat16)
    compiled = compile_gptq("gemv_kernel", torch.bfloat16, 4, tiles, 90)
    weights = tiles.inputs * tiles.outputs // (32 * tiles.num_warps)  # of one thread
    per_weight = loop_instructions(compiled, tmp_path) / weights
    print(f"{per_weight:.1f} instructions per weight")
    assert per_weight <= 7.5


# --- on a GPU ---------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_gpu)])
SIZES = [(576, 1536, 64), (4096, 4096, 128), (2048, 264, 32), (1056, 1000, -1), (1000, 136, 96)]
GPU_ROWS = (1, 2, 15, 16, 17, 64, 65, 300)


@gpu
@pytest.mark.parametrize("inputs, outputs, group_size", SIZES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_it_is_dequant(device: str, dtype: str, bits: int, inputs: int, outputs: int, group_size: int) -> None:
    """Every block size is compiled and run: within rounding of the exact result, and the same bits when run again."""
    inputs, outputs = inputs // 16 * 16, outputs // 16 * 16  # 2 bits fill words in sixteens
    linear = random_layer(GPTQConfig(bits, group_size, sym=False, desc_act=bits == 4), inputs, outputs)
    moved = QuantizedLinear(*(getattr(linear, f.name).to(device) for f in dataclasses.fields(linear)))
    # As trained weights have it, a product is of the size of its inputs: fp16 would overflow.
    moved = dataclasses.replace(moved, scales=(moved.scales / 2**bits / 32).half().float())
    weight, bias = pack_weight(moved, bits), some(outputs, seed=1).to(device, DTYPES[dtype])
    for rows in GPU_ROWS:
        x = some(rows, inputs, seed=rows).to(device, DTYPES[dtype])
        got = triton_gptq.multiply(x, weight, bias, 500)
        assert_close(got, x, moved.dequantize(), bias)
        assert torch.equal(triton_gptq.multiply(x, weight, bias, 500), got)


@gpu
def test_on_a_gpu_the_engine_gives_the_tokens_of_the_cpu(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from folovllm import LLM
    from folovllm.model_executor import model_loader
    from tests.parity_helpers import GapNaiveModel, make_job

    folder = quantize(make_quantizable("Qwen2", tmp_path / "plain"), tmp_path / "gptq", desc_act=True)
    naive = GapNaiveModel(folder)
    jobs = [make_job(naive, length, 12, seed) for seed, length in enumerate((1, 9, 30))]
    monkeypatch.setattr(model_loader, "choose_kernel", lambda *args: "triton")
    llm = LLM(str(folder), device=device, dtype="float32", max_model_len=64, num_kv_blocks=64, quantization="auto")
    outputs = llm.generate([{"prompt_token_ids": job.prompt_token_ids} for job in jobs], [job.params for job in jobs])
    assert [list(output.outputs[0].token_ids) for output in outputs] == [job.tokens for job in jobs]


if __name__ == "__main__":
    vars(triton_interpreter).update(globals())  # `serve` looks the cases up among its own names
    triton_interpreter.serve()
