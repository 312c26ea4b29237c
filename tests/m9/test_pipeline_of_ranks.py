"""Steps in flight on a real model, whose stages are threads: resets, aborts and failing ranks cost no token."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.worker.model_runner import ModelRunner
from tests.m9.parallel_models import make_parallel
from tests.m9.thread_ranks import ThreadRanksExecutor
from tests.parity_helpers import GapNaiveModel, Job, add_job, draw_prompt, make_engine, make_job

pytestmark = pytest.mark.m9

CROWDED: dict[str, Any] = {
    "max_model_len": 64,
    "block_size": 4,
    "num_kv_blocks": 24,
    "max_num_batched_tokens": 12,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "partial_block_hits": True,
    "reserve_full_sequence": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parallel("qwen3", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def jobs(folder: Path) -> list[Job]:
    """Prompts that begin alike, so that later steps hit what steps in flight compute."""
    model, common = GapNaiveModel(folder), draw_prompt(14, seed=7)
    return [make_job(model, 17 + 2 * i, 14, seed=i, prefix=common) for i in range(6)]


class FaultyRank:
    """`ModelRunner.execute`, which raises once for one runner after it is armed, half of the time when it has run."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.victim, self.num_raised = rng, None, 0
        self.execute: Callable[..., Any] = ModelRunner.execute

    def __call__(self, runner: ModelRunner, output: SchedulerOutput) -> Any:
        if runner is not self.victim or output.is_empty:
            return self.execute(runner, output)
        self.victim = None
        self.num_raised += 1
        if self.rng.random() < 0.5:
            self.execute(runner, output)
        raise ZeroDivisionError("a rank")


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_life(
    tp: int, pp: int, seed: int, folder: Path, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    engine = make_engine(folder, **CROWDED, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    executor, faulty = engine.engine_core.executor, FaultyRank(rng)
    assert isinstance(executor, ThreadRanksExecutor)
    monkeypatch.setattr(ModelRunner, "execute", lambda runner, output: faulty(runner, output))
    tokens: dict[str, list[int]] = {}
    most_in_flight = 0
    todo = [(f"{i}-{k}", job) for k in range(3) for i, job in enumerate(jobs)]
    wanted = dict(todo)
    while todo or engine.has_unfinished_requests():
        if todo and rng.random() < 0.5:
            add_job(engine, todo[0][1], todo.pop(0)[0])
        if rng.random() < 0.05:
            faulty.victim = rng.choice(executor.workers).model_runner
        if rng.random() < 0.05:
            engine.reset_prefix_cache(reset_running_requests=True)
        if wanted and rng.random() < 0.02:
            victim = rng.choice([i for i in wanted if i not in tokens])
            engine.abort_request(victim)
            wanted.pop(victim)
            todo = [(i, job) for i, job in todo if i != victim]
        tokens |= step(engine)
        most_in_flight = max(most_in_flight, 1 + len(executor.under_way))
    assert {i: tokens[i] for i in wanted} == {i: job.tokens for i, job in wanted.items()}
    assert most_in_flight == pp and faulty.num_raised > 0 and engine.stats().prefix_cache_hits > 0
    engine.engine_core.scheduler.check_integrity()
    assert engine.stats().kv_cache_usage == 0.0


def step(engine: LLMEngine) -> dict[str, list[int]]:
    """One step, in which no request is to blame. Returns the texts of the requests that have finished."""
    try:
        outputs = engine.step(blamed=())
    except (ZeroDivisionError, TimeoutError):  # the latter: a step in flight beside one that raised
        return {}
    return {output.request_id: output.outputs[0].token_ids for output in outputs if output.finished}
