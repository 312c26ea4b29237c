"""Workloads by name: which requests a benchmark sends, the same ones every time.

Milestone: M1; M5 and M6 added the last four. vLLM counterpart: vllm/benchmarks/datasets.py. No torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from folovllm.benchmarks import scenarios
from folovllm.benchmarks.requests import (
    CACHE_MODES,
    MODES,
    NUM_SINGLE_STREAM,
    BenchRequest,
    Workload,
    random_requests,
)

__all__ = ["WORKLOADS", "BenchRequest", "Workload", "WorkloadRecipe", "make_workload", "random_requests"]


@dataclass(frozen=True)
class WorkloadRecipe:
    """How to make a workload: `make(count, vocab_size)` gives the requests, `make(.., hit_rates)` where it has some.

    `rungs`: the milestones it was made to compare, measured unless others are asked for; None: all that are built.
    """

    about: str
    default_count: int
    make: Callable[..., list[BenchRequest]]
    modes: tuple[str, ...] = MODES
    num_single: int | None = NUM_SINGLE_STREAM
    rungs: tuple[str, ...] | None = None
    hit_rates: tuple[int, ...] = ()
    has_arrivals: bool = False


def _workload_a(count: int, vocab_size: int) -> list[BenchRequest]:
    return random_requests(count, prompt_len=(32, 256), output_len=(32, 128), vocab_size=vocab_size)


def _smoke(count: int, vocab_size: int) -> list[BenchRequest]:
    return random_requests(count, prompt_len=(4, 16), output_len=(3, 8), vocab_size=vocab_size)


# A milestone that needs other requests adds a line.
WORKLOADS: dict[str, WorkloadRecipe] = {
    "A": WorkloadRecipe(
        "32 requests, 32-256 tokens in, 32-128 out, one by one (first 8) and all at once", 32, _workload_a
    ),
    "single": WorkloadRecipe("the first 8 requests of A, only one after another", 8, _workload_a, ("single",)),
    "smoke": WorkloadRecipe("4 requests of a few tokens: does it run? Not for figures", 4, _smoke),
    "long-prompts": WorkloadRecipe(
        "8 requests of 32-64 tokens decode 320 each, and 4 prompts of 4,000 tokens arrive among them, one whenever "
        "they have got another 64 tokens; no HuggingFace arm, as generate takes no arrivals",
        12,
        scenarios.long_prompts,
        ("batch",),
        rungs=("m4", "m5"),
        has_arrivals=True,
    ),
    "shared-prefix": WorkloadRecipe(
        "for each of --hit-rates, 6 prompts of 1,500 tokens that begin with the same share of them, 8 out, one by one; "
        "--num-requests is per hit rate",
        6,
        scenarios.shared_prefix,
        ("single",),
        num_single=None,
        rungs=("m5", "m6"),
        hit_rates=scenarios.HIT_RATES,
    ),
    "multi-turn": WorkloadRecipe(
        "8 conversations of 4 turns, 256-384 tokens first, 24-64 more each turn, 32 out; twice: cache cold, then warm",
        32,
        scenarios.multi_turn,
        CACHE_MODES,
        rungs=("m5", "m6"),
    ),
    "few-shot": WorkloadRecipe(
        "24 questions of 16-48 tokens after the same 1,024 tokens of examples, 8-24 out; twice: cache cold, then warm",
        24,
        scenarios.few_shot,
        CACHE_MODES,
        rungs=("m5", "m6"),
    ),
}


def make_workload(name: str, vocab_size: int, count: int | None = None, hit_rates: tuple[int, ...] = ()) -> Workload:
    """The workload called `name`, or its first `count` requests. ValueError lists the names there are."""
    recipe = WORKLOADS.get(name)
    if recipe is None:
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    extra = (hit_rates or recipe.hit_rates,) if recipe.hit_rates else ()
    requests = recipe.make(count or recipe.default_count, vocab_size, *extra)
    return Workload(name, requests, recipe.modes, recipe.num_single)
