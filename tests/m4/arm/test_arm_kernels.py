"""The kernels on Arm, which QEMU emulates, equal the portable ones of this machine over random shapes.

Milestone: M4. One program is compiled for any 64-bit Arm CPU, another one for CPUs with instructions for bf16. A kernel
of either adds up in another order than the portable one. An instruction for bf16 also rounds between two additions as
it likes (Arm calls it "round to odd"). The results therefore differ in their last bits, but not by more.

The tests are slow because Zig compiles each program in half a minute. .ci/run runs them.
"""

import random
from typing import Any

import pytest
import torch

from folovllm.csrc.build import load_ops
from tests.m4.arm.program import CPUS, ArmProgram, build_program, find_qemu, has_zig
from tests.m4.test_reference_kernels import attend, bits

pytestmark = [
    pytest.mark.m4,
    pytest.mark.slow,
    pytest.mark.skipif(not has_zig(), reason="no Zig (pip install -e '.[arm]')"),
    pytest.mark.skipif(find_qemu() is None, reason="no QEMU (on Debian: apt-get install qemu-user-static)"),
]

# |difference| / (1 + |portable|), as in test_reference_kernels.py
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
WEIGHT_TYPES = (torch.float32, torch.bfloat16)
NONE = torch.empty(0)


@pytest.fixture(scope="module", params=CPUS)
def arm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ArmProgram:
    return build_program(tmp_path_factory.mktemp("arm"), request.param)


@pytest.fixture(scope="module")
def portable() -> Any:
    ops = load_ops("portable")
    if ops is None:
        pytest.skip("no C++ kernels on this machine")
    return ops


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs() / (1 + expected.double().abs())
    assert error.max() <= TOLERANCE[got.dtype]


def test_each_program_has_its_own_instructions(arm: ArmProgram) -> None:
    assert arm.features() in ("neon=1 bf16=0", "neon=1 bf16=1")
    assert ("max,sve=off" in arm.command) == (arm.features() == "neon=1 bf16=1")


# ---- linear layers


@pytest.mark.parametrize("dtype", WEIGHT_TYPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_linear(arm: ArmProgram, portable: Any, dtype: torch.dtype, seed: int) -> None:
    """One row, every height of a tile, more rows than a panel; odd numbers of inputs, and of steps; partial blocks."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [1, rng.randint(2, 7), rng.randint(8, 24), rng.randint(25, 60), 100][seed]
    inputs, outputs = rng.choice([1, 7, 34, 66, rng.randint(8, 90)]), rng.choice([32, rng.randint(1, 100)])
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    packed = portable.pack_weight(weight)
    for bias in (None, torch.randn(packed.shape[0] * 32, generator=generator)):
        expected = portable.linear_packed(x, packed, bias, outputs)
        assert_close(arm.linear_packed(x, packed, bias, outputs), expected)


@pytest.mark.parametrize("dtype", WEIGHT_TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 11, 26])
def test_gated_linear(arm: ArmProgram, portable: Any, dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    outputs, inputs = 64, 50 + rows
    packed = portable.pack_weight(torch.randn(2 * outputs, inputs, generator=generator).to(dtype))
    x = torch.randn(rows, inputs, generator=generator).div(4).to(dtype)
    expected = portable.linear_silu_packed(x, packed, outputs)
    assert_close(arm.linear_silu_packed(x, packed, outputs), expected)


@pytest.mark.parametrize("dtype", WEIGHT_TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("with_zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_int4(arm: ArmProgram, portable: Any, dtype: torch.dtype, rows: int, with_zeros: bool, gated: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    blocks, groups, chunks = 4, 3, rows % 4 + 8
    outputs = 64 if gated else 4 * 32 - 5
    levels = torch.randint(256, (blocks, groups, chunks, 64), generator=generator).to(torch.uint8)
    scales = torch.rand(blocks, groups, 32, generator=generator) / 50
    zeros = torch.randint(-8, 8, (blocks, groups, 32), generator=generator).to(torch.int8) if with_zeros else NONE
    bias = NONE if gated else torch.randn(blocks * 32, generator=generator)
    x = torch.randn(rows, groups * chunks * 4, generator=generator).to(dtype)
    arguments = (x, levels, scales, zeros, NONE, bias, outputs, gated)
    assert_close(arm.linear_int4(*arguments), portable.linear_int4(*arguments))


# ---- attention


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("head_size", "group", "block_size"), [(64, 3, 16), (80, 7, 5), (128, 1, 40), (48, 8, 64), (256, 4, 2048)]
)
def test_attention(
    arm: ArmProgram, portable: Any, dtype: torch.dtype, head_size: int, group: int, block_size: int
) -> None:
    """A ragged batch: both write the keys and values of every token, and both attend."""
    cache, got = attend(arm, "", head_size, group, block_size, dtype, seed=head_size)
    same_cache, expected = attend(portable, "", head_size, group, block_size, dtype, seed=head_size)
    assert torch.equal(bits(cache), bits(same_cache))
    assert_close(got, expected)


def test_attention_over_parts(arm: ArmProgram, portable: Any) -> None:
    """A sequence that is long enough to be cut among two threads. The parts are merged."""
    generator = torch.Generator().manual_seed(0)
    tokens, block_size = 1500, 16
    blocks = -(-tokens // block_size)
    for dtype in WEIGHT_TYPES:
        cache = torch.randn(blocks, 1, 2, block_size * 64, generator=generator).to(dtype)
        query = torch.randn(2, 3, 64, generator=generator).to(dtype)
        starts, lens = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
        table = torch.randperm(blocks, generator=generator).int()[None]
        got, expected = torch.empty_like(query), torch.empty_like(query)
        arm.paged_attention(got, query, cache, starts, lens, table, 0.125)
        portable.paged_attention(expected, query, cache, starts, lens, table, 0.125)
        assert_close(got, expected)


# ---- rows


@pytest.mark.parametrize("dtype", WEIGHT_TYPES, ids=str)
@pytest.mark.parametrize("size", [3, 64, 577])
def test_rows(arm: ArmProgram, portable: Any, dtype: torch.dtype, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x, residual = (torch.randn(5, size, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(size, generator=generator).to(dtype)
    assert_close(arm.rms_norm(x, None, weight, 1e-5), portable.rms_norm(x, None, weight, 1e-5))
    got, new_residual = arm.rms_norm(x, residual, weight, 1e-5).chunk(2)
    expected_residual = residual.clone()
    expected = portable.rms_norm(x, expected_residual, weight, 1e-5)
    assert_close(got, expected)
    assert torch.equal(new_residual, expected_residual)
    gate_up = torch.randn(5, 2 * size, generator=generator).to(dtype)
    assert_close(arm.silu_and_mul(gate_up), portable.silu_and_mul(gate_up))


@pytest.mark.parametrize("dtype", WEIGHT_TYPES, ids=str)
def test_argmax(arm: ArmProgram, dtype: torch.dtype) -> None:
    """The first of equal maxima, in rows that are longer than a run; NaN wins."""
    x = torch.randint(-50, 50, (4, 3001), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3, 2000:2010] = float("nan")
    assert arm.argmax(x).tolist() == [*(int((row == row.max()).nonzero()[0]) for row in x[:3]), 2000]
