"""However many ranks compute a model: the greedy tokens of `generate_naive`, and the communication that was planned."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.communication_plan import CommunicationPlan
from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.hf_config import load_hf_config
from folovllm.milestones import engine_rungs
from folovllm.sampling_params import SamplingParams
from folovllm.worker.model_runner import ModelRunner
from tests.m7.quant_helpers import make_quantizable, quantize
from tests.m9.parallel_models import PARALLEL_MODELS, make_parallel
from tests.m9.thread_ranks import ThreadRanksExecutor
from tests.pairwise import slow_but_pairwise
from tests.parity_helpers import GapNaiveModel, Job, draw_prompt, greedy, make_engine, make_job, run_jobs

pytestmark = pytest.mark.m9

LAYOUTS = [(2, 1), (4, 1), (1, 2), (2, 2)]  # parts, stages
PRESETS = [rung.id for rung in engine_rungs()]
NUM_TOKENS = 12
PROMPT_LENGTHS = [1, 17, 40]
MAX_MODEL_LEN = 64

FolderOf = Callable[[str], Path]
JobsOf = Callable[[Path], list[Job]]

# A GPTQ checkpoint per family, of sizes whose parts fill words on 4 ranks (3 bits: units of 32).
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama-4bit": ("Llama", {"intermediate_size": 96, "num_hidden_layers": 3}, {"group_size": 32}),  # a group is cut
    "llama-act-order": ("Llama", {"intermediate_size": 96}, {"desc_act": True, "sym": False}),
    "qwen2-3bit": ("Qwen2", {"head_dim": 32, "intermediate_size": 128}, {"bits": 3, "group_size": -1, "sym": False}),
    "qwen3-v2": ("Qwen3", {}, {"sym": False, "checkpoint_format": "gptq_v2"}),
}


def layout_args(layout: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("tensor_parallel_size", "pipeline_parallel_size"), layout, strict=True))


def preset_engine(folder: Path, preset: str, layout: tuple[int, int]) -> LLMEngine:
    """The engine as `LLM(folder, preset=...)` builds it, on ranks of the test."""
    config = EngineConfig.preset(preset, model=str(folder), dtype="float32", **layout_args(layout))
    config = config.resolve(load_hf_config(folder), "cpu")
    return LLMEngine(config, ThreadRanksExecutor(config, folder), tokenizer=None)


def ranks_of(engine: LLMEngine) -> ThreadRanksExecutor:
    executor = engine.engine_core.executor
    assert isinstance(executor, ThreadRanksExecutor)
    return executor


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name in PARALLEL_MODELS:
                made[name] = make_parallel(name, folder)
            else:
                family, sizes, config = CHECKPOINTS[name]
                made[name] = quantize(make_quantizable(family, folder / "plain", **sizes), folder / "gptq", **config)
        return made[name]

    return get


@pytest.fixture(scope="module")
def jobs_of() -> JobsOf:
    made: dict[Path, list[Job]] = {}

    def get(folder: Path) -> list[Job]:
        if folder not in made:
            model = GapNaiveModel(folder)
            made[folder] = [make_job(model, length, NUM_TOKENS, seed) for seed, length in enumerate(PROMPT_LENGTHS)]
        return made[folder]

    return get


# .ci/run runs every combination. `make test` runs a part of them in which every two values meet.
RUNGS = {"name": list(PARALLEL_MODELS), "preset": PRESETS, "layout": LAYOUTS}
# The linear backends use the kernels `dequant` and, with a compiler, `cpu_int4`.
KERNELS = {"name": list(CHECKPOINTS), "linear_backend": ["torch", "auto"], "layout": LAYOUTS}


@pytest.mark.parametrize(tuple(RUNGS), slow_but_pairwise(RUNGS))
def test_every_rung_on_every_layout(
    name: str, preset: str, layout: tuple[int, int], folder_of: FolderOf, jobs_of: JobsOf
) -> None:
    jobs = jobs_of(folder_of(name))
    engine = preset_engine(folder_of(name), preset, layout)
    assert run_jobs(engine, jobs, late=1) == [job.tokens for job in jobs]
    assert len(ranks_of(engine).workers) == layout[0] * layout[1]


@pytest.mark.parametrize(tuple(KERNELS), slow_but_pairwise(KERNELS))
def test_gptq_checkpoints(
    name: str, linear_backend: str, layout: tuple[int, int], folder_of: FolderOf, jobs_of: JobsOf
) -> None:
    args = {"quantization": "auto", "linear_backend": linear_backend, "fused_ops": "auto", "fused_mlp": "auto"}
    jobs = jobs_of(folder_of(name))
    engine = make_engine(folder_of(name), decoder_stack="auto", attention_backend="auto", **args, **layout_args(layout))
    assert run_jobs(engine, jobs, late=1) == [job.tokens for job in jobs]


# What gets into each other's way: chunks, hits, copies of partial blocks, preemptions, priorities.
CROWDED: dict[str, dict[str, Any]] = {
    "chunks": {"block_size": 4, "enable_chunked_prefill": True, "max_num_batched_tokens": 7},
    "preempted": {"block_size": 4, "num_kv_blocks": MAX_MODEL_LEN // 4 + 1},
    "hits": {"block_size": 4, "enable_prefix_caching": True, "partial_block_hits": True},
    "all of them": {
        "block_size": 5,
        "num_kv_blocks": 14,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 16,
        "enable_prefix_caching": True,
        "prefix_index": "trie",
        "partial_block_hits": True,
        "reserve_full_sequence": False,
        "scheduling_policy": "priority",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("args", CROWDED.values(), ids=CROWDED)
def test_crowded_engines(
    args: dict[str, Any], layout: tuple[int, int], folder_of: FolderOf, jobs_of: JobsOf, common_jobs: list[Job]
) -> None:
    engine = make_engine(folder_of("qwen3"), max_model_len=MAX_MODEL_LEN, **args, **layout_args(layout))
    for _ in range(2):  # the second time with a warm cache
        assert run_jobs(engine, common_jobs, late=2) == [job.tokens for job in common_jobs]
    assert ("num_kv_blocks" in args) == (engine.stats().num_preemptions > 0)
    assert ("enable_prefix_caching" in args) == (engine.stats().prefix_cache_hits > 0)


@pytest.fixture(scope="module")
def common_jobs(folder_of: FolderOf) -> list[Job]:
    """Prompts that begin alike."""
    model, common = GapNaiveModel(folder_of("qwen3")), draw_prompt(21, seed=5)
    return [make_job(model, 24 + 3 * i, 16, seed=i, priority=i % 3, prefix=common) for i in range(5)]


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("sampler_backend", ["torch", "auto"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_seeded_sampling(layout: tuple[int, int], sampler_backend: str, folder_of: FolderOf) -> None:
    """Every rank of the last stage draws the same token, which is the one that a single process draws."""
    model = GapNaiveModel(folder_of("qwen2"))
    jobs = [
        model.run(draw_prompt(5 + 4 * i, seed=i), SamplingParams(seed=i, max_tokens=12, ignore_eos=True, **params))
        for i, params in enumerate(SAMPLINGS)
    ]
    engine = make_engine(folder_of("qwen2"), sampler_backend=sampler_backend, **layout_args(layout))
    assert run_jobs(engine, jobs, late=2) == [job.tokens for job in jobs]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_of_prompt_and_output(layout: tuple[int, int], folder_of: FolderOf) -> None:
    def run(**args: Any) -> tuple[list[dict[int, Any] | None], list[dict[int, Any]]]:
        engine = make_engine(folder_of("biases"), block_size=4, **args)
        params = SamplingParams(temperature=0.0, max_tokens=5, prompt_logprobs=2, logprobs=2, detokenize=False)
        engine.add_request("a", {"prompt_token_ids": draw_prompt(19, seed=3)}, params)
        while engine.has_unfinished_requests():
            (output,) = engine.step() or [None]
        assert output is not None
        return output.prompt_logprobs, output.outputs[0].logprobs

    def flat(entries: list[dict[int, Any] | None]) -> list[tuple[int, float, int]]:
        return [(token, entry.logprob, entry.rank) for position in entries for token, entry in (position or {}).items()]

    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 8}
    for single, several in zip(run(), run(**chunks, **layout_args(layout)), strict=True):
        assert [(t, r) for t, _, r in flat(single)] == [(t, r) for t, _, r in flat(several)]
        assert [v for _, v, _ in flat(several)] == pytest.approx([v for _, v, _ in flat(single)], abs=1e-4)


@pytest.mark.parametrize("layout", [*LAYOUTS, (1, 3), (4, 2)])
@pytest.mark.parametrize("dtype,dtype_bytes", [("float32", 4), ("bfloat16", 2)])
def test_communication_is_what_the_plan_says(
    layout: tuple[int, int], dtype: str, dtype_bytes: int, folder_of: FolderOf
) -> None:
    """Per forward pass and rank: 2 all-reduces for each layer and 1 for the embedding, 1 all-gather for the logits."""
    folder = folder_of("mistral")
    engine = make_engine(
        folder, dtype=dtype, enable_chunked_prefill=True, max_num_batched_tokens=16, block_size=4, **layout_args(layout)
    )
    executor = ranks_of(engine)
    steps: list[SchedulerOutput] = []
    execute = executor.execute
    executor.execute = lambda output: (steps.append(output), execute(output))[1]  # type: ignore[method-assign]
    run_jobs(engine, [Job(draw_prompt(20, seed), greedy(8), [], 0.0) for seed in range(6)])
    steps = [step for step in steps if not step.is_empty]
    assert any(not step.sampling_req_ids for step in steps) and any(len(step.sampling_req_ids) > 1 for step in steps)
    for groups in executor.groups:
        plan = CommunicationPlan(load_hf_config(folder), groups.shard, dtype_bytes)
        calls: Counter[str] = Counter()
        num_bytes: Counter[str] = Counter()
        for step in steps:
            calls += Counter(plan.calls(len(step.sampling_req_ids)))
            num_bytes += Counter(plan.bytes(step.total_num_scheduled_tokens, len(step.sampling_req_ids)))
        counted = [groups.tp.counts, groups.pp.counts]
        assert Counter({k: v for c in counted for k, v in c.calls.items() if k != "receive"}) == calls
        assert Counter({k: v for c in counted for k, v in c.bytes.items() if k != "receive"}) == num_bytes
    layers, parts = load_hf_config(folder).num_hidden_layers, layout[0]
    total = sum(groups.tp.counts.calls.get("all_reduce", 0) for groups in executor.groups)
    assert total == (parts * len(steps) * (2 * layers + 1) if parts > 1 else 0)


def test_a_rank_that_raises_fails_the_step_and_not_the_engine(
    folder_of: FolderOf, jobs_of: JobsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(folder_of("qwen2"))
    engine = make_engine(folder_of("qwen2"), block_size=4, **layout_args((2, 2)))
    victim = ranks_of(engine).workers[1].model_runner
    execute = ModelRunner.execute
    for count in (0, 5):
        engine.add_request("x", {"prompt_token_ids": draw_prompt(6, seed=1)}, jobs[0].params.replace(detokenize=False))
        for _ in range(count):
            engine.step()

        def fail(runner: ModelRunner, output: SchedulerOutput) -> Any:
            if runner is victim:
                raise ZeroDivisionError("rank 1")
            return execute(runner, output)

        with monkeypatch.context() as patch:
            patch.setattr(ModelRunner, "execute", fail)
            with pytest.raises(ZeroDivisionError, match="rank 1"):
                for _ in range(3):
                    engine.step()
        assert run_jobs(engine, jobs, late=1) == [job.tokens for job in jobs]
