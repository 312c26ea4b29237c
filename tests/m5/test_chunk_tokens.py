"""What a user sees does not depend on the budget: tokens, texts, logprobs, stops, samples (R5.10 to R5.13).

Milestone: M5. Tiny random models in fp32 on the real engine. The yardstick is each request alone, its prompt computed
whole; the arms cut prompts into chunks of 1 to 64 tokens, mix them with decodes, and preempt in mid-prompt.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.attention.backend import AttentionMetadata
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.outputs import CompletionOutput, Logprob, RequestOutput
from folovllm.worker.model_runner import ModelRunner
from tests.parity_helpers import GapNaiveModel, Job, add_job, draw_prompt, greedy, make_engine, make_job, run_jobs

pytestmark = pytest.mark.m5

MakeTiny = Callable[[str], Path]
Entries = Sequence[dict[int, Logprob] | None] | None

MAX_MODEL_LEN = 64
ROOMY: dict[str, Any] = {"block_size": 16, "max_num_seqs": 16}
# One request of max_model_len and not a block more, admitted by its first chunk: prompts are preempted in their middle.
DRY: dict[str, Any] = {"block_size": 4, "num_kv_blocks": 17, "max_num_seqs": 16, "reserve_full_sequence": False}
ARMS: dict[str, dict[str, Any]] = {
    "all": ROOMY,
    "budget 64": ROOMY | {"max_num_batched_tokens": 64},
    "budget 16": ROOMY | {"max_num_batched_tokens": 16},
    "budget 7": ROOMY | {"max_num_batched_tokens": 7},
    "budget 1": ROOMY | {"max_num_batched_tokens": 1},
    "threshold 3": ROOMY | {"long_prefill_token_threshold": 3},
    "all, preempting": DRY,
    "budget 64, preempting": DRY | {"max_num_batched_tokens": 64},
    "budget 16, preempting": DRY | {"max_num_batched_tokens": 16},
    "budget 7, preempting": DRY | {"max_num_batched_tokens": 7},
    "static, budget 16": ROOMY | {"batching": "static", "max_num_batched_tokens": 16},
    "by priority, budget 16": DRY | {"scheduling_policy": "priority", "max_num_batched_tokens": 16},
}

# ---- everything a request can ask for

ASKS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.0, "prompt_logprobs": 2},
    {"temperature": 1.0, "seed": 1, "logprobs": 0, "prompt_logprobs": 0},
    {"temperature": 1.0},  # without a seed of its own
    {"temperature": 0.8, "seed": 2, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 0.0, "repetition_penalty": 1.5},  # over the tokens of the prompt: those of all its chunks
    {"temperature": 1.0, "seed": 4, "n": 3, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 5, "min_tokens": 6, "stop_token_ids": list(range(3, 200))},
    {"temperature": 1.0, "seed": 6, "stop": ["&", "h~", ";\x0b"]},
    {
        "temperature": 1.0,
        "seed": 7,
        "stop": ["nu"],
        "include_stop_str_in_output": True,
        "allowed_token_ids": [70, 80, 87],
    },
    {"temperature": 1.0, "seed": 8, "logit_bias": {7: 4.0}, "bad_words": ["a", "th"]},
]
PROMPTS = [draw_prompt(3 + (11 * i) % 47, seed=i) for i in range(len(ASKS))]  # 3 to 49 tokens


def make_llm(folder: Path, **engine_args: Any) -> LLM:
    return LLM(str(folder), dtype="float32", max_model_len=MAX_MODEL_LEN, **engine_args)


def ask(llm: LLM, together: bool) -> list[RequestOutput]:
    params = [SamplingParams(**{"max_tokens": 14, "ignore_eos": True} | args) for args in ASKS]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    if together:
        return llm.generate(prompts, params, use_tqdm=False)
    return [llm.generate([p], [s], use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]


@pytest.fixture(scope="module")
def alone(tiny_model_dir: MakeTiny) -> list[RequestOutput]:
    return ask(make_llm(tiny_model_dir("qwen3"), preset="m1"), together=False)


@pytest.mark.parametrize("engine_args", ARMS.values(), ids=ARMS)
def test_everything_a_request_can_ask_for(
    engine_args: dict[str, Any], tiny_model_dir: MakeTiny, alone: list[RequestOutput]
) -> None:
    llm = make_llm(tiny_model_dir("qwen3"), preset="m5", **engine_args)
    for ours, theirs in zip(ask(llm, together=True), alone, strict=True):
        assert list(map(visible, ours.outputs)) == list(map(visible, theirs.outputs))
        same_logprobs(ours.prompt_logprobs, theirs.prompt_logprobs)
        for mine, its in zip(ours.outputs, theirs.outputs, strict=True):
            same_logprobs(mine.logprobs, its.logprobs)
    assert (llm.stats().num_preemptions > 0) == ("num_kv_blocks" in engine_args)


def visible(completion: CompletionOutput) -> tuple[Any, ...]:
    return completion.index, completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason


def same_logprobs(ours: Entries, theirs: Entries) -> None:
    assert (ours is None) == (theirs is None)
    for mine, its in zip(ours or [], theirs or [], strict=True):
        assert (mine is None) == (its is None)
        assert list(mine or {}) == list(its or {})
        for entry, other in zip((mine or {}).values(), (its or {}).values(), strict=True):
            assert (entry.rank, entry.decoded_token) == (other.rank, other.decoded_token)
            assert entry.logprob == pytest.approx(other.logprob, abs=2e-4)


def test_the_yardstick_is_worth_something(alone: list[RequestOutput]) -> None:
    """Every way of stopping occurs, logprobs are there, samples differ from each other."""
    completions = [completion for output in alone for completion in output.outputs]
    stops = {(c.finish_reason, type(c.stop_reason)) for c in completions}
    assert stops == {("length", type(None)), ("stop", int), ("stop", str)}
    assert len({tuple(c.token_ids) for c in completions}) == len(completions) == len(ASKS) + 2
    asked = [output for output in alone if output.prompt_logprobs is not None]
    assert [len(output.prompt_logprobs or []) for output in asked] == [len(o.prompt_token_ids or []) for o in asked]
    assert len(asked) == 3 and sum(completion.logprobs is not None for completion in completions) == 2


# ---- greedy, on every architecture, at the edges of blocks and budgets

BUDGETS = [1, 7, 16, 64, None]
LENGTHS = [1, 7, 8, 14, 15, 16, 17, 32, 33, 48]


@pytest.mark.parametrize("model", ["llama", "qwen2", "mistral"])
def test_one_set_of_tokens(model: str, tiny_model_dir: MakeTiny) -> None:
    """generate_naive's; and a budget is seen to split what it must."""
    naive = GapNaiveModel(tiny_model_dir(model))
    jobs = [make_job(naive, length, 12, seed) for seed, length in enumerate(LENGTHS)]
    steps = []
    for budget in BUDGETS:
        engine = make_engine(
            tiny_model_dir(model), enable_chunked_prefill=True, max_num_batched_tokens=budget,
            attention_backend="auto", max_model_len=MAX_MODEL_LEN, block_size=8, max_num_seqs=16,
        )  # fmt: skip
        assert run_jobs(engine, jobs, late=4) == [job.tokens for job in jobs], f"differs with budget {budget}"
        steps.append(engine.stats().num_steps)
    assert steps == sorted(steps, reverse=True) and steps[-1] < steps[0] / 10
    assert steps[0] == sum(LENGTHS) + 11 * len(LENGTHS), "one token per step, and none computed twice"


