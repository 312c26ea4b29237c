"""triton_paged without a GPU: its kernels under Triton's interpreter, and compiled for GPUs that are not here.

Milestone: M4 (R4.27, R4.28). The interpreter runs what the kernels say, in fp32 (it cannot multiply bf16), and the
compiler shows that they can be said to a GPU in every dtype. What only a GPU can show is in test_gpu_backends.py.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.selector import get_attn_backend, refusal

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from folovllm.attention.backends import triton_paged
from tests.m4.triton_interpreter import Interpreter
from tests.script_loader import load_script
from tests.triton_helpers import (
    CAPABILITIES,
    MATRIX_UNITS,
    check_candidate,
    check_fits,
    compile_kernel,
    matrix_units,
)

pytestmark = pytest.mark.m4

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


# --- under the interpreter --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(36))
def test_random_steps(interpreter: Interpreter, seed: int) -> None:
    """9 block sizes, 5 head sizes and 4 groups in turn; unowned slots are NaN, blocks lie in random order."""
    interpreter.call("random", seed=seed)


@pytest.mark.parametrize("block_size", [1, 2, 5, 16, None])
def test_around_block_boundaries(interpreter: Interpreter, block_size: int | None) -> None:
    """Lengths of one and two blocks, minus one, exact, plus one; as decode and with a resumed middle."""
    edge = block_size or 24
    lengths = sorted({max(2, n * edge + d) for n in (1, 2) for d in (-1, 0, 1)})
    steps = [("decode", n - 1, 1) for n in lengths] + [("resumed", n // 2, n - n // 2) for n in lengths[-3:]]
    interpreter.call("shapes", shapes=steps, block_size=block_size)


@pytest.mark.parametrize("length", [15, 16, 17, 31, 33])
def test_around_tile_boundaries(interpreter: Interpreter, length: int) -> None:
    interpreter.call("small_tiles", length=length)


@pytest.mark.parametrize("split_kv, group", [(64, 1), (64, 8), (128, 3), (256, 3)])
def test_a_single_query_in_several_parts(interpreter: Interpreter, split_kv: int, group: int) -> None:
    """Batch mates of 1 to 5 parts; the shortest has one key, others end at a part's boundary or beside it."""
    lengths = (1, split_kv - 1, split_kv, split_kv + 1, 300)
    steps = [("decode", n - 1, 1) for n in lengths]
    interpreter.call("shapes", shapes=steps, split_kv=split_kv, group=group)


def test_prefix_hits_chunks_and_decodes_in_one_step(interpreter: Interpreter) -> None:
    steps = [("prefill", 0, 33), ("prefix hit", 32, 9), ("prefix hit", 16, 1), ("chunk", 5, 14), ("decode", 40, 1)]
    for seed, block_size in enumerate((4, 16)):
        interpreter.call("shapes", shapes=steps, seed=seed, block_size=block_size, head_size=80, num_kv_heads=2)


@pytest.mark.parametrize("seed", range(4))
def test_extreme_logits(interpreter: Interpreter, seed: int) -> None:
    interpreter.call("extreme", seed=seed)


@pytest.mark.parametrize("position", [0, 15, 16, 36])
def test_a_key_that_outweighs_all_gives_its_value(interpreter: Interpreter, position: int) -> None:
    interpreter.call("winner", position=position)


def test_one_token_alone_gets_its_own_value(interpreter: Interpreter) -> None:
    interpreter.call("one_token")


@pytest.mark.parametrize("seed", range(2))
def test_a_prefix_that_is_being_written_in_this_very_step(interpreter: Interpreter, seed: int) -> None:
    interpreter.call("written_in_this_very_step", seed=seed)


def test_the_cost_model_names_what_the_kernels_move(interpreter: Interpreter) -> None:
    """Bytes and operations of every kernel, counted load by load, are those of folovllm/sim/kernel_cost.py.

    The steps have rows and tiles that are not full, heads of 80 that are computed as 128, keys above the diagonal that
    are skipped, and requests of 1, 2 and 3 parts beside each other.
    """
    decodes = [("decode", n - 1, 1) for n in (1, 64, 65, 130)]
    chunks = [("prefill", 0, 33), ("chunk", 40, 9), ("resumed", 7, 2)]
    kernels = ["chunk_kernel", "merge_kernel", "single_kernel", "write_kernel"]
    got = interpreter.call("cost", shapes=decodes + chunks, split_kv=64, head_size=80, group=3, num_kv_heads=2)
    assert got == kernels
    assert interpreter.call("cost", shapes=chunks, head_size=64, group=8) == ["chunk_kernel", "write_kernel"]
    with pytest.raises(AssertionError, match="the model says"):
        interpreter.call("cost", shapes=decodes, split_kv=64, modelled_split_kv=128)


