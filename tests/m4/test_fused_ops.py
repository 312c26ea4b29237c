"""The C++ linears and fused layers against fp64. What puts them into a model: test_accelerate.py.

Milestone: M4. Tolerances: u = half the spacing of the dtype at 1, so a result rounded once is within u |result| of the
exact one; what the fp32 arithmetic inside may add is stated where it is used. A second rounding would break them.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from folovllm.hf_config import RopeConfig
from folovllm.model_executor.cpu.huge_pages import HugeArena
from folovllm.model_executor.cpu.packed_linear import CppLinearMethod
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding, apply_rotary
from folovllm.sample.ops.select import first_argmax

pytestmark = pytest.mark.m4

DTYPES = (torch.float32, torch.bfloat16)
U32 = 2.0**-24
UNIT = {torch.float32: U32, torch.bfloat16: 2.0**-8}
SIZES = (1, 2, 15, 16, 17, 33, 56, 72, 576)  # around the 16 lanes of a vector


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same numbers within a larger tensor of NaN, starting at an odd element: reading beside them shows."""
    around = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
    around[..., 3:-2] = x
    return around[..., 3:-2]


def assert_within(got: torch.Tensor, exact: torch.Tensor, inner: torch.Tensor | float) -> None:
    """Off by one rounding to got's dtype, and by `inner` before it."""
    assert got.shape == exact.shape
    error = (got.double() - exact).abs()
    worst = (error - UNIT[got.dtype] * (exact.abs() + inner) - inner).max()
    assert worst <= 1e-37, f"{worst.item():.3g} more than allowed, at an error of {error.max().item():.3g}"


