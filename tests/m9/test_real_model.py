"""The default model, 9 query heads and 3 KV heads, in fp32: on 3 parts, 2 stages and both, one process's tokens.

A difference is forgiven only where the top two logits were closer than 1e-3: ranks add in another order.
"""

from pathlib import Path
from typing import Any

import pytest

from folovllm.communication_plan import CommunicationPlan
from folovllm.config import EngineConfig
from folovllm.engine.llm_engine import LLMEngine
from folovllm.hf_config import load_hf_config
from tests.m3.test_real_model import MAX_MODEL_LEN, TIE, mixed_jobs
from tests.m9.thread_ranks import ThreadRanksExecutor
from tests.parity_helpers import Job, add_job, make_executor, run_jobs

pytestmark = [pytest.mark.m9, pytest.mark.weights]

NUM_JOBS = 14
LAYOUTS = {"TP 3": (3, 1), "PP 2": (1, 2), "TP 3 x PP 2": (3, 2)}
Yardstick = tuple[list[Job], list[list[int]], list[list[float]]]


def real_engine(folder: Path, preset: str = "m7", layout: tuple[int, int] = (1, 1), **args: Any) -> LLMEngine:
    parallel = dict(zip(("tensor_parallel_size", "pipeline_parallel_size"), layout, strict=True))
    args = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 16} | parallel | args
    config = EngineConfig.preset(preset, model=str(folder), **args).resolve(load_hf_config(folder), "cpu")
    return LLMEngine(config, make_executor(config, folder), tokenizer=None)


@pytest.fixture(scope="module")
def single(model_dir: Path) -> Yardstick:
    """Jobs, their tokens on one rank, and how close each decision was."""
    jobs = [job for job in mixed_jobs(model_dir) if len(job.prompt_token_ids) <= 64][:NUM_JOBS]
    engine = real_engine(model_dir)
    completions: dict[str, Any] = {}
    for i, job in enumerate(jobs):
        add_job(engine, Job(job.prompt_token_ids, job.params.replace(logprobs=2), [], 0.0), str(i))
    while engine.has_unfinished_requests():
        completions |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
    ordered = [completions[str(i)] for i in range(len(jobs))]
    tops = [[sorted((lp.logprob for lp in e.values()), reverse=True) for e in c.logprobs] for c in ordered]
    return jobs, [c.token_ids for c in ordered], [[first - second for first, second, *_ in top] for top in tops]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_several_ranks_give_the_tokens_of_one(layout: tuple[int, int], model_dir: Path, single: Yardstick) -> None:
    jobs, expected, gaps = single
    engine = real_engine(model_dir, layout=layout)
    got = run_jobs(engine, jobs, late=4)
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert len(ours) == len(theirs) == jobs[i].params.max_tokens
        first = next((k for k in range(len(ours)) if ours[k] != theirs[k]), None)
        assert first is None or gaps[i][first] < TIE, f"request {i} differs at token {first}: {ours} {theirs}"
    executor = engine.engine_core.executor
    assert isinstance(executor, ThreadRanksExecutor)
    arch = load_hf_config(model_dir)
    assert sum(len(w.model_runner.model.attention_layers()) for w in executor.workers) == 30 * layout[0]
    for worker in executor.workers:
        planned = CommunicationPlan(arch, worker.groups.shard, 4).calls(1).get("all_reduce", 0)
        counted = worker.groups.tp.counts.calls.get("all_reduce", 0)
        assert counted % planned == 0 < counted if planned else counted == 0


def test_the_plain_rungs_on_three_parts(model_dir: Path, single: Yardstick) -> None:
    """M3's textbook layers: two jobs, as every token costs a pass over all weights."""
    jobs, expected, gaps = single
    few = sorted(range(len(jobs)), key=lambda i: len(jobs[i].prompt_token_ids))[:2]
    for preset in ("m1", "m3"):
        got = run_jobs(real_engine(model_dir, preset, (3, 1)), [jobs[i] for i in few])
        for i, ours in zip(few, got, strict=True):
            first = next((k for k in range(len(ours)) if ours[k] != expected[i][k]), None)
            assert first is None or gaps[i][first] < TIE


def test_random_weights_have_the_shards_of_the_whole(model_dir: Path) -> None:
    """With load_format="dummy" there is only config.json to share."""
    jobs = [Job(list(range(5, 15)), mixed_jobs(model_dir)[0].params, [], 0.0)]
    one, three = (
        run_jobs(real_engine(model_dir, layout=layout, load_format="dummy"), jobs) for layout in ((1, 1), (3, 1))
    )
    assert one == three
