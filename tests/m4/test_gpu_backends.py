"""The attention backends on a GPU: the whole conformance suite, and the engine of every preset (R4.31).

Milestone: M4. Skipped where there is no GPU; docs/dev/gpu_status.md says where these have run. In fp32, in which
nothing multiplies in TF32 unless asked to, the tokens of a tiny model must be those of `generate_naive` on a CPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.attention.backend import AttentionBackend, AttentionMetadata, sequence_slots
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.selector import load_backend, refusal
from folovllm.milestones import engine_rungs
from tests.m4.conformance import (
    BLOCK_SIZES,
    DTYPES,
    GROUPS,
    HEAD_SIZES,
    Batch,
    check,
    difference,
    make_batch,
    random_batch,
    reference,
    run,
    tolerance,
)
from tests.parity_helpers import GapNaiveModel, Job, make_job

pytestmark = [
    pytest.mark.m4,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

DEVICE = "cuda"
BACKENDS = ("triton_paged", "flash_attn", "torch_sdpa", "torch_flash")
NUM_RANDOM = 200  # per backend and dtype
NUM_SHAPES = 18  # among them; each is compiled anew, and every head size, group and block size is there twice
PRESETS = [rung.id for rung in engine_rungs()]
MAX_MODEL_LEN = 64
SHAPES = [(1, 30), (16, 20), (17, 24), (40, 20), (5, 24)]  # (prompt length, output tokens)

MakeTiny = Callable[[str], Path]


def page_for(name: str, block_size: int | None) -> int | None:
    """FlashAttention 2 has pages of 256 tokens only; the other backends take any."""
    return 256 if name == "flash_attn" else block_size


def runnable(name: str, batch: Batch) -> type[AttentionBackend]:
    reason = refusal(name, batch.spec)
    if reason is not None:
        pytest.skip(f"{name} refuses: {reason}")
    return load_backend(name)


def batch_of(name: str, dtype: torch.dtype, shapes: list[tuple[str, int, int]], seed: int, **args: Any) -> Batch:
    page = page_for(name, args.pop("block_size", 16))
    return make_batch(np.random.default_rng((50, seed)), shapes, dtype, DEVICE, block_size=page, **args)


def check_shapes(name: str, dtype: torch.dtype, shapes: list[tuple[str, int, int]], seed: int = 0, **args: Any) -> None:
    batch = batch_of(name, dtype, shapes, seed, **args)
    check(runnable(name, batch), batch, TorchNaiveBackend)


each_backend = pytest.mark.parametrize("name", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# --- conformance ------------------------------------------------------------------------------------------------------


@each_dtype
@each_backend
def test_random_batches(name: str, dtype: torch.dtype) -> None:
    runnable(name, batch_of(name, dtype, [("prefill", 0, 2)], 0))
    shares = []
    for seed in range(NUM_RANDOM):
        shape = seed % NUM_SHAPES
        batch = random_batch(
            np.random.default_rng((51, seed)), dtype, DEVICE, HEAD_SIZES[shape % 5], GROUPS[shape % 4],
            page_for(name, BLOCK_SIZES[shape % 9]),
        )  # fmt: skip
        shares.append(check(runnable(name, batch), batch, TorchNaiveBackend))
    print(f"{name}, {dtype}: {len(shares)} batches, worst at {max(shares):.2f} of the tolerance")


@each_dtype
@each_backend
def test_extreme_logits(name: str, dtype: torch.dtype) -> None:
    for seed in range(25):
        page = page_for(name, 16)
        batch = random_batch(
            np.random.default_rng((52, seed)), dtype, DEVICE, head_size=64, block_size=page, logit_scale=1e4
        )
        check(runnable(name, batch), batch, TorchNaiveBackend)


@pytest.mark.parametrize("winner", [0, 20, 36])
@each_dtype
@each_backend
def test_a_key_that_outweighs_all_gives_its_value(name: str, dtype: torch.dtype, winner: int) -> None:
    batch = batch_of(name, dtype, [("decode", 36, 1)], 0, group=8)
    backend_class = runnable(name, batch)
    (only,) = batch.sequences
    batch.query.fill_(100.0)
    only.key.fill_(-12.5)  # 64 * 100 * -12.5 / 8 = -1e4
    only.key[winner] = 12.5
    expected = only.value[winner].expand(batch.spec.num_heads, -1)
    assert torch.equal(run(backend_class(batch.spec), batch)[0], expected)


@each_dtype
@each_backend
def test_one_token_alone_gets_its_own_value(name: str, dtype: torch.dtype) -> None:
    batch = batch_of(name, dtype, [("prefill", 0, 1)], 1)
    (only,) = batch.sequences
    got = run(runnable(name, batch)(batch.spec), batch)
    assert torch.equal(got[0], only.value[0].expand(batch.spec.num_heads, -1))


@pytest.mark.parametrize("block_size", [1, 2, 16, 64, 256, None])
@each_dtype
@each_backend
def test_around_block_boundaries(name: str, dtype: torch.dtype, block_size: int | None) -> None:
    if name == "flash_attn" and block_size != 256:
        pytest.skip("flash_attn has pages of 256 tokens")
    edge = block_size or 48
    lengths = sorted({max(1, n * edge + d) for n in (1, 2) for d in (-1, 0, 1)})
    shapes = [(kind, length - new, new) for length in lengths for kind, new in
              (("decode", 1), ("prefill", length), ("resumed", (length + 1) // 2))]  # fmt: skip
    check_shapes(name, dtype, shapes, edge, block_size=block_size)


@pytest.mark.parametrize("length", [31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 513])
@each_dtype
@each_backend
def test_around_tile_boundaries(name: str, dtype: torch.dtype, length: int) -> None:
    shapes = [("decode", length - 1, 1), ("prefill", 0, length), ("chunk", length - 20, 20), ("chunk", 3, length - 3)]
    check_shapes(name, dtype, shapes, length)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("group", [1, 3, 8, 64])
@each_dtype
@each_backend
def test_every_shape_compiles(name: str, dtype: torch.dtype, group: int, head_size: int) -> None:
    """And fits into the memory and the registers of this GPU."""
    check_shapes(name, dtype, [("prefill", 0, 70), ("decode", 300, 1)], group, group=group, head_size=head_size)


@each_backend
def test_a_hundred_requests(name: str) -> None:
    shapes = [("decode", 1 + 7 * i % 150, 1) for i in range(98)] + [("prefill", 0, 30), ("prefill", 0, 30)]
    check_shapes(name, torch.bfloat16, shapes, 2)


@each_dtype
@each_backend
def test_a_context_of_8192(name: str, dtype: torch.dtype) -> None:
    shapes = [("decode", 8191, 1), ("chunk", 8192 - 17, 17), ("prefill", 0, 2048), ("decode", 40, 1)]
    check_shapes(name, dtype, shapes, 3, num_kv_heads=2)


@each_backend
def test_a_prefix_that_is_being_written_in_this_very_step(name: str) -> None:
    page = page_for(name, 16)
    assert page is not None
    for seed in range(8):
        shapes = [("prefill", 0, 2 * page + 8), ("prefix hit", 2 * page, 5)]
        check_shapes(name, torch.bfloat16, shapes, seed)


@each_backend
def test_copied_blocks_read_like_the_originals(name: str) -> None:
    batch = batch_of(name, torch.bfloat16, [("decode", 300, 1)], 4, block_size=256)
    backend = runnable(name, batch)(batch.spec)
    (only,) = batch.sequences
    caches = torch.full((2, *backend.kv_cache_shape(9)), float("nan"), dtype=torch.bfloat16, device=DEVICE)

    def table_of(block_ids: list[int], new: int) -> AttentionMetadata:
        table = torch.tensor([block_ids], dtype=torch.int32, device=DEVICE)
        metadata = AttentionMetadata([0, new], [301], table, sequence_slots(table[0], 301, 256)[-new:], 256)
        backend.prepare(metadata)
        return metadata

    everything = table_of([5, 2], new=301)
    for cache in caches:
        backend.write(only.key, only.value, cache, everything)
    backend.copy_blocks(caches, [(5, 1), (2, 8)])
    for block_ids in ([5, 2], [1, 8], [5, 8]):
        metadata = table_of(block_ids, new=1)
        for cache in caches:
            assert difference(backend.forward(batch.query, cache, metadata), reference(batch)) <= tolerance(batch)


@each_dtype
@each_backend
def test_one_instance_serves_many_steps(name: str, dtype: torch.dtype) -> None:
    batches = [batch_of(name, dtype, [("chunk", 7 * i, 9), ("decode", 20, 1)], i) for i in range(2)]
    backend = runnable(name, batches[0])(batches[0].spec)
    first = run(backend, batches[0])
    run(backend, batches[1])
    assert torch.equal(run(backend, batches[0]), first)


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs_of(tiny_model_dir: MakeTiny) -> Callable[[str], list[Job]]:
    made: dict[str, list[Job]] = {}

    def get(name: str) -> list[Job]:
        if name not in made:
            model = GapNaiveModel(tiny_model_dir(name))
            made[name] = [make_job(model, length, count, seed) for seed, (length, count) in enumerate(SHAPES)]
        return made[name]

    return get


def tokens_of(folder: Path, jobs: list[Job], **args: Any) -> list[list[int]]:
    args = {"device": DEVICE, "dtype": "float32", "max_model_len": MAX_MODEL_LEN, "num_kv_blocks": 64} | args
    llm = LLM(str(folder), **args)
    outputs = llm.generate([{"prompt_token_ids": job.prompt_token_ids} for job in jobs], [job.params for job in jobs])
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_the_tokens_of_the_cpu(
    preset: str, model: str, tiny_model_dir: MakeTiny, jobs_of: Callable[[str], list[Job]]
) -> None:
    jobs = jobs_of(model)
    assert tokens_of(tiny_model_dir(model), jobs, preset=preset) == [job.tokens for job in jobs]


@pytest.mark.parametrize("name", ["torch_naive", "torch_flash", "torch_sdpa", "triton_paged"])
def test_every_backend_gives_the_tokens_of_the_cpu(
    name: str, tiny_model_dir: MakeTiny, jobs_of: Callable[[str], list[Job]]
) -> None:
    jobs = jobs_of("mistral")
    for args in ({"block_size": 5}, {"enable_chunked_prefill": True, "max_num_batched_tokens": 7}):
        got = tokens_of(tiny_model_dir("mistral"), jobs, attention_backend=name, **args)
        assert got == [job.tokens for job in jobs], f"{name} differs with {args}"


def test_the_memory_of_the_gpu_is_shared_out(tiny_model_dir: MakeTiny, jobs_of: Callable[[str], list[Job]]) -> None:
    """Without num_kv_blocks the worker profiles a step and takes its share of what is left."""
    jobs = jobs_of("llama")
    got = tokens_of(tiny_model_dir("llama"), jobs, num_kv_blocks=None, gpu_memory_utilization=0.2)
    assert got == [job.tokens for job in jobs]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["triton_paged", "flash_attn", "torch_sdpa"])
def test_half_precision_stays_close_along_the_same_text(name: str, dtype: str, tiny_model_dir: MakeTiny) -> None:
    """Teacher-forced: log-probabilities of one prompt, against torch_naive in the same dtype."""
    prompt = {"prompt_token_ids": list(range(3, 60))}
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def logprobs(backend: str) -> torch.Tensor:
        llm = LLM(
            str(tiny_model_dir("mistral")), device=DEVICE, dtype=dtype, max_model_len=256, block_size=256,
            num_kv_blocks=8, attention_backend=backend,
        )  # fmt: skip
        (output,) = llm.generate([prompt], params)
        assert output.prompt_logprobs is not None
        chosen = zip(prompt["prompt_token_ids"][1:], output.prompt_logprobs[1:], strict=True)
        return torch.tensor([row[token].logprob for token, row in chosen])

    apart = (logprobs(name) - logprobs("torch_naive")).abs()
    print(f"{name}, {dtype}: logprobs differ by {float(apart.mean()):.4f} on average, {float(apart.max()):.4f} at most")
    assert float(apart.mean()) < 0.05


@pytest.mark.parametrize("seed", [1, 2])
def test_a_seed_draws_alike_alone_and_in_a_batch(seed: int, tiny_model_dir: MakeTiny) -> None:
    folder = str(tiny_model_dir("llama"))
    llm = LLM(folder, device=DEVICE, dtype="float32", max_model_len=MAX_MODEL_LEN, num_kv_blocks=64)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=seed, max_tokens=12, ignore_eos=True)
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (5, 9, 20)]
    together = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    alone = [list(llm.generate([p], params)[0].outputs[0].token_ids) for p in prompts]
    assert together == alone