# ---- linear.cpp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 1), (31, 2), (32, 64), (33, 63), (47, 576), (49, 17), (96, 130), (257, 100), (3072, 57)]
)
def test_linear(ops: Any, outputs: int, inputs: int, bias: bool, dtype: torch.dtype) -> None:
    """Every number of rows up to two tiles, and around a panel (96 or 48 rows). Inner error: fp32 sums of `inputs`
    terms.
    """
    weight = randn(outputs, inputs, dtype=dtype)
    b = randn(outputs, dtype=dtype) if bias else None
    packed, padded = CppLinearMethod(ops, HugeArena(2**16)).pack(weight, b)
    for rows in (0, *range(1, 26), 47, 48, 49, 61, 95, 96, 97, 109):
        x = strided(randn(rows, inputs, dtype=dtype))
        got = ops.linear_packed(x, packed, padded, outputs)
        exact = F.linear(x.double(), weight.double(), None if b is None else b.double())
        size = F.linear(x.double().abs(), weight.double().abs(), None if b is None else b.double().abs())
        if rows:
            assert_within(got, exact, (inputs + 2) * U32 * size)
        assert got.shape == (rows, outputs) and got.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_takes_any_layout(ops: Any, dtype: torch.dtype) -> None:
    weight = randn(40, 30, dtype=dtype)
    packed = ops.pack_weight(weight)
    x = randn(3, 4, 30, dtype=dtype)
    assert torch.equal(ops.pack_weight(weight.T.contiguous().T), packed)
    wanted = ops.linear_packed(x.view(12, 30), packed, None, 40)
    assert torch.equal(ops.linear_packed(x, packed, None, 40), wanted.view(3, 4, 40))
    assert torch.equal(ops.linear_packed(x.view(12, 30).T.contiguous().T, packed, None, 40), wanted)
    assert torch.equal(ops.linear_packed(x[0, 0], packed, None, 40), wanted[0])
    assert torch.equal(ops.linear_packed(x[:, 1], packed, None, 40), wanted.view(3, 4, 40)[:, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_mates(ops: Any, dtype: torch.dtype) -> None:
    """Unlike oneDNN and MKL, which pick another kernel for another number of rows: the sum of an output is always the
    same.
    """
    packed, x = ops.pack_weight(randn(100, 576, dtype=dtype)), randn(200, 576, dtype=dtype)
    together = ops.linear_packed(x, packed, None, 100)
    for rows in (1, 2, 5, 13, 49, 97):
        assert torch.equal(ops.linear_packed(x[:rows], packed, None, 100), together[:rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear_in_threads(ops: Any, threads: int) -> None:
    before = torch.get_num_threads()
    weight, x = randn(1000, 200, dtype=torch.bfloat16), randn(3, 200, dtype=torch.bfloat16)
    wanted = ops.linear_packed(x, ops.pack_weight(weight), None, 1000)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.linear_packed(x, ops.pack_weight(weight), None, 1000), wanted)
    finally:
        torch.set_num_threads(before)


def test_linear_refuses_what_does_not_fit(ops: Any) -> None:
    packed, x = ops.pack_weight(randn(40, 30, dtype=torch.bfloat16)), randn(3, 30, dtype=torch.bfloat16)
    for args in (
        (x[:, :20], packed, None, 40),
        (x, packed, None, 90),
        (x.float(), packed, None, 40),
        (x, packed, torch.zeros(40), 40),  # not padded to whole blocks
    ):
        with pytest.raises(RuntimeError, match="linear_packed"):
            ops.linear_packed(*args)


# ---- fused_ops.cpp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(ops: Any, size: int, dtype: torch.dtype) -> None:
    weight = torch.rand(size).add(0.5).to(dtype)
    for rows in (1, 3, 40):
        for x in (randn(rows, size, dtype=dtype), strided(randn(rows, size, dtype=dtype))):
            residual = randn(rows, size, dtype=dtype)
            total = residual + x
            got = ops.rms_norm(x, residual, weight, 1e-5)
            assert torch.equal(residual, total), "the running sum is rounded as torch rounds it"
            assert_within(got, exact_norm(total, weight), (size / 16 + 20) * U32 * exact_norm(total, weight).abs())
            alone = ops.rms_norm(x, None, weight, 1e-5)
            assert_within(alone, exact_norm(x, weight), (size / 16 + 20) * U32 * exact_norm(x, weight).abs())


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.double(), weight.shape, weight.double(), 1e-5)


def test_rms_norm_of_heads(ops: Any) -> None:
    """Qwen3 norms [num_tokens, heads, head_size] that are slices of a larger buffer."""
    qkv, weight = randn(5, 11, 20, dtype=torch.bfloat16), randn(20, dtype=torch.bfloat16)
    for heads in (qkv[:, :6], qkv[:, 6:9], qkv.transpose(0, 1)):
        assert torch.equal(
            ops.rms_norm(heads, None, weight, 1e-6), ops.rms_norm(heads.contiguous(), None, weight, 1e-6)
        )
        assert ops.rms_norm(heads, None, weight, 1e-6).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_silu_and_mul(ops: Any, size: int, dtype: torch.dtype) -> None:
    for rows in (1, 3, 40):
        gate_up = randn(rows, 2 * size, dtype=dtype) * 4
        exact = F.silu(gate_up[:, :size].double()) * gate_up[:, size:].double()
        for x in (gate_up, strided(gate_up), gate_up.T.contiguous().T):
            assert_within(ops.silu_and_mul(x), exact, 8 * U32 * exact.abs())


def test_silu_of_extremes(ops: Any) -> None:
    """Where e^-x overflows or vanishes: silu is 0 and x. A NaN stays one."""
    gate = torch.tensor([-3e38, -1000.0, -88.0, -0.0, 0.0, 88.0, 1000.0, 3e38, torch.nan])
    got = ops.silu_and_mul(torch.cat((gate, torch.ones(9)))[None])[0]
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 88.0, 1000.0, 3e38, torch.nan])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [2, 20, 24, 64, 80, 96, 128, 256])
def test_rotary(ops: Any, head_size: int, dtype: torch.dtype) -> None:
    table = randn(50, 2, head_size, dtype=dtype)
    for rows in (1, 3, 50):
        cos, sin = table[:rows].split(1, dim=1)  # rows of a table are strided, as RotaryEmbedding.cos_sin_at makes them
        qkv = randn(rows, 7, head_size, dtype=dtype)
        before = qkv.clone()
        qk = qkv.narrow(1, 0, 5)
        exact = apply_rotary(qk.double(), cos.double(), sin.double())
        size = apply_rotary(qk.double().abs(), cos.double().abs(), sin.double().abs())
        got = ops.rotary_(qk, cos, sin)
        assert got.data_ptr() == qkv.data_ptr() and torch.equal(qkv[:, 5:], before[:, 5:]), "in place, values untouched"
        assert_within(got, exact, 2 * U32 * size)


def test_rotary_turns_as_the_table_says(ops: Any) -> None:
    cos, sin = RotaryEmbedding(16, 600, RopeConfig(10000.0)).cos_sin_at(torch.tensor([0, 5, 599]), torch.float32)
    x = torch.randn(3, 4, 16)
    torch.testing.assert_close(ops.rotary_(x.clone(), cos, sin), apply_rotary(x, cos, sin), atol=1e-6, rtol=0)


def test_unknown_types_are_refused(ops: Any) -> None:
    with pytest.raises(RuntimeError, match="float32 and bfloat16"):
        ops.silu_and_mul(torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "ties", "nan", "all -inf", "last", "negative"])
def test_argmax(kind: str, dtype: torch.dtype, ops: Any) -> None:
    """The first of the largest, a NaN before everything, around the runs of 1,024 and the 16 lanes."""
    for size in (1, 15, 17, 1023, 1024, 1025, 2500):
        values = torch.randn(5, size).to(dtype)
        if kind == "ties":
            values = values.round()
        if kind == "nan":
            values[torch.arange(4), torch.randint(0, size, (4,))] = torch.nan
        if kind in ("all -inf", "last"):
            values.fill_(-torch.inf)
        if kind == "last":
            values[:, -1] = -1e30
        if kind == "negative":
            values = -values.abs() - 1
        wanted = values.float().argmax(dim=-1)
        assert torch.equal(ops.argmax(strided(values)), wanted)
        assert torch.equal(first_argmax(values, ops), wanted) and torch.equal(first_argmax(values), wanted)