# ---- the cache, and what attention is told


def runner_of(engine: LLMEngine) -> ModelRunner:
    executor = engine.engine_core.executor
    assert isinstance(executor, UniProcExecutor)
    return executor.worker.model_runner


def chunked_engine(folder: Path, budget: int | None, **args: Any) -> LLMEngine:
    """Its cache is filled with NaN: whoever reads a slot that nobody has written yet gives nonsense."""
    engine = make_engine(
        folder, enable_chunked_prefill=True, max_num_batched_tokens=budget, max_model_len=MAX_MODEL_LEN, block_size=4,
        **args,
    )  # fmt: skip
    runner_of(engine).kv_caches.fill_(float("nan"))
    return engine


@pytest.fixture(scope="module")
def long_job(tiny_model_dir: MakeTiny) -> Job:
    return make_job(GapNaiveModel(tiny_model_dir("llama_rope")), 30, 6, seed=3)


@pytest.mark.parametrize("budget", [1, 3, 4, 7, 29])
def test_chunks_leave_the_same_kv_behind(budget: int, tiny_model_dir: MakeTiny, long_job: Job) -> None:
    """Slot by slot: block edges and chunk edges fall together (4), apart (3, 7), or on the last token (29)."""
    caches = []
    for tokens in (None, budget):
        engine = chunked_engine(tiny_model_dir("llama_rope"), tokens)
        assert run_jobs(engine, [long_job]) == [long_job.tokens]
        caches.append(runner_of(engine).kv_caches)
    written = ~caches[0].isnan()
    assert 0 < written.float().mean() < 1 and torch.equal(written, ~caches[1].isnan())
    torch.testing.assert_close(caches[1][written], caches[0][written], atol=1e-4, rtol=1e-4)


