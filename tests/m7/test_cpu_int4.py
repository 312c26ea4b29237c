"""`cpu_int4` gives what the dequantised weights give, within what fp32 sums lose (R7.19 to R7.22)."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from folovllm.csrc.build import compiled_for, load_ops
from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.cpu import int4_crossover, int4_kernel
from folovllm.model_executor.cpu.int4_crossover import find_crossover, largest_winner
from folovllm.model_executor.cpu.int4_kernel import gate_int4
from folovllm.model_executor.cpu.int4_weight import Int4Part, Int4Weight, input_order, pack_int4, split_groups
from folovllm.model_executor.layers.linear import QKVParallelLinear
from folovllm.model_executor.layers.quantization import select
from folovllm.model_executor.layers.quantization.gptq import GPTQQuantization
from folovllm.model_executor.layers.quantization.kernels import KernelOptions
from folovllm.model_executor.layers.quantization.quantized_linear import QuantizedLinear
from folovllm.model_executor.layers.quantization.select import choose_kernel, get_kernel
from tests.m7.quant_helpers import random_layer
from tests.m7.test_gptq_linear import INPUT, LAYERS

pytestmark = pytest.mark.m7

NONE = torch.empty(0)
BF16 = torch.bfloat16
ROWS = (1, 2, 3, 5, 8, 9, 97)  # around a tile of 8 and a panel of 96


@pytest.fixture(scope="module", autouse=True)
def needs_kernels() -> None:
    if load_ops() is None:
        pytest.skip("no C++ kernels here")


def pack(linear: QuantizedLinear, bits: int, ops: Any = None) -> Int4Weight:
    return pack_int4(linear, bits, ops or load_ops())


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Within fp32's rounding of every product and sum, level and zero apart, and one rounding of the result.

    In bf16, x is rounded as well: by up to 1/32,768 of the largest of its group (csrc/int4_kernel.h).
    """
    exact = x.double() @ weight.double().T
    largest = x.double().abs().amax(-1, True)
    lost = 2.0**-23 * x.shape[-1] * largest * (weight.double().abs() + 31).amax(-1)
    if got.dtype is BF16:
        lost += 2.0**-15 * largest * weight.double().abs().sum(-1)
    unit = 2.0**-8 if got.dtype is BF16 else 2.0**-23
    assert ((got.double() - exact).abs() <= unit * exact.abs() + lost).all()


# ---- The operator


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("bits,group_size", [(4, 32), (4, 64), (4, -1), (4, 40), (3, 32), (2, 48)])
@pytest.mark.parametrize("desc_act", [False, True])
def test_int4_is_the_linear_of_the_dequantised_weights(
    ops: Any, dtype: torch.dtype, bits: int, group_size: int, desc_act: bool
) -> None:
    """Any levels and zeros, sizes of part of a block, of several and of part of a group."""
    config = GPTQConfig(bits, group_size, sym=False, desc_act=desc_act)
    for inputs, outputs in ((32, 32), (96, 32 + 64), (160, 128)):
        linear = random_layer(config, inputs, outputs)
        weight = pack(linear, bits, ops)
        for rows in ROWS:
            x = some(rows, inputs).to(dtype)
            got = ops.linear_int4(x, *weight.tensors, NONE, outputs)
            assert_close(got, x, linear.dequantize())


def test_every_output_count(ops: Any) -> None:
    """8 to 72 outputs: 4 bits are packed in eights, blocks are of 32."""
    for outputs in range(8, 80, 8):
        linear = random_layer(GPTQConfig(4, 32), 64, outputs)
        x = some(3, 64).to(BF16)
        got = ops.linear_int4(x, *pack(linear, 4).tensors, NONE, outputs)
        assert got.shape == (3, outputs)
        assert_close(got, x, linear.dequantize())


def test_whole_numbers_are_exact(ops: Any) -> None:
    """No weight is rounded to bf16: scales of 257 / 256, which bf16 does not have, times whole numbers."""
    linear = random_layer(GPTQConfig(4, 32), 64, 32)
    linear = QuantizedLinear(linear.levels, torch.full_like(linear.scales, 257 / 256), linear.zeros, linear.g_idx)
    x = torch.randint(-8, 9, (5, 64), generator=torch.Generator().manual_seed(1)).float()
    exact = x.double() @ linear.dequantize().double().T
    assert torch.equal(ops.linear_int4(x, *pack(linear, 4).tensors, NONE, 32).double(), exact)
    got = ops.linear_int4(x.bfloat16(), *pack(linear, 4).tensors, NONE, 32)
    assert torch.equal(got, exact.bfloat16())


