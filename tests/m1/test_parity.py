"""The whole engine against HuggingFace and against `generate_naive`, on tiny random models (R1.46).

Milestone: M1. Greedy: HuggingFace's tokens, for every architecture and preset. Seeded sampling: the tokens of
`generate_naive`, whoever else is in the batch, whatever the preset, with and without preemptions.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.config import EngineConfig
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.hf_config import load_hf_config
from folovllm.milestones import engine_rungs
from folovllm.sampling_params import SamplingParams
from tests.parity_helpers import (
    MIN_GAP,
    MIN_VARIETY,
    GapNaiveModel,
    Job,
    draw_prompt,
    greedy,
    make_engine,
    make_job,
    run_jobs,
)
from tests.tiny_models import TINY_MODELS

pytestmark = pytest.mark.m1

NUM_TOKENS = 64
PROMPT_LENGTHS = [1, 3, 17, 40, 130]
PRESETS = [rung.id for rung in engine_rungs()]

MakeTiny = Callable[[str], Path]
JobsOf = Callable[[str], list[Job]]


def preset_engine(folder: Path, preset: str, **overrides: Any) -> LLMEngine:
    """The engine as `LLM(folder, preset=...)` builds it."""
    config = EngineConfig.preset(preset, model=str(folder), dtype="float32", **overrides)
    config = config.resolve(load_hf_config(folder), "cpu")
    return LLMEngine(config, UniProcExecutor(config, folder), tokenizer=None)


@pytest.fixture(scope="module")
def jobs_of(tiny_model_dir: MakeTiny) -> JobsOf:
    """A model's greedy jobs with the oracle's tokens, free of ties."""
    made: dict[str, list[Job]] = {}

    def get(name: str) -> list[Job]:
        if name not in made:
            model = GapNaiveModel(tiny_model_dir(name))
            made[name] = [make_job(model, length, NUM_TOKENS, seed) for seed, length in enumerate(PROMPT_LENGTHS)]
        return made[name]

    return get


# --- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_MODELS)
def test_naive_equals_huggingface(name: str, tiny_model_dir: MakeTiny, jobs_of: JobsOf) -> None:
    from folovllm.entrypoints.commands.hf_baseline import hf_greedy

    jobs = jobs_of(name)
    prompts = [job.prompt_token_ids for job in jobs]
    counts = [NUM_TOKENS] * len(jobs)
    theirs = hf_greedy(tiny_model_dir(name), prompts, counts, ignore_eos=True, warm_up=False).token_ids
    assert [job.tokens for job in jobs] == theirs
    assert min(job.min_gap for job in jobs) > MIN_GAP
    assert all(len(set(tokens)) >= MIN_VARIETY for tokens in theirs), "short loops prove little"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_preset_equals_naive(name: str, preset: str, tiny_model_dir: MakeTiny, jobs_of: JobsOf) -> None:
    """And so HuggingFace, by the test above; one after the other with m1, together with the others."""
    jobs = jobs_of(name)
    engine = preset_engine(tiny_model_dir(name), preset)
    assert run_jobs(engine, jobs, late=2) == [job.tokens for job in jobs]


def test_presets_differ_in_how_they_run(tiny_model_dir: MakeTiny, jobs_of: JobsOf) -> None:
    """The same tokens are worth something only if the engines really are different ones."""
    steps, blocks = {}, {}
    for preset in ("m1", "m2", "m3"):
        engine = preset_engine(tiny_model_dir("llama"), preset)
        run_jobs(engine, jobs_of("llama"))
        steps[preset], blocks[preset] = engine.stats().num_steps, engine.config.block_size
    assert steps["m1"] == NUM_TOKENS * len(PROMPT_LENGTHS) and steps["m2"] == steps["m3"] == NUM_TOKENS
    assert blocks["m1"] == blocks["m2"] == 512 and blocks["m3"] == 16


def test_eos_ends_the_text_as_in_huggingface(tiny_model_dir: MakeTiny, tmp_path: Path) -> None:
    """A copy of a model whose EOS is a token that it is going to say: both stop right after it."""
    from folovllm.entrypoints.commands.hf_baseline import hf_greedy

    plain = GapNaiveModel(tiny_model_dir("llama")).run(draw_prompt(9, seed=1), greedy(NUM_TOKENS))
    eos = next(token for i, token in enumerate(plain.tokens) if i >= 20 and token not in plain.tokens[:i])
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "other_eos")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text()) | {"eos_token_id": eos}
        (folder / name).write_text(json.dumps(values))
    theirs = hf_greedy(folder, [plain.prompt_token_ids], [NUM_TOKENS], warm_up=False).token_ids[0]

    engine = make_engine(folder)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, detokenize=False)
    engine.add_request("a", plain.prompt_token_ids, params)
    while engine.has_unfinished_requests():
        outputs = engine.step()
    (completion,) = outputs[0].outputs
    assert completion.token_ids == theirs == plain.tokens[: plain.tokens.index(eos) + 1]
    # This engine has no tokenizer, so the configs' EOS is a stop id and is reported as one.
    assert (completion.finish_reason, completion.stop_reason) == ("stop", eos)


# --- seeded sampling --------------------------------------------------------------------------------------------------

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 1.2, "min_p": 0.05},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"temperature": 1.0, "logit_bias": {7: 5.0, 9: -100.0}, "min_tokens": 10},
    {"temperature": 1.0, "allowed_token_ids": list(range(10, 60))},
    {"temperature": 0.0},  # greedy rows between the others
]
SAMPLED_TOKENS = 24
MAX_MODEL_LEN = 64


@pytest.fixture(scope="module")
def sampled_jobs(tiny_model_dir: MakeTiny) -> list[Job]:
    model = GapNaiveModel(tiny_model_dir("qwen3"))
    shared = {"max_tokens": SAMPLED_TOKENS, "ignore_eos": True}
    return [
        model.run(draw_prompt(5 + 4 * i, seed=i), SamplingParams(seed=100 + i, **shared, **params))
        for i, params in enumerate(SAMPLINGS)
    ]


ENGINES: dict[str, dict[str, Any]] = {
    "m1": {"max_num_seqs": 1, "batching": "static"},
    "m2": {},
    "m3": {"block_size": 16},
    "three at a time": {"max_num_seqs": 3, "block_size": 5},
    "preempted": {"block_size": 4, "num_kv_blocks": MAX_MODEL_LEN // 4 + 1},
    "in chunks": {"block_size": 4, "enable_chunked_prefill": True, "max_num_batched_tokens": 13},
    "by priority": {"block_size": 4, "num_kv_blocks": MAX_MODEL_LEN // 4 + 1, "scheduling_policy": "priority"},
}


@pytest.mark.parametrize("engine_args", ENGINES.values(), ids=ENGINES)
def test_seeded_sampling_does_not_depend_on_the_engine(
    engine_args: dict[str, Any], tiny_model_dir: MakeTiny, sampled_jobs: list[Job]
) -> None:
    engine = make_engine(tiny_model_dir("qwen3"), max_model_len=MAX_MODEL_LEN, **engine_args)
    assert run_jobs(engine, sampled_jobs, late=3) == [job.tokens for job in sampled_jobs]
    assert ("num_kv_blocks" in engine_args) == (engine.stats().num_preemptions > 0)


def test_seeded_sampling_alone_and_in_another_order(tiny_model_dir: MakeTiny, sampled_jobs: list[Job]) -> None:
    engine = make_engine(tiny_model_dir("qwen3"), max_model_len=MAX_MODEL_LEN, block_size=16)
    for job in sampled_jobs:
        assert run_jobs(engine, [job]) == [job.tokens]
    assert run_jobs(engine, sampled_jobs[::-1]) == [job.tokens for job in sampled_jobs[::-1]]


def test_the_seed_matters(tiny_model_dir: MakeTiny, sampled_jobs: list[Job]) -> None:
    model = GapNaiveModel(tiny_model_dir("qwen3"))
    for job in sampled_jobs[:6]:
        other = model.run(job.prompt_token_ids, job.params.replace(seed=7))
        assert other.tokens != job.tokens


def test_unseeded_requests_repeat_with_the_engine_seed(tiny_model_dir: MakeTiny) -> None:
    def run(seed: int) -> list[list[int]]:
        engine = make_engine(tiny_model_dir("llama"), seed=seed)
        params = SamplingParams(max_tokens=16, ignore_eos=True)
        return run_jobs(engine, [Job(draw_prompt(5, seed=1), params, [], 0.0)] * 3)

    first = run(seed=1)
    assert run(seed=1) == first and run(seed=2) != first
    assert len({tuple(tokens) for tokens in first}) == 3, "each request has noise of its own"


def test_prompt_logprobs_do_not_depend_on_the_engine(tiny_model_dir: MakeTiny) -> None:
    """Whole, in chunks of 5, and preempted in the middle of the prompt: the same numbers, once each."""
    prompt, params = draw_prompt(30, seed=3), SamplingParams(temperature=0.0, max_tokens=8, prompt_logprobs=2)
    chunks = {"block_size": 4, "enable_chunked_prefill": True, "max_num_batched_tokens": 5}
    too_small = chunks | {"num_kv_blocks": MAX_MODEL_LEN // 4 + 1, "reserve_full_sequence": False}
    whole, *others = (
        prompt_logprobs_of(make_engine(tiny_model_dir("mistral"), max_model_len=MAX_MODEL_LEN, **args), prompt, params)
        for args in ({}, chunks, too_small)
    )
    assert whole.shape == (29, 3, 2)
    for other in others:
        torch.testing.assert_close(other, whole, atol=1e-4, rtol=0)


def prompt_logprobs_of(engine: LLMEngine, prompt: list[int], params: SamplingParams) -> torch.Tensor:
    """[num_prompt_tokens - 1, 3, 2]: (token, logprob) of the top two and of the token itself.

    An older request grows beside it; in an engine with a pool for one, this one has to give way in mid-prompt.
    """
    engine.add_request("older", draw_prompt(30, seed=4), greedy(30, detokenize=False))
    engine.add_request("asks", prompt, params.replace(detokenize=False))
    request = engine.engine_core.scheduler.requests["asks"]
    gave_way_at, entries = None, None
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.request_id == "asks" and output.finished:
                entries = output.prompt_logprobs
        if request.num_preemptions and gave_way_at is None:
            gave_way_at = request.num_output_tokens
    assert gave_way_at == (0 if engine.config.cache_config.num_kv_blocks else None)
    assert entries is not None and entries[0] is None and len(entries) == len(prompt)
    rows = []
    for token, entry in zip(prompt[1:], entries[1:], strict=True):
        ranked = sorted(((t, lp.logprob) for t, lp in entry.items()), key=lambda pair: -pair[1])[:2]
        rows.append([*ranked, (token, entry[token].logprob)])
    return torch.tensor(rows)
