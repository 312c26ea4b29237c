"""All decoder layers as one C++ call: the same numbers as operator by operator, and the rows that are read.

Milestone: M4. The two paths compute the same operations in the same order, so they are equal to the bit.
"""

import dataclasses
import mmap
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.cpu_paged import CpuPagedBackend
from folovllm.config import KernelConfig
from folovllm.csrc.build import load_ops
from folovllm.forward_context import set_forward_context
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.cpu.decoder_stack import DecoderStack, named_tensors
from folovllm.model_executor.cpu.huge_pages import ALIGNMENT, HugeArena, huge_zeros, keep_freed_memory, touch_pages
from folovllm.model_executor.cpu.packed_linear import CppGatedLinearMethod
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.model_loader import random_model
from folovllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

pytestmark = pytest.mark.m4

CPU, BF16 = torch.device("cpu"), torch.bfloat16
DTYPES = (torch.float32, BF16)
UNIT = {torch.float32: 2.0**-24, BF16: 2.0**-8}
BLOCK_SIZE, NUM_BLOCKS = 16, 16
# What is odd about each: (tiny model it is like, its sizes).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"intermediate_size": 96, "head_dim": 32}),
    "bias": ("qwen2", {"intermediate_size": 64, "head_dim": 16}),
    "head norms": ("qwen3", {"intermediate_size": 160, "head_dim": 48}),
}
# Requests as (tokens computed before, new ones): prompts, a chunk, decodes.
STEPS = [[(0, 20), (0, 1), (0, 33)], [(20, 1), (1, 17), (33, 1)], [(21, 1), (18, 1), (34, 1)]]


@pytest.fixture(scope="module", autouse=True)
def needs_a_compiler() -> None:
    if load_ops() is None:
        pytest.skip("no C++ compiler here")


@pytest.fixture
def arch(request: pytest.FixtureRequest, tiny_model_dir: Any) -> ModelArchitecture:
    name, sizes = SHAPES[request.param]
    return dataclasses.replace(load_hf_config(tiny_model_dir(name)), **sizes)


ON = KernelConfig(linear_backend="auto", fused_ops="auto", fused_mlp="auto", decoder_stack="auto")
MODULE_BY_MODULE = dataclasses.replace(ON, decoder_stack=False)


def build(
    arch: ModelArchitecture, kernels: KernelConfig = ON, dtype: torch.dtype = BF16
) -> tuple[LlamaForCausalLM, Any]:
    model = random_model(arch, dtype, CPU, seed=1)
    heads = (arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim)
    backend = CpuPagedBackend(AttentionSpec(*heads, dtype, CPU, BLOCK_SIZE, kernels.cpu_isa))
    accelerate(model, backend, kernels)
    for layer in model.attention_layers():
        layer.bind(backend, torch.zeros(backend.kv_cache_shape(NUM_BLOCKS), dtype=dtype))
    return model, backend