def test_symmetric_weights_keep_no_zeros() -> None:
    config = GPTQConfig(3, 32)
    linear = random_layer(config, 64, 32)
    assert pack(linear, 3).zeros.numel() > 0
    middle = QuantizedLinear(linear.levels, linear.scales, torch.full_like(linear.zeros, 4), linear.g_idx)
    assert pack(middle, 3).zeros.numel() == 0


def test_groups_of_any_number_of_inputs(ops: Any) -> None:
    """A g_idx that FoloVLLM never writes: groups of 1, 7, none and 24 inputs."""
    g_idx = torch.tensor([0] + [1] * 7 + [3] * 24)[torch.randperm(32, generator=torch.Generator().manual_seed(3))]
    base = random_layer(GPTQConfig(4, 8, sym=False), 32, 40)
    linear = QuantizedLinear(base.levels, base.scales, base.zeros, g_idx.int())
    x = some(4, 32)
    assert_close(ops.linear_int4(x, *pack(linear, 4).tensors, NONE, 40), x, linear.dequantize())


def test_where_each_level_lies(ops: Any) -> None:
    """csrc/int4_layout.h read back byte by byte. The order is act-order's; the last block and group are not full."""
    config = GPTQConfig(4, 24, desc_act=True)
    linear = random_layer(config, 64, 40)
    order = input_order(linear.g_idx, 3)  # [3 groups, 24 places]
    packed = ops.pack_int4(linear.levels.t().contiguous(), order, 0)
    assert packed.shape == (2, 3, 6, 64)
    for output in (0, 5, 15, 16, 31, 32, 39):
        for place in range(3 * 24):
            group, chunk, i = place // 24, place % 24 // 4, place % 4
            byte = int(packed[output // 32, group, chunk, output % 16 * 4 + i])
            level = byte >> 4 if output % 32 >= 16 else byte & 15
            source = int(order.flatten()[place])
            assert level == (int(linear.levels[output, source]) if source >= 0 else 8)


@pytest.mark.parametrize("bits,group_size,desc_act", [(4, 32, False), (4, 24, True), (3, -1, False), (2, 64, True)])
@pytest.mark.parametrize("sym", [True, False])
def test_bf16_of_4_bits_is_bf16_of_the_weights(ops: Any, bits: int, group_size: int, desc_act: bool, sym: bool) -> None:
    linear = random_layer(GPTQConfig(bits, group_size, sym=sym, desc_act=desc_act), 160, 72 if bits == 4 else 96)
    if sym:
        zeros = torch.full_like(linear.zeros, 2 ** (bits - 1))
        linear = QuantizedLinear(linear.levels, linear.scales, zeros, linear.g_idx)
    expected = ops.pack_weight(linear.dequantize().bfloat16())
    assert torch.equal(ops.int4_to_bf16(*pack(linear, bits, ops).tensors, 160), expected)


def test_long_groups_are_split() -> None:
    """x is rounded by the largest of its group, and sums must fit 32 bits."""
    for inputs, shape in ((576, (6, 24)), (1536, (12, 32)), (128, (1, 32)), (1004, (8, 32))):
        packed = pack(random_layer(GPTQConfig(4, -1), inputs, 32) if inputs % 8 == 0 else wide(inputs), 4)
        assert packed.levels.shape[1:3] == shape
        assert (packed.perm.numel() == 0) == (inputs != 1004)
    assert split_groups(torch.arange(12, dtype=torch.int32).view(1, 12), 2).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, -1, -1, -1, -1]
    ]  # fmt: skip


def wide(inputs: int) -> QuantizedLinear:
    full = random_layer(GPTQConfig(4, -1), inputs + 4, 32)
    return QuantizedLinear(full.levels[:, :inputs], full.scales, full.zeros, full.g_idx[:inputs])


# ---- x as integers


