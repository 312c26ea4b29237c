"""For tests that demand the same tokens: jobs with the tokens `generate_naive` gives them, and engines to run them.

Milestone: M1. A job's prompt is drawn again until no greedy decision on its way was closer than MIN_GAP, so that
rounding, which differs with the shape of a batch, never decides: a different token is then always a bug.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from folovllm.config import (
    AttentionConfig,
    CacheConfig,
    EngineConfig,
    KernelConfig,
    ModelConfig,
    QuantizationConfig,
    SchedulerConfig,
)
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.base import Executor
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.hf_config import load_hf_config
from folovllm.parallel import ParallelConfig
from folovllm.request import Request
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.worker.naive import NaiveModel, generate_naive
from tests.m9.thread_ranks import ThreadRanksExecutor
from tests.tiny_models import VOCAB_SIZE

MIN_GAP = 1e-3
MIN_VARIETY = 12  # different tokens in a text (half of its length, if it is short): a loop would hide mistakes
MAX_DRAWS = 50
MAX_STEPS = 20_000

_PARTS: dict[str, Any] = {
    "model_config": ModelConfig,
    "cache_config": CacheConfig,
    "scheduler_config": SchedulerConfig,
    "attention_config": AttentionConfig,
    "kernel_config": KernelConfig,
    "quantization_config": QuantizationConfig,
    "parallel_config": ParallelConfig,
}


@dataclass(frozen=True)
class Job:
    """One request, and what `generate_naive` says it must give."""

    prompt_token_ids: list[int]
    params: SamplingParams
    tokens: list[int]
    min_gap: float
    priority: int = 0


class GapNaiveModel(NaiveModel):
    """A NaiveModel that notes how far the two largest logits were apart in each of its passes."""

    gaps: list[float]

    def logits(self, token_ids: list[int], position_offset: int = 0) -> torch.Tensor:
        logits = super().logits(token_ids, position_offset)  # [1, vocab_size]
        first, second = logits[0].topk(2).values.tolist()
        self.gaps.append(first - second)
        return logits

    def run(self, prompt_token_ids: list[int], params: SamplingParams, max_model_len: int | None = None) -> Job:
        self.gaps = []
        request = Request("oracle", list(prompt_token_ids), params, seed=params.seed or 0)
        tokens = generate_naive(self, request, max_model_len)
        return Job(prompt_token_ids, params, list(tokens), min(self.gaps))


def greedy(max_tokens: int, **args: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **args)


def draw_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_job(
    model: GapNaiveModel, length: int, num_tokens: int, seed: int, priority: int = 0, prefix: Sequence[int] = ()
) -> Job:
    """A greedy job whose top two logits are never closer than MIN_GAP and whose text does not loop: the first such
    prompt that `seed` leads to. It begins with `prefix`, and has `length` tokens in all."""
    for attempt in range(MAX_DRAWS):
        own = draw_prompt(length - len(prefix), 1000 * seed + attempt)
        job = model.run([*prefix, *own], greedy(num_tokens))
        if job.min_gap > MIN_GAP and len(set(job.tokens)) >= min(MIN_VARIETY, num_tokens / 2):
            return dataclasses.replace(job, priority=priority)
    raise AssertionError(f"no prompt of {length} tokens keeps clear of ties for {num_tokens} tokens")


def make_config(folder: Path, **args: Any) -> EngineConfig:
    """A resolved float32 config from flat arguments. Unlike EngineConfig.from_args it does not ask the ladder whether a
    switch's milestone is built: the scheduler knows chunked prefill long before the ladder offers it."""
    args = {"dtype": "float32"} | args
    parts = {}
    for part, cls in _PARTS.items():
        names = [f.name for f in dataclasses.fields(cls) if f.name in args]
        parts[part] = cls(**{name: args.pop(name) for name in names})
    return EngineConfig(**parts, **args).resolve(load_hf_config(folder), "cpu")


def make_engine(folder: Path, **args: Any) -> LLMEngine:
    config = make_config(folder, **args)
    return LLMEngine(config, make_executor(config, folder), tokenizer=None)


def make_executor(config: EngineConfig, folder: Path) -> Executor:
    """One worker in this thread, or several ranks in threads of their own."""
    if config.parallel_config.world_size == 1:
        return UniProcExecutor(config, folder)
    return ThreadRanksExecutor(config, folder)


@dataclass
class Collected:
    """Tokens by request id, as they come in."""

    tokens: dict[str, list[int]] = field(default_factory=dict)

    def step(self, engine: LLMEngine) -> None:
        for output in engine.step():
            if output.finished:
                self.tokens[output.request_id] = output.outputs[0].token_ids


def add_job(engine: LLMEngine, job: Job, request_id: str) -> None:
    params = job.params.replace(output_kind=RequestOutputKind.FINAL_ONLY, detokenize=False)
    engine.add_request(request_id, {"prompt_token_ids": job.prompt_token_ids}, params, priority=job.priority)


def run_jobs(engine: LLMEngine, jobs: Sequence[Job], late: int = 0) -> list[list[int]]:
    """Tokens of each job, all run together; the last `late` of them come one by one while the others run."""
    collected = Collected()
    for i, job in enumerate(jobs):
        if i >= len(jobs) - late:
            collected.step(engine)
        add_job(engine, job, str(i))
    for _ in range(MAX_STEPS):
        if not engine.has_unfinished_requests():
            break
        collected.step(engine)
    engine.engine_core.scheduler.check_integrity()
    return [collected.tokens[str(i)] for i in range(len(jobs))]
