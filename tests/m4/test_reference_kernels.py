"""The plain loops of csrc/reference_*.cpp: the fast operators equal them, and the engine never runs them.

Milestone: M4. Both read the same bytes: pages that either of the two has written, weights that either has packed.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import folovllm
from folovllm.csrc.build import NO_PREFETCH, SOURCE_DIR
from tests.m4.test_cpu_paged import BLOCK_SIZES, GROUPS, make_case, make_spec, random_shapes
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

HEAD_SIZES = (16, 48, 64, 80, 96, 128, 256)
# |difference| / (1 + |reference|). Both sum in fp32, in another order. The fast kernel rounds the softmax weights to
# bf16 before it multiplies, and both round the output.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}

OPERATORS = ("write_kv", "paged_attention", "pack_weight", "linear", "linear_silu")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor: unwritten NaN are equal, too."""
    return tensor.contiguous().view(torch.uint8)


# ---- attention


def attend(ops: Any, prefix: str, head_size: int, group: int, block_size: int, dtype: torch.dtype, seed: int) -> Any:
    """A ragged random batch through `write_kv` and `paged_attention`, or the operators of that prefix -> cache, out."""
    rng = random.Random(seed)
    spec = make_spec(head_size, group, rng.choice([1, 2, 3]), block_size, dtype)
    case = make_case(spec, random_shapes(rng, 150), seed)
    cache = torch.full((case.num_blocks, spec.num_kv_heads, 2, block_size * head_size), float("nan"), dtype=dtype)
    positions = [(s, p) for s, n in enumerate(case.metadata.seq_lens) for p in range(n)]
    table = case.metadata.block_table
    slots = torch.tensor([int(table[s, p // block_size]) * block_size + p % block_size for s, p in positions])
    getattr(ops, prefix + "write_kv")(torch.cat(case.keys), torch.cat(case.values), cache, slots)
    start_loc = torch.tensor(case.metadata.query_start_loc, dtype=torch.int32)
    lens = torch.tensor(case.metadata.seq_lens, dtype=torch.int32)
    out = torch.empty_like(case.query)
    getattr(ops, prefix + "paged_attention")(out, case.query, cache, start_loc, lens, table, spec.scale)
    return cache, out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("block_size", [*BLOCK_SIZES, 40])
def test_attention_equals_the_reference(ops: Any, block_size: int, group: int, dtype: torch.dtype) -> None:
    for seed, head_size in enumerate(HEAD_SIZES):
        cache, got = attend(ops, "", head_size, group, block_size, dtype, seed)
        reference_cache, expected = attend(ops, "reference_", head_size, group, block_size, dtype, seed)
        assert torch.equal(bits(cache), bits(reference_cache)), "the pages differ"
        assert not expected.isnan().any()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance)


def test_the_drawing_of_a_k_page(ops: Any) -> None:
    """As drawn in reference_attention.cpp: groups of 16 tokens, in each the words, in each word the tokens."""
    block_size, head_size = 40, 32
    cache = torch.zeros(2, 1, 2, block_size * head_size, dtype=torch.bfloat16)
    token = torch.arange(block_size).view(-1, 1, 1)
    key = (token + torch.arange(head_size) / 64).expand(block_size, 1, head_size).bfloat16()
    ops.reference_write_kv(key, -key, cache, block_size + torch.arange(block_size))
    k_page, v_page = cache[1, 0]
    assert torch.equal(v_page.view(block_size, head_size), -key[:, 0])
    first = 0
    for width in (16, 16, 8):
        group = k_page[first * head_size : (first + width) * head_size].view(head_size // 2, width, 2)
        expected = key[first : first + width, 0].view(width, head_size // 2, 2).transpose(0, 1)  # [words, tokens, 2]
        assert torch.equal(group, expected)
        first += width


# ---- linear layers


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).bfloat16()


def assert_close_sums(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """Two fp32 sums in another order, each rounded to bf16: at most one step of bf16 apart, and the error of the sums.

    `size` [rows, outputs]: the sums of the absolute values.
    """
    assert got.shape == expected.shape and got.dtype == expected.dtype
    allowed = expected.double().abs() * 2.0**-7 + size.double() * 2.0**-16
    assert ((got.double() - expected.double()).abs() <= allowed).all()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (31, 2), (32, 64), (33, 63), (49, 17), (96, 130), (257, 100)])
def test_linear_equals_the_reference(ops: Any, outputs: int, inputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight = randn(outputs, inputs)
    packed = ops.pack_weight(weight)
    assert torch.equal(packed, ops.reference_pack_weight(weight))
    b = torch.zeros(len(packed) * 32).index_copy_(0, torch.arange(outputs), torch.randn(outputs)) if bias else None
    for rows in (1, 2, 7, 8, 9, 17, 24, 25, 97):
        x = randn(rows, inputs)
        size = x.float().abs() @ weight.float().abs().T + (0 if b is None else b[:outputs].abs())
        got = ops.linear_packed(x, packed, b, outputs)
        assert_close_sums(got, ops.reference_linear(x, packed, b, outputs), size)


@pytest.mark.parametrize(("outputs", "inputs"), [(32, 64), (40, 63), (96, 130)])
def test_gated_linear_equals_the_reference(ops: Any, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    gate, up = randn(outputs, inputs), randn(outputs, inputs)
    blocks = zip(ops.reference_pack_weight(gate), ops.reference_pack_weight(up), strict=True)
    gated = torch.stack([block for pair in blocks for block in pair])  # [2 * blocks, pairs, 32, 2]
    for rows in (1, 3, 9, 25, 97):
        x = randn(rows, inputs)
        got = ops.linear_silu_packed(x, gated, outputs)
        size = (x.float().abs() @ gate.float().abs().T + 1) * (x.float().abs() @ up.float().abs().T)
        assert_close_sums(got, ops.reference_linear_silu(x, gated, outputs), size)


def test_references_refuse_what_does_not_fit(ops: Any) -> None:
    packed, x = ops.pack_weight(randn(40, 30)), randn(3, 30)
    for args in ((x[:, :20], packed, None, 40), (x, packed, None, 90), (x.float(), packed, None, 40)):
        with pytest.raises(RuntimeError, match="reference_linear"):
            ops.reference_linear(*args)
    cache, token = torch.zeros(4, 1, 2, 16 * 64), torch.zeros(1, 1, 64)
    with pytest.raises(RuntimeError, match="slot 64 is outside"):
        ops.reference_write_kv(token, token, cache, torch.tensor([64]))
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([17], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="17 keys and 1 blocks"):
        ops.reference_paged_attention(torch.empty_like(token), token, cache, starts, lens, table, 1.0)


# ---- who calls what


def test_the_engine_never_calls_a_reference() -> None:
    package = Path(folovllm.__file__).parent
    files = [path for pattern in ("*.py", "*.cpp", "*.h") for path in package.rglob(pattern)]
    callers = [
        path.name
        for path in files
        if any(f"reference_{name}(" in path.read_text(encoding="utf-8") for name in OPERATORS)
        or any(f".reference_{name}" in path.read_text(encoding="utf-8") for name in OPERATORS)
    ]
    assert sorted(callers) == ["reference_attention.cpp", "reference_linear.cpp"]


def test_only_one_header_prefetches() -> None:
    """The kernels read as arithmetic: the instruction, and the flag that removes it, stand in prefetch.h alone."""
    sources = [*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h")]
    for word in ("__builtin_prefetch", "_mm_prefetch", NO_PREFETCH.removeprefix("-D")):
        users = {path.name for path in sources if word in path.read_text(encoding="utf-8")}
        assert users <= {"prefetch.h"}, word


@pytest.mark.slow  # it compiles all kernels
def test_without_prefetching_the_results_are_the_same(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps, prompts and attention alone: the same bits with and without -DFOLOVLLM_NO_PREFETCH."""
    script = load_script("compare_kernels")
    for name, value in {"LAYERS": 3, "DECODE_REQUESTS": (1, 11, 32), "PROMPT_LENS": (5, 70)}.items():
        monkeypatch.setattr(script, name, value)
    plain = script.load(str(Path(__file__).parents[2]) + NO_PREFETCH.replace("-D", "+"), "folovllm_no_prefetch")
    torch.manual_seed(0)
    with torch.inference_mode():
        for case, run in script.cases(script.Model()).items():
            assert torch.equal(run(plain), run(ops)), case