def test_bf16_inputs_near_the_largest_are_exact(ops: Any) -> None:
    """8 significant bits fit into 15 below the largest's, down to 1/128 of it: nothing but fp32's sums is rounded."""
    x = (torch.randint(128, 256, (9, 64)) * 2.0 ** torch.randint(-6, 1, (9, 64)) * 2.0**-20).bfloat16()
    x[:, ::3] *= -1
    x[:, 0] = 255 * 2.0**-20 * 0.5  # not the one number that is not: all 8 bits set, in the largest's place
    x = x.clamp(-254 * 2.0**-20, 254 * 2.0**-20)
    linear = random_layer(GPTQConfig(4, 64, sym=False), 64, 32)
    linear = QuantizedLinear(linear.levels, torch.ones_like(linear.scales), linear.zeros, linear.g_idx)
    got = ops.linear_int4(x, *pack(linear, 4).tensors, NONE, 32)
    assert torch.equal(got, (x.double() @ linear.dequantize().double().T).float().bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_is_not_hidden(ops: Any, bad: float) -> None:
    x = some(3, 64).to(BF16)
    x[1, 40] = bad
    linear = random_layer(GPTQConfig(4, 32), 64, 32)
    got = ops.linear_int4(x, *pack(linear, 4).tensors, NONE, 32)
    assert not got[1].isfinite().any() and got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 2.0**-133, 2.0**-120, 1e30])
def test_inputs_of_any_size(ops: Any, scale: float) -> None:
    x = (some(2, 64) * scale).to(BF16)
    linear = random_layer(GPTQConfig(4, 32), 64, 32)
    got = ops.linear_int4(x, *pack(linear, 4).tensors, NONE, 32)
    exact = x.double() @ linear.dequantize().double().T
    assert ((got.double() - exact).abs() <= 2.0**-7 * exact.abs() + 2e-4 * scale + 1e-35).all()


def test_input_order() -> None:
    assert input_order(torch.tensor([1, 0, 0, 1, 0]), 2).tolist() == [[1, 2, 4, -1], [0, 3, -1, -1]]
    in_order = pack(random_layer(GPTQConfig(4, 32), 96, 32), 4)
    assert in_order.perm.numel() == 0  # nothing to do per call without act-order


