"""Workloads: which requests a benchmark sends, by name, the same ones every time.

Milestone: M1. vLLM counterpart: vllm/benchmarks/datasets.py. Left out: data sets of real conversations.

Prompts are random token ids, so that no engine profits from text it has seen, and the length of every output is forced
(EOS is ignored): all engines do the same work. No torch.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_RANDOM_ID = 100  # below are special tokens in many vocabularies
LAST_RANDOM_ID = 48_999  # within every vocabulary that the benchmark is meant for; a smaller one lowers it
NUM_SINGLE_STREAM = 8  # one after another is slow: the first few requests stand for all
MODES = ("single", "batch")


@dataclass(frozen=True)
class BenchRequest:
    """One request: token ids in, and how many tokens must come out."""

    prompt_token_ids: list[int]
    output_len: int


@dataclass(frozen=True)
class Workload:
    """Requests and the modes to run them in: "single" one after another, "batch" all at once."""

    name: str
    requests: list[BenchRequest] = field(repr=False)
    modes: tuple[str, ...] = MODES

    def for_mode(self, mode: str) -> list[BenchRequest]:
        return self.requests[:NUM_SINGLE_STREAM] if mode == "single" else self.requests

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(len(request.prompt_token_ids) + request.output_len for request in self.requests)

    def digest(self) -> str:
        """SHA-256 of all token ids and lengths: two runs with the same digest asked for the same."""
        plain = [[request.prompt_token_ids, request.output_len] for request in self.requests]
        return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()


def random_requests(
    count: int, prompt_len: tuple[int, int], output_len: tuple[int, int], vocab_size: int, seed: int = 0
) -> list[BenchRequest]:
    """`count` requests with lengths drawn evenly from the two ranges (both ends included).

    The order of the draws is part of the contract: per request the prompt's length, its ids, the output's length. So a
    shorter workload is a prefix of a longer one.
    """
    end = min(LAST_RANDOM_ID + 1, vocab_size)
    if end <= FIRST_RANDOM_ID:
        raise ValueError(
            f"the model's vocabulary has {vocab_size} tokens; the workloads need more than {FIRST_RANDOM_ID}"
        )
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        num_prompt_tokens = rng.randint(*prompt_len)
        prompt = [rng.randrange(FIRST_RANDOM_ID, end) for _ in range(num_prompt_tokens)]
        requests.append(BenchRequest(prompt, rng.randint(*output_len)))
    return requests


@dataclass(frozen=True)
class WorkloadRecipe:
    """How to make a workload: `make(count, vocab_size)` gives the requests."""

    about: str
    default_count: int
    make: Callable[[int, int], list[BenchRequest]]
    modes: tuple[str, ...] = MODES


def _workload_a(count: int, vocab_size: int) -> list[BenchRequest]:
    return random_requests(count, prompt_len=(32, 256), output_len=(32, 128), vocab_size=vocab_size)


def _smoke(count: int, vocab_size: int) -> list[BenchRequest]:
    return random_requests(count, prompt_len=(4, 16), output_len=(3, 8), vocab_size=vocab_size)


# A milestone that needs other requests (long prompts, shared prefixes) adds a line.
WORKLOADS: dict[str, WorkloadRecipe] = {
    "A": WorkloadRecipe(
        "32 requests, 32-256 tokens in, 32-128 out, one by one (first 8) and all at once", 32, _workload_a
    ),
    "single": WorkloadRecipe("the first 8 requests of A, only one after another", 8, _workload_a, ("single",)),
    "smoke": WorkloadRecipe("4 requests of a few tokens: does it run? Not for figures", 4, _smoke),
}


def make_workload(name: str, vocab_size: int, count: int | None = None) -> Workload:
    """The workload called `name`, or its first `count` requests. ValueError lists the names there are."""
    recipe = WORKLOADS.get(name)
    if recipe is None:
        raise ValueError(f"unknown workload {name!r}; there are {', '.join(WORKLOADS)}")
    return Workload(name, recipe.make(count or recipe.default_count, vocab_size), recipe.modes)