def test_copied_blocks_read_like_the_originals(interpreter: Interpreter) -> None:
    interpreter.call("copied_blocks")


def test_slices_of_the_fused_projection(interpreter: Interpreter) -> None:
    interpreter.call("strided")


def test_a_request_gets_the_same_bits_in_any_company(interpreter: Interpreter) -> None:
    interpreter.call("alone_and_in_company")


def test_the_engine_runs_on_it(interpreter: Interpreter, tiny_model_dir: Callable[[str], Path]) -> None:
    interpreter.call("engine", folder=str(tiny_model_dir("qwen3")), name="triton_paged")


@pytest.mark.parametrize("mistake", ["one key too many", "a tile is forgotten", "blocks in order"])
def test_mistakes_are_found(interpreter: Interpreter, mistake: str) -> None:
    assert interpreter.call("finds", mistake=mistake)


def test_and_nothing_is_found_where_there_is_none(interpreter: Interpreter) -> None:
    assert not interpreter.call("finds", mistake="none")


# --- compiled, not run ------------------------------------------------------------------------------------------------

ARGUMENTS = {"scale": "fp32", "part_ptr": "*fp32", "lse_ptr": "*fp32", "slot_mapping_ptr": "*i64"} | dict.fromkeys(
    ("table_ptr", "start_ptr", "lens_ptr", "tiles_ptr", "singles_ptr"), "*i32"
)
MOST_SPILLED = 64  # bytes per thread: a head of 72 on 10.0 with Triton 3.6; nearly all others spill nothing
MOST_SPILLED_BY_CANDIDATES = 72  # 128 rows and 128 keys on 8.0
LAYERS = [  # dtype, head size, query heads per KV head
    (torch.float32, 64, 3),
    (torch.bfloat16, 256, 1),
    (torch.bfloat16, 128, 8),
    (torch.float16, 80, 64),
    (torch.float16, 72, 5),  # no stride is a multiple of 16, so loads are narrow
]


def launches(spec: AttentionSpec, tiles: triton_paged.Tiles) -> dict[str, dict[str, int]]:
    """The compile-time arguments and options of each kernel, as the backend passes them."""
    split = {"SPLIT_KV": tiles.split_kv}
    return {
        "chunk_kernel": triton_paged.launch_arguments(spec, tiles, tiles.chunk),
        "single_kernel": triton_paged.launch_arguments(spec, tiles, tiles.single) | split,
        "merge_kernel": {"HEAD_SIZE": spec.head_size, "HEAD_PAD": tiles.head_pad} | split,
        "write_kernel": {"ROW_SIZE": 2 * spec.head_size, "ROW_PAD": 2 * tiles.head_pad},
    }


def compile_attention(name: str, spec: AttentionSpec, tiles: triton_paged.Tiles, capability: int) -> Any:
    kernel, arguments = getattr(triton_paged.kernels, name), launches(spec, tiles)[name]
    options = {option: arguments.pop(option) for option in ("num_warps", "num_stages") if option in arguments}
    strides = [arg for arg in kernel.arg_names if arg.endswith("_stride")] if spec.head_size % 16 else []
    unaligned = ("scale", "table_stride", "max_splits", *strides)
    return compile_kernel(kernel, ARGUMENTS, arguments, spec.dtype, capability, unaligned, **options)


