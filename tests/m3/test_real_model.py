"""The default model in fp32 under every way of running it: 40 mixed requests, the same tokens (R2.23, R3.23).

Milestone: M3. The yardstick is each request alone in a contiguous cache; HuggingFace comes in through
tests/m1/test_parity_real.py. A difference is forgiven only where the top two logits were closer than 1e-3.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from folovllm.engine.tokenizer import Tokenizer
from scripts.dev.make_hf_fixture import PROMPTS, encode
from tests.parity_helpers import Job, add_job, greedy, make_engine, run_jobs

pytestmark = [pytest.mark.m3, pytest.mark.weights]

MAX_MODEL_LEN = 256
TIE = 1e-3
# Mostly short: alone, every token costs a pass over all the weights.
PROMPT_LENGTHS = [5, 8, 13, 16, 17, 21, 32, 33] * 4 + [40, 48, 60, 64, 90, 120, 160, 200]
NUM_TOKENS = [8] * 30 + [12] * 7 + [24, 40, 48]
LATE = 10  # so many arrive while the others run

ENGINES: dict[str, dict[str, Any]] = {
    "continuous, all together": {"max_num_seqs": 40, "block_size": 16},
    "static, 8 at a time": {"max_num_seqs": 8, "block_size": 16, "batching": "static"},
    "a pool for one": {"max_num_seqs": 16, "block_size": 1, "num_kv_blocks": MAX_MODEL_LEN + 1},
}


def mixed_jobs(folder: Path) -> list[Job]:
    """40 pieces of the fixture's prompts, long and short, in no particular order."""
    tokenizer = Tokenizer.from_folder(folder)
    text = [token for prompt in PROMPTS.values() for token in encode(tokenizer, prompt)]
    rng = random.Random(19)  # an order in which the small pool runs dry 14 times (lengths alone decide that)
    lengths, counts = rng.sample(PROMPT_LENGTHS, 40), rng.sample(NUM_TOKENS, 40)
    starts = [rng.randrange(len(text) - length) for length in lengths]
    prompts = [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    return [Job(p, greedy(n), [], 0.0, rng.randrange(3)) for p, n in zip(prompts, counts, strict=True)]


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> tuple[list[Job], list[list[int]], list[list[float]]]:
    """The jobs, their tokens when nobody else is in the engine, and how close each decision was."""
    jobs = mixed_jobs(model_dir)
    engine = make_engine(model_dir, max_model_len=MAX_MODEL_LEN, max_num_seqs=1, batching="static")
    assert engine.config.block_size == MAX_MODEL_LEN
    tokens, gaps = [], []
    for i, job in enumerate(jobs):
        add_job(engine, Job(job.prompt_token_ids, job.params.replace(logprobs=2), [], 0.0), str(i))
        while engine.has_unfinished_requests():
            outputs = engine.step()
        (completion,) = outputs[0].outputs
        tokens.append(completion.token_ids)
        top_two = [sorted((lp.logprob for lp in entry.values()), reverse=True) for entry in completion.logprobs]
        gaps.append([first - second for first, second, *_ in top_two])
    return jobs, tokens, gaps


# `make test` runs the engine in which requests lose their blocks. .ci/run runs the others: their code also serves the
# 20 prompts of tests/m1/test_parity_real.py (continuous) and the tiny models of test_lattice.py (static).
@pytest.mark.parametrize(
    "engine_args",
    [
        pytest.param(args, id=name, marks=[pytest.mark.slow] * ("num_kv_blocks" not in args))
        for name, args in ENGINES.items()
    ],
)
def test_40_mixed_requests_give_the_tokens_they_give_alone(
    engine_args: dict[str, Any], model_dir: Path, alone: tuple[list[Job], list[list[int]], list[list[float]]]
) -> None:
    jobs, expected, gaps = alone
    engine = make_engine(model_dir, max_model_len=MAX_MODEL_LEN, **engine_args)
    got = run_jobs(engine, jobs, late=LATE)
    stats = engine.stats()
    near_ties = sum(gap < TIE for one in gaps for gap in one)
    print(f"{stats.num_steps} steps, {stats.num_preemptions} preemptions, {near_ties} decisions closer than {TIE}")
    assert stats.num_preemptions >= 10 if "num_kv_blocks" in engine_args else stats.num_preemptions == 0
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert len(ours) == len(theirs) == jobs[i].params.max_tokens
        first = next((k for k in range(len(ours)) if ours[k] != theirs[k]), None)
        assert first is None or gaps[i][first] < TIE, f"request {i} differs at token {first}: {ours} {theirs}"