def run(
    model: LlamaForCausalLM, backend: Any, step: list[tuple[int, int]], logits_indices: list[int] | None = None
) -> torch.Tensor:
    """Hidden states [num_selected, hidden_size] of a step; request r owns blocks 1 + r, 4 + r, 7 + r, ..."""
    tables = torch.arange(1, NUM_BLOCKS).view(-1, 3).T.contiguous().int()  # [3, 5]
    positions = [torch.arange(done, done + new) for done, new in step]
    slots = [t[p // BLOCK_SIZE].long() * BLOCK_SIZE + p % BLOCK_SIZE for t, p in zip(tables, positions, strict=True)]
    starts = [0, *torch.tensor([new for _, new in step]).cumsum(0).tolist()]
    metadata = AttentionMetadata(starts, [done + new for done, new in step], tables, torch.cat(slots), BLOCK_SIZE)
    if logits_indices is not None:
        metadata.logits_indices = torch.tensor(logits_indices, dtype=torch.int64)
    backend.prepare(metadata)
    ids = torch.cat(positions) * 7 % 250 + 3
    with torch.inference_mode(), set_forward_context(metadata):
        return model(ids, torch.cat(positions))


def layers(model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", SHAPES, indirect=True)
def test_one_call_is_equal_to_many(arch: ModelArchitecture, dtype: torch.dtype, isa: str) -> None:
    one, many = (dataclasses.replace(kernels, cpu_isa=isa) for kernels in (ON, MODULE_BY_MODULE))
    (fused, fused_backend), (plain, plain_backend) = build(arch, one, dtype), build(arch, many, dtype)
    assert isinstance(fused.model.decoder_stack, DecoderStack) and plain.model.decoder_stack is None
    for step in STEPS:
        assert torch.equal(run(fused, fused_backend, step), run(plain, plain_backend, step))
    caches = zip(fused.attention_layers(), plain.attention_layers(), strict=True)
    assert all(torch.equal(ours.kv_cache, theirs.kv_cache) for ours, theirs in caches)


# The rows that are read: of requests that sample the last, of one that wants prompt logprobs all, in mid-prompt none.
SELECTIONS = {
    "last of each": lambda counts: [range(n - 1, n) for n in counts],
    "all of the first, last of the third": lambda counts: [range(counts[0]), range(0), range(counts[2] - 1, counts[2])],
    "all of the third": lambda counts: [range(0), range(0), range(counts[2])],
    "none": lambda counts: [range(0)] * 3,
}


@pytest.mark.parametrize("kernels", [ON, MODULE_BY_MODULE], ids=["one call", "module by module"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("arch", SHAPES, indirect=True)
def test_the_selected_rows_come_back_and_no_others(
    arch: ModelArchitecture, selection: str, kernels: KernelConfig
) -> None:
    """Each row is what it is without a selection, and so is the whole cache."""
    (some, some_backend), (full, full_backend) = build(arch, kernels), build(arch, kernels)
    for step in STEPS:
        counts = [new for _, new in step]
        starts = [sum(counts[:i]) for i in range(3)]
        rows = [start + i for start, own in zip(starts, SELECTIONS[selection](counts), strict=True) for i in own]
        got, expected = run(some, some_backend, step, rows), run(full, full_backend, step)
        assert torch.equal(got, expected[rows]) and got.shape == (len(rows), arch.hidden_size)
    caches = zip(some.attention_layers(), full.attention_layers(), strict=True)
    assert all(torch.equal(a.kv_cache, b.kv_cache) for a, b in caches)


@pytest.mark.parametrize("rows", [[0, 53], [19, 18], [54], [-1]], ids=str)
@pytest.mark.parametrize("arch", ["llama"], indirect=True)
def test_rows_that_are_not_the_last_of_their_request_are_refused(arch: ModelArchitecture, rows: list[int]) -> None:
    """In C++ attention runs on the selected queries alone, and takes them to be the last ones."""
    model, backend = build(arch)
    with pytest.raises(RuntimeError, match="logits_indices"):
        run(model, backend, STEPS[0], rows)


@pytest.mark.parametrize("arch", ["llama"], indirect=True)
def test_a_layer_is_taken_by_name(arch: ModelArchitecture) -> None:
    """A missing, unknown or empty tensor is an error that names it, and the stack stays as it was."""
    model, backend = build(arch)
    tensors, stack = named_tensors(layers(model)[0]), torch.classes.folovllm.DecoderStack(4, 96, 1e-5, 1.0, 0)
    without = {name: t for name, t in tensors.items() if name != "post_attention_layernorm"}
    with pytest.raises(RuntimeError, match="the tensor post_attention_layernorm is missing"):
        stack.add_layer(without)
    with pytest.raises(RuntimeError, match=r"needs a tensor o_proj.packed or o_proj.levels"):
        stack.add_layer({name: t for name, t in tensors.items() if name != "o_proj.packed"})
    with pytest.raises(RuntimeError, match=r"there is no tensor called down_proj.weight"):
        stack.add_layer(tensors | {"down_proj.weight": tensors["down_proj.packed"]})
    with pytest.raises(RuntimeError, match="0 layers and 1 KV caches"):
        none = torch.empty(0)
        backend.ops.decoder_stack(stack, none, none, none, none, [none], none, none, none, none)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("arch", SHAPES, indirect=True)
def test_threads_that_stay_together_compute_the_same(
    arch: ModelArchitecture, threads: int, set_threads: Callable[[int], None]
) -> None:
    """csrc/thread_team.h, also with more threads than the machine has cores."""
    (team, team_backend), (alone, alone_backend) = build(arch), build(arch)
    for step in [*STEPS, [(0, 70), (0, 40), (0, 33)]]:  # the last with enough rows for a part for each thread
        set_threads(1)
        expected = run(alone, alone_backend, step)
        set_threads(threads)
        assert torch.equal(run(team, team_backend, step), expected)


@pytest.mark.parametrize("arch", ["llama"], indirect=True)
def test_after_an_error_in_mid_step_the_next_step_runs(
    arch: ModelArchitecture, set_threads: Callable[[int], None]
) -> None:
    """The workers are free again when the thread that hands out work fails."""
    model, backend = build(arch)
    set_threads(2)
    expected = run(model, backend, STEPS[0])
    last = model.attention_layers()[-1]
    cache, last.kv_cache = last.kv_cache, torch.zeros(1, 1, 2, 16 * 32, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="prepare_qkv: shapes do not fit"):
        run(model, backend, STEPS[0])
    last.kv_cache = cache
    assert torch.equal(run(model, backend, STEPS[0]), expected)


@pytest.mark.parametrize("arch", ["head norms"], indirect=True)
def test_it_does_not_go_through_the_modules(arch: ModelArchitecture, monkeypatch: pytest.MonkeyPatch) -> None:
    model, backend = build(arch)
    monkeypatch.setattr(LinearBase, "forward", lambda *_: pytest.fail("a layer ran module by module"))
    run(model, backend, STEPS[0])


class CountOps(TorchDispatchMode):
    """How many operators a layer calls: those of our library, seen from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith("folovllm"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("arch", SHAPES, indirect=True)
def test_at_most_four_fused_calls_per_layer(arch: ModelArchitecture) -> None:
    """One for all layers; beside them there is the last norm."""
    model, backend = build(arch)
    with CountOps() as counted:
        run(model, backend, [(0, 1), (0, 1), (0, 1)])
    assert ["decoder_stack" in name for name in counted.names] == [True, False]


# ---- the MLP whose activation is part of its first matmul


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "inputs"), [(32, 2), (64, 57), (160, 128), (1536, 576)])
def test_gated_linear(ops: Any, size: int, inputs: int, dtype: torch.dtype) -> None:
    """Against fp64, rows around a tile (6 or 8) and a panel (48 or 96). Rounded once, plus what the fp32 sums lose."""
    torch.manual_seed(0)
    gate_up = torch.randn(2 * size, inputs).to(dtype)
    packed, _ = CppGatedLinearMethod(ops).pack(ops.pack_weight(gate_up), None)
    for rows in (1, 6, 7, 8, 9, 49, 97):
        x = torch.randn(rows, inputs).to(dtype)
        gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
        exact = torch.nn.functional.silu(gate) * up
        lost = 2.0**-24 * inputs * (x.double().abs() @ gate_up.double().abs().T).amax(dim=-1, keepdim=True)
        got = ops.linear_silu_packed(x, packed, size)
        assert ((got.double() - exact).abs() <= UNIT[dtype] * exact.abs() + lost * (1 + gate.abs() + up.abs())).all()


@pytest.mark.parametrize("arch", ["llama"], indirect=True)
def test_gate_and_up_are_one_call(arch: ModelArchitecture) -> None:
    model, _ = build(arch)
    for layer in layers(model):
        assert type(layer.mlp.gate_up_proj.quant_method) is CppGatedLinearMethod
        assert isinstance(layer.mlp.act_fn, torch.nn.Identity)


# ---- memory


def test_an_arena_keeps_what_it_was_given() -> None:
    """Tensors of odd sizes, smaller and larger than a chunk: unchanged, aligned, not over each other."""
    torch.manual_seed(0)
    arena = HugeArena(chunk_bytes=4096)
    originals = [torch.randn(n).to(dtype) for n in (1, 33, 2000, 5000, 7) for dtype in (BF16, torch.float32)]
    moved = [arena.move(tensor) for tensor in originals]
    assert all(torch.equal(a, b) for a, b in zip(originals, moved, strict=True))
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in moved)


def test_an_arena_lives_as_long_as_its_tensors() -> None:
    tensor = HugeArena(chunk_bytes=4096).move(torch.arange(1000))
    junk = [torch.full((1000,), 7) for _ in range(20)]  # these would be written into memory that was freed
    assert torch.equal(tensor, torch.arange(1000)) and len(junk) == 20


@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 1024, 1024)])
def test_huge_zeros(shape: tuple[int, ...]) -> None:
    zeros = huge_zeros(shape, BF16)
    assert zeros.shape == shape and zeros.dtype is BF16 and not zeros.any()
    zeros.fill_(1)
    assert zeros.float().sum() == zeros.numel()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_touched_pages_are_there_before_they_are_used() -> None:
    """Each layer's begin, as much as asked for, and nothing once the time is over."""
    zeros = huge_zeros((3, 40 * 2**20), torch.uint8)
    before = resident_bytes()
    assert touch_pages(zeros, 60 * 2**20, seconds=0) == 0
    assert touch_pages(zeros, 60 * 2**20, seconds=100) == 60 * 2**20
    assert 50 * 2**20 < resident_bytes() - before < 100 * 2**20 and not zeros.any()
    assert touch_pages(zeros, 2**40, seconds=100) == zeros.numel()


def test_malloc_is_told_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc takes the values (it refuses thresholds above 32 MiB without a word but its return value)."""
    told = keep_freed_memory()
    assert told or platform.libc_ver()[0] != "glibc"
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())  # a C library without mallopt
    assert keep_freed_memory() is False