def intercept(engine: LLMEngine, look: Callable[[AttentionMetadata], None]) -> None:
    """Call `look` with the metadata of every step before the backend gets it."""
    backend = runner_of(engine).backend
    prepare = backend.prepare

    def looked_at(metadata: AttentionMetadata) -> None:
        look(metadata)
        prepare(metadata)

    setattr(backend, "prepare", looked_at)  # noqa: B010 - mypy refuses to assign to a method


def test_attention_is_told_the_end_of_the_chunk(tiny_model_dir: MakeTiny, long_job: Job) -> None:
    """nano-vllm issue 212: keys were counted to the end of the prompt, into slots not written, blocks not allocated."""
    engine = chunked_engine(tiny_model_dir("llama_rope"), budget=13)
    seen: list[AttentionMetadata] = []
    intercept(engine, seen.append)
    assert run_jobs(engine, [long_job]) == [long_job.tokens]
    assert [(m.query_start_loc, m.seq_lens) for m in seen[:4]] == [
        ([0, 13], [13]), ([0, 13], [26]), ([0, 4], [30]), ([0, 1], [31]),
    ]  # fmt: skip


@pytest.mark.parametrize("backend", ["torch_naive", "torch_sdpa"])
def test_the_bug_of_issue_212_would_be_seen(backend: str, tiny_model_dir: MakeTiny, long_job: Job) -> None:
    """The same engine told the length of the whole prompt gives other tokens."""
    engine = chunked_engine(tiny_model_dir("llama_rope"), budget=13, attention_backend=backend)

    def told_wrong(metadata: AttentionMetadata) -> None:
        metadata.seq_lens = [max(length, 30) for length in metadata.seq_lens]

    intercept(engine, told_wrong)
    add_job(engine, long_job, "a")
    request = engine.engine_core.scheduler.requests["a"]
    while engine.has_unfinished_requests():
        engine.step()
    assert request.output_token_ids != long_job.tokens


def test_no_logits_in_mid_prompt(tiny_model_dir: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of the model, a fifth of the default one, runs only for rows that are sampled."""
    engine = chunked_engine(tiny_model_dir("llama_rope"), budget=10)
    model, rows = runner_of(engine).model, []
    compute_logits = model.compute_logits

    def counted(hidden_states: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden_states))
        return compute_logits(hidden_states)

    monkeypatch.setattr(model, "compute_logits", counted)
    run_jobs(engine, [Job(draw_prompt(35, seed=1), greedy(3), [], 0.0)])
    assert rows == [1, 1, 1] and engine.stats().num_steps == 4 + 2
