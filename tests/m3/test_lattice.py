"""The lattice: whatever the switches, the same greedy tokens as `generate_naive` (DESIGN section 1; issue 3, 4.1).

Milestone: M3 (each later rung adds its switch here). A pairwise covering array always runs, the full product is `slow`.
Chunked prefill is a rung of M5, but the scheduler has it and the lattice runs it.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.milestones import LADDER
from tests.pairwise import Case, pairwise, product
from tests.parity_helpers import MIN_GAP, GapNaiveModel, Job, make_engine, make_job, run_jobs

pytestmark = pytest.mark.m3

MAX_MODEL_LEN = 64
# (prompt length, output tokens, priority). One fills the context to its end, one is a single token, several sit at and
# around the edges of blocks of 5 and 16.
SHAPES = [(1, 40, 0), (16, 20, 2), (5, 30, 1), (17, 24, 0), (40, 24, 3), (2, 12, 1), (31, 9, 2), (33, 1, 0)]
LATE = 3  # so many arrive while the others run

CHUNKING: dict[str, dict[str, Any]] = {
    "off": {},
    "budget 1": {"max_num_batched_tokens": 1, "enable_chunked_prefill": True},
    "budget 7": {"max_num_batched_tokens": 7, "enable_chunked_prefill": True},
    "budget 40": {"max_num_batched_tokens": 40, "enable_chunked_prefill": True},
    "threshold 3": {"long_prefill_token_threshold": 3, "enable_chunked_prefill": True},
}
MODELS = ["llama", "llama_rope", "qwen2", "qwen3"]
SWITCHES: dict[str, list[Any]] = {
    "policy": ["static", "continuous"],
    "max_num_seqs": [1, 3, 8],
    "block_size": [1, 5, 16, "max_model_len"],
    "num_kv_blocks": ["ample", "tiny"],  # tiny: one request of max_model_len and not a block more
    "scheduling_policy": ["fcfs", "priority"],
    "free_uncached_first": [True, False],
    "reserve_full_sequence": [True, False],
    "linear_backend": ["onednn", "auto", "torch"],
    "enable_chunked_prefill": list(CHUNKING),
}
ARRAY = pairwise(SWITCHES | {"model": MODELS})

MakeTiny = Callable[[str], Path]


def engine_args(case: Case) -> dict[str, Any]:
    args = {name: value for name, value in case.items() if name in SWITCHES} | {"max_model_len": MAX_MODEL_LEN}
    args |= {"num_kv_blocks": tiny_pool(case) if args["num_kv_blocks"] == "tiny" else None}
    return args | {"enable_chunked_prefill": False} | CHUNKING[case["enable_chunked_prefill"]]


def tiny_pool(case: Case) -> int:
    block_size = MAX_MODEL_LEN if case["block_size"] == "max_model_len" else case["block_size"]
    return math.ceil(MAX_MODEL_LEN / block_size) + 1  # and the null block


def must_preempt(case: Case) -> bool:
    """Several run side by side in a pool that is too small for them, and grow. A contiguous page never has to grow, and
    a budget of one token gives it all to the first request: nobody joins it."""
    grows = case["block_size"] != "max_model_len" and case["max_num_seqs"] > 1
    return grows and case["num_kv_blocks"] == "tiny" and case["enable_chunked_prefill"] != "budget 1"


@pytest.fixture(scope="module")
def jobs_of(tiny_model_dir: MakeTiny) -> Callable[[str], list[Job]]:
    """Jobs of a model with the oracle's tokens, made once."""
    made: dict[str, list[Job]] = {}

    def get(name: str) -> list[Job]:
        if name not in made:
            model = GapNaiveModel(tiny_model_dir(name))
            made[name] = [make_job(model, length, n, seed, prio) for seed, (length, n, prio) in enumerate(SHAPES)]
        return made[name]

    return get


def run_case(case: Case, folder: Path, jobs: list[Job]) -> int:
    """Run a case, compare every token; how many preemptions there were."""
    engine = make_engine(folder, **engine_args(case))
    assert run_jobs(engine, jobs, late=LATE) == [job.tokens for job in jobs], f"differs with {case}"
    num_preemptions = engine.stats().num_preemptions
    assert num_preemptions > 0 or not must_preempt(case), f"the pool was meant to run dry with {case}"
    return num_preemptions


@pytest.mark.parametrize("case", ARRAY, ids=lambda case: "-".join(map(str, case.values())))
def test_pairwise(case: Case, tiny_model_dir: MakeTiny, jobs_of: Callable[[str], list[Job]]) -> None:
    run_case(case, tiny_model_dir(case["model"]), jobs_of(case["model"]))


@pytest.mark.slow
@pytest.mark.parametrize("block_size", SWITCHES["block_size"])
@pytest.mark.parametrize("policy", SWITCHES["policy"])
def test_full_product(
    policy: str, block_size: int | str, tiny_model_dir: MakeTiny, jobs_of: Callable[[str], list[Job]]
) -> None:
    cases = product(SWITCHES | {"policy": [policy], "block_size": [block_size]})
    models = itertools.cycle(MODELS)
    preemptions = sum(run_case(case, tiny_model_dir(m), jobs_of(m)) for case, m in zip(cases, models, strict=False))
    print(f"{policy}, block_size {block_size}: {len(cases)} combinations, {preemptions} preemptions")


@pytest.mark.parametrize("name", MODELS)
def test_no_tie_decides(name: str, jobs_of: Callable[[str], list[Job]]) -> None:
    jobs = jobs_of(name)
    print(f"{name}: smallest gap of the top two logits {min(job.min_gap for job in jobs):.4f}")
    assert all(job.min_gap > MIN_GAP for job in jobs)
    assert [len(job.tokens) for job in jobs] == [num_tokens for _, num_tokens, _ in SHAPES]


def test_the_lattice_knows_every_switch_of_the_ladder() -> None:
    built = {name for rung in LADDER if rung.built for name in rung.on}
    assert built <= set(SWITCHES), "a rung was built whose switch the lattice does not turn yet"


def test_the_array_covers_every_pair() -> None:
    switches = SWITCHES | {"model": MODELS}
    for (a, a_values), (b, b_values) in itertools.combinations(switches.items(), 2):
        seen = {(case[a], case[b]) for case in ARRAY}
        assert seen == set(itertools.product(a_values, b_values)), f"{a} x {b}"
    assert len(ARRAY) < 40 < len(product(SWITCHES))
    assert any(map(must_preempt, ARRAY))


def test_the_array_is_the_same_every_time() -> None:
    assert pairwise(SWITCHES | {"model": MODELS}) == ARRAY
    assert len(pairwise({"a": [0, 1], "b": [0, 1], "c": [0, 1]})) == 4  # the optimum of the textbook example