def test_what_does_not_fit_is_refused(ops: Any) -> None:
    weight = pack(random_layer(GPTQConfig(4, 32, desc_act=True), 64, 32), 4)
    plain = pack(random_layer(GPTQConfig(4, 32), 64, 32), 4)
    for x, tensors, outputs, message in (
        (some(2, 60), plain.tensors, 32, "does not fit levels"),
        (some(2, 60), weight.tensors, 32, "perm is beyond x"),
        (some(2, 64), plain.tensors, 64, "64 outputs do not fit"),
        (some(2, 64).double(), plain.tensors, 32, "knows float32 and bfloat16"),
        (some(2, 64), [plain.levels, plain.scales[:, :1], *plain.tensors[2:]], 32, "scales must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.linear_int4(x, *tensors, NONE, outputs)


# ---- Layers


def loaded(kind: str, config: GPTQConfig, options: KernelOptions, bias: bool = False, one_order: bool = True) -> Any:
    """A layer on cpu_int4, and the weight it stands for; with `one_order` its parts have the same g_idx."""
    make, sizes = LAYERS[kind]
    layer = make(bias=bias, quant_config=GPTQQuantization(config, "cpu_int4", options), prefix="x")
    parts = [random_layer(config, INPUT, size, seed) for seed, size in enumerate(sizes.values())]
    if one_order:
        parts = [QuantizedLinear(p.levels, p.scales, p.zeros, parts[0].g_idx) for p in parts]
    for shard_id, part in zip(sizes, parts, strict=True):
        for name, tensor in part.pack(config).items():
            getattr(layer, name).weight_loader(getattr(layer, name), tensor, shard_id)
    if layer.bias is not None:
        layer.bias.data = some(sum(sizes.values()), seed=9).to(options.dtype)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, torch.cat([part.dequantize() for part in parts])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("desc_act,one_order", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_layers(isa: str, kind: str, desc_act: bool, one_order: bool, dtype: torch.dtype) -> None:
    """Fused layers are one multiplication if the groups of their parts agree, and right if they do not."""
    config = GPTQConfig(4, 32, sym=False, desc_act=desc_act)
    layer, weight = loaded(kind, config, KernelOptions(dtype, runtime="memory", cpu_isa=isa), True, one_order)
    assert len(layer.int4_parts) == (1 if one_order else len(layer.output_parts()))
    x = some(5, INPUT).to(dtype)
    with_bias = torch.cat([weight, layer.bias.detach().float()[:, None]], dim=1)
    assert_close(layer(x), torch.cat([x, torch.ones(5, 1, dtype=dtype)], dim=1), with_bias)
    assert layer.qweight is None and layer.scales is None  # what was loaded is not kept beside what is used


@pytest.mark.parametrize("runtime", ["memory", "speed"])
def test_gated(isa: str, ops: Any, runtime: str) -> None:
    layer, weight = loaded(
        "merged", GPTQConfig(4, 32, sym=False, desc_act=True), KernelOptions(BF16, "cpu", runtime, cpu_isa=isa)
    )
    assert gate_int4(layer) is None and layer.quant_method.gated
    part = layer.int4_parts[0]
    for rows in ROWS:
        x = some(rows, INPUT).to(BF16)
        gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
        got = ops.linear_int4(x, *part.weight.tensors, part.bias, 64, True).double()
        exact = F.silu(gate) * up
        moved = 2.0**-15 * x.double().abs().amax(-1, True) * weight.double().abs().sum(-1).amax()  # as in assert_close
        allowed = 2.0**-8 * exact.abs() + (1e-4 + moved) * (1 + gate.abs() + up.abs())
        assert ((got - exact).abs() <= allowed).all()
        assert torch.equal(layer(x).double(), got)


def test_a_bias_is_not_gated() -> None:
    layer, _ = loaded("merged", GPTQConfig(4, 32), KernelOptions(runtime="memory"), bias=True)
    assert gate_int4(layer) == "gate and up have a bias" and not layer.quant_method.gated


# ---- gptq_runtime


def test_runtimes_agree(isa: str, ops: Any) -> None:
    """`speed` takes 4 bits up to its crossover, bit for bit as `memory`, and packed bf16 beyond."""
    if "avx512_bf16" not in compiled_for(ops):
        pytest.skip("keeps no bf16 here")
    config = GPTQConfig(4, 32, desc_act=False)
    memory, weight = loaded("qkv", config, KernelOptions(BF16, runtime="memory", cpu_isa=isa), bias=True)
    speed, _ = loaded("qkv", config, KernelOptions(BF16, runtime="speed", cpu_isa=isa), bias=True)
    speed.quant_method.kernel.max_int4_rows = 4
    few, many = some(4, INPUT).to(BF16), some(5, INPUT).to(BF16)
    assert torch.equal(memory(few), speed(few))
    packed = ops.linear_packed(many, speed.int4_parts[0].packed, speed.int4_parts[0].bias, 128)
    assert torch.equal(speed(many), packed)
    assert not torch.equal(memory(many), packed)  # weights rounded to bf16 are others
    rounding = 2.0**-8 * (many.double().abs() @ weight.double().abs().T) + 2.0**-6
    assert ((memory(many).double() - speed(many).double()).abs() <= rounding).all()


def test_memory_of_each_runtime(isa: str, ops: Any) -> None:
    """Groups of 64, symmetric: at least 70 % less than bf16 (R7.20). `speed` has the bf16 as well."""
    config = GPTQConfig(4, 64)
    sizes = {}
    for runtime in ("memory", "speed"):
        quantization = GPTQQuantization(config, "cpu_int4", KernelOptions(BF16, runtime=runtime, cpu_isa=isa))
        layer: Any = QKVParallelLinear(576, 64, 9, 3, quant_config=quantization, prefix="x")
        linear = random_layer(config, 576, 192)
        middle = QuantizedLinear(linear.levels, linear.scales, torch.full_like(linear.zeros, 8), linear.g_idx)
        for shard_id, copies in (("q", 3), ("k", 1), ("v", 1)):
            part = QuantizedLinear(
                middle.levels.repeat(copies, 1), middle.scales.repeat(1, copies), middle.zeros.repeat(1, copies),
                middle.g_idx,
            )  # fmt: skip
            for name, tensor in part.pack(config).items():
                getattr(layer, name).weight_loader(getattr(layer, name), tensor, shard_id)
        layer.quant_method.process_weights_after_loading(layer)
        assert not list(layer.parameters())
        sizes[runtime] = sum(t.nbytes for part in layer.int4_parts for t in part.tensors.values())
    bf16 = 2 * 576 * 960
    assert sizes["memory"] <= 0.3 * bf16
    assert sizes["speed"] == sizes["memory"] + (bf16 if "avx512_bf16" in compiled_for(ops) else 0)


def test_auto_keeps_bf16_only_where_memory_allows(isa: str, ops: Any) -> None:
    options = KernelOptions(BF16, cpu_isa=isa)
    kernel: Any = get_kernel("cpu_int4", GPTQConfig(4), options)
    kernel.plan(1000)
    assert kernel.keeps_bf16 == ("avx512_bf16" in compiled_for(ops))  # elsewhere 4 bits are faster for any batch
    kernel.plan(10**15)
    assert not kernel.keeps_bf16
    speed = dataclasses.replace(options, runtime="speed")
    if "avx512_bf16" in compiled_for(ops):
        with pytest.raises(ValueError, match=r"speed' keeps bf16 copies .* GiB are free: use gptq_runtime='memory'"):
            get_kernel("cpu_int4", GPTQConfig(4), speed).plan(10**15)
    get_kernel("cpu_int4", GPTQConfig(4), dataclasses.replace(options, runtime="memory")).plan(10**15)
    in_fp32: Any = get_kernel("cpu_int4", GPTQConfig(4), dataclasses.replace(speed, dtype=torch.float32))
    assert not in_fp32.keeps_bf16


def with_both(ops: Any) -> Int4Part:
    """A multiplication that has 4 bits and bf16."""
    layer, _ = loaded("qkv", GPTQConfig(4, 32), KernelOptions(BF16, runtime="memory"))
    return dataclasses.replace(layer.int4_parts[0], packed=ops.pack_weight(some(128, INPUT).to(BF16)))


def test_crossover_is_measured_once(ops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_winner(lambda rows: rows <= 8) == 8
    assert largest_winner(lambda rows: rows not in (2, 16, 24)) == 12  # one loss may be chance
    assert largest_winner(lambda rows: rows == 64) == 0
    assert largest_winner(lambda rows: True) == 64
    assert largest_winner(lambda rows: False) == 0
    part = with_both(ops)
    cache = tmp_path / "cache" / "crossover.json"
    first = find_crossover(ops, [(part, INPUT)], cache)
    assert first in (0, *int4_crossover.ROWS) and list(json.loads(cache.read_text()).values()) == [first]
    monkeypatch.setattr(int4_crossover, "largest_winner", lambda wins: pytest.fail("measured again"))
    assert find_crossover(ops, [(part, INPUT)], cache) == first


def test_a_busy_machine_gets_a_guess(ops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring must not hold up a start; the next start measures again."""
    monkeypatch.setattr(int4_crossover, "_MAX_SECONDS", 0.0)
    assert find_crossover(ops, [(with_both(ops), INPUT)], tmp_path / "c.json") == int4_crossover.GUESS
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"a": "b"}', "{"])
def test_a_damaged_cache_is_measured_again(ops: Any, text: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(int4_crossover, "largest_winner", lambda wins: 4)
    file = tmp_path / "crossover.json"
    file.write_text(text)
    one = torch.empty(1)
    part = Int4Part(Int4Weight(one, one, one, one, 1), one, one, 1)
    assert find_crossover(ops, [(part, 1)], file) == 4
    assert find_crossover(ops, [(part, 1)], tmp_path) == 4  # a folder: neither read nor written


# ---- Which kernel


@pytest.mark.parametrize(
    "config,options,message",
    [
        (GPTQConfig(8), KernelOptions(), "holds up to 4 bits, not 8; use gptq_kernel='auto' or 'dequant'"),
        (GPTQConfig(4), KernelOptions(torch.float16), "float32 and bfloat16, not float16"),
        (GPTQConfig(4), KernelOptions(device="cuda"), "runs on a CPU, not on cuda"),
    ],
)
def test_refusals(config: GPTQConfig, options: KernelOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_kernel("cpu_int4", config, options)
    with pytest.warns(UserWarning, match="are dequantised while they are loaded, as cpu_int4 .*'memory' keeps"):
        assert choose_kernel(config, options, "auto") is None
    assert choose_kernel(config, dataclasses.replace(options, runtime="memory"), "auto") == "dequant"


def test_auto() -> None:
    assert choose_kernel(GPTQConfig(4), KernelOptions(), "auto") == "cpu_int4"
    assert choose_kernel(GPTQConfig(4), KernelOptions(), "torch") == "dequant"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, which load_ops gives; then the weights are dequantised. Asked for by name, cpu_int4 says why not."""
    monkeypatch.setattr(select, "load_ops", lambda isa: None)
    monkeypatch.setattr(int4_kernel, "load_ops", lambda isa: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_kernel(GPTQConfig(4), KernelOptions(), "auto") is None
    with pytest.raises(ValueError, match=r"needs the C\+\+ kernels, which were not built .*; use gptq_kernel='auto'"):
        get_kernel("cpu_int4", GPTQConfig(4))