def check_layer(
    dtype: torch.dtype, head_size: int, group: int, capability: int, folder: Path, patch: pytest.MonkeyPatch
) -> None:
    """Compiles the four kernels to machine code and asks what they take; matrix units in half precision only."""
    import triton

    patch.setattr(triton.knobs.cache, "dir", str(folder))
    spec = AttentionSpec(2 * group, 2, head_size, dtype, CUDA, block_size=16)
    tiles = triton_paged.tile_sizes(spec)
    for name, arguments in launches(spec, tiles).items():
        compiled = compile_attention(name, spec, tiles, capability)
        check_fits(f"{name}, {dtype}, head {head_size}", compiled, capability, folder, MOST_SPILLED)
        expected = MATRIX_UNITS[capability if arguments.get("BLOCK_ROWS", 0) >= 64 else 80]
        multiplies = name in ("chunk_kernel", "single_kernel") and dtype is not torch.float32
        assert matrix_units(compiled) == ({expected} if multiplies else set())


@pytest.mark.parametrize(
    "layer, capability",
    [(LAYERS[0], 80), (LAYERS[1], 86), (LAYERS[2], 90), (LAYERS[2], 100)],
    ids=str,
)
def test_it_compiles(
    layer: tuple[torch.dtype, int, int], capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_layer(*layer, capability, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_layer_compiles_for_every_gpu(
    layer: tuple[torch.dtype, int, int], capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_layer(*layer, capability, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel, kind", [("chunk_kernel", "prompt"), ("single_kernel", "decode")])
def test_every_candidate_compiles(
    kernel: str, kind: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles that scripts/dev/gpu_tiles.py tries on Qwen3-8B, on GPUs with much shared memory."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    case = next(case for case in load_script("gpu_floor").cases("qwen3-8b") if case.kind == kind)
    spec = AttentionSpec(32, 8, 128, torch.bfloat16, CUDA, block_size=16)
    for words, tiles in load_script("gpu_tiles").candidates(case, torch.bfloat16, "cuda").items():
        compiled = compile_attention(kernel, spec, tiles, capability)
        check_candidate(f"{kernel}, {words}", compiled, capability, tmp_path, MOST_SPILLED_BY_CANDIDATES)


# --- who may run it ---------------------------------------------------------------------------------------------------


def spec(dtype: torch.dtype = torch.bfloat16, head_size: int = 64, device: torch.device = CUDA, group: int = 2) -> Any:
    return AttentionSpec(2 * group, 2, head_size, dtype, device, block_size=16)


@pytest.mark.parametrize(
    "asked, reason",
    [
        (spec(device=CPU), "on an NVIDIA GPU, not on cpu; use 'torch_flash'"),
        (spec(torch.float64), "not in torch.float64; use 'torch_naive'"),
        (spec(head_size=512), "head size 512 .* is beyond its 256 and 64; use 'torch_sdpa'"),
        (spec(group=80), "80 query heads per KV head is beyond"),
    ],
)
def test_refusals(asked: AttentionSpec, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'triton_paged' cannot run here: .*{reason}"):
        get_attn_backend("triton_paged", asked)


@pytest.mark.parametrize("capability, reason", [((7, 5), "(Ampere) or later, this GPU has 7.5"), ((9, 0), None)])
def test_the_gpu_is_asked(capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    got = refusal("triton_paged", spec())
    assert got is None if reason is None else reason in str(got)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in str(refusal("triton_paged", spec()))


def test_the_interpreter_refuses_bf16(interpreter: Interpreter) -> None:
    assert "interpreter does not multiply torch.bfloat16" in interpreter.call("refusal_in_bf16")


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for module in ("folovllm.attention.backends.triton_paged", "folovllm.attention.ops.triton_attention"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ValueError, match=r"Triton is not installed .*pip install triton.*use 'torch_sdpa'"):
        get_attn_backend("triton_paged", spec())


def test_a_step_is_cut_into_programs() -> None:
    """The example of `prepare`: 6, 1 and 3 new tokens, with 16 heads per KV head 4 tokens to a tile of 64 rows."""
    backend = triton_paged.TritonPagedBackend(spec(device=CPU, group=16))
    table = torch.zeros(3, 40, dtype=torch.int32)
    metadata = AttentionMetadata([0, 6, 7, 10], [6, 600, 20], table, torch.arange(10), 16)
    backend.prepare(metadata)
    assert metadata.prepared.tiles.tolist() == [[0, 0], [0, 4], [2, 0]]
    assert metadata.prepared.singles.tolist() == [1] and metadata.prepared.max_splits == 3
