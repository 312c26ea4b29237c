"""Workloads by name: which requests a benchmark sends, when it sends them, and which of them share a prefix.

Milestone: M1; arrivals and long-prompts came with M5, conversations and shared prefixes with M6. vLLM counterpart:
vllm/benchmarks/datasets.py and benchmarks/multi_turn. Left out: data sets of real conversations, and arrivals by the
clock (an engine half as fast would see another load). No torch.

Prompts are random token ids, so that no engine profits from text it has seen, and the length of every output is forced
(EOS is ignored), so that all engines do the same work. Every workload is the same in every run.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

FIRST_RANDOM_ID = 100  # below are special tokens in many vocabularies
LAST_RANDOM_ID = 48_999  # within every vocabulary that the benchmark is meant for; a smaller one lowers it
NUM_SINGLE_STREAM = 8  # one after another is slow: the first few requests stand for all
MODES = ("single", "batch")
CACHE_MODES = ("cold", "warm")  # everything twice: with an empty prefix cache, then with what the first time left
PROMPT_LENGTHS = (256, 512, 1_000, 2_000, 4_000, 8_000)  # of the modes prompt256, prompt512, ...
PROMPT_TOKENS = 2_048  # a prompt mode sends several short prompts, about so many tokens in all

DECODING, LONG = "decoding", "long"  # the two groups of long-prompts
NUM_DECODING = 8
FIRST_ARRIVAL, BETWEEN_ARRIVALS = 32, 64  # tokens that each decoding request has got by then
HIT_RATES = (0, 25, 50, 75, 95)  # percent
NUM_CONVERSATIONS = 8


@dataclass(frozen=True)
class BenchRequest:
    """One request: token ids in, and how many tokens must come out.

    `group`: figures are also given per group. `arrival`: the request is sent once the requests of arrival 0 have that
    many tokens each, on average; counting tokens instead of seconds makes it the same moment for every engine.
    `follows`: index of the turn before in a conversation, which must be complete; its prompt and its answer come before
    `prompt_token_ids`. `temperature`: our engines sample with it; HuggingFace is always greedy, which costs it less.
    """

    prompt_token_ids: list[int]
    output_len: int
    group: str = ""
    arrival: int = 0
    follows: int | None = None
    temperature: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Requests and the modes to run them in.

    "single" sends one after another, "batch" all at once. "cold" and "warm" are two batches, and the prefix cache is
    emptied before the first of them. "prompt1000" sends prompts of 1,000 tokens one after another, each for one token
    of output; these are requests of their own and the same for every workload.
    """

    name: str
    requests: list[BenchRequest] = field(repr=False)
    modes: tuple[str, ...] = MODES
    num_single: int | None = NUM_SINGLE_STREAM  # how many of them "single" sends; None: all
    vocab_size: int = LAST_RANDOM_ID + 1

    def for_mode(self, mode: str) -> list[BenchRequest]:
        if length := prompt_length(mode):
            return prompts_of_length(length, self.vocab_size)
        return self.requests[: self.num_single] if mode == "single" else self.requests

    @property
    def prompt_lens(self) -> list[int]:
        """Tokens of every prompt as it is sent, the conversation before it included."""
        lens: list[int] = []
        for request in self.requests:
            before = 0 if request.follows is None else lens[request.follows] + self.requests[request.follows].output_len
            lens.append(before + len(request.prompt_token_ids))
        return lens

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        return max(prompt + request.output_len for prompt, request in zip(self.prompt_lens, self.requests, strict=True))

    def digest(self) -> str:
        """SHA-256 of all token ids, lengths and moments: two runs with the same digest asked for the same."""
        plain: list[list[object]] = []
        for request in self.requests:
            plain.append([request.prompt_token_ids, request.output_len])
            if request.arrival or request.follows is not None:  # only there: workload A's digest is older than both
                plain[-1] += [request.arrival, request.follows]
            if request.temperature:
                plain[-1].append(request.temperature)
        return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()


class Feed:
    """Which of some requests may be sent now, and with which prompt.

    E.g. request 1 follows request 0 (prompt [5, 6]): `due()` -> [0]; once `answered(0, [9])`, `due()` -> [1], and
    `prompt(1)` is [5, 6, 9] and its own tokens.
    """

    def __init__(self, requests: Sequence[BenchRequest]) -> None:
        self.requests = requests
        self._answers: dict[int, list[int]] = {}
        self._unsent = list(range(len(requests)))

    @property
    def waits_for_arrivals(self) -> bool:
        return any(self.requests[i].arrival for i in self._unsent)

    def steady(self) -> list[int]:
        """The requests whose tokens are the clock of arrivals."""
        return [i for i, request in enumerate(self.requests) if not request.arrival and request.follows is None]

    def due(self, tokens_each: float = 0.0, idle: bool = False) -> list[int]:
        """Requests to send now, in order. If the engine is `idle`, the clock of arrivals stands: the next one comes."""
        now = [i for i in self._unsent if self._is_due(self.requests[i], tokens_each)]
        now = now or self._unsent[: int(idle)]
        self._unsent = [i for i in self._unsent if i not in now]
        return now

    def answered(self, index: int, token_ids: list[int]) -> None:
        self._answers[index] = token_ids

    def prompt(self, index: int) -> list[int]:
        request = self.requests[index]
        if request.follows is None:
            return request.prompt_token_ids
        return [*self.prompt(request.follows), *self._answers[request.follows], *request.prompt_token_ids]

    def complete(self, index: int) -> BenchRequest:
        """The request as one that can be sent on its own."""
        request = self.requests[index]
        return BenchRequest(self.prompt(index), request.output_len, request.group, temperature=request.temperature)

    def _is_due(self, request: BenchRequest, tokens_each: float) -> bool:
        if request.follows is not None:
            return request.follows in self._answers
        return request.arrival <= tokens_each


def prompt_length(mode: str) -> int | None:
    """The tokens of each prompt in a prompt mode, None for another mode. E.g. "prompt1000" -> 1000."""
    match = re.fullmatch(r"prompt([1-9]\d*)", mode)
    return int(match[1]) if match else None


def one_by_one(mode: str) -> bool:
    """Whether the mode sends a request when the one before is complete, and not all at once."""
    return mode == "single" or prompt_length(mode) is not None


def prompts_of_length(length: int, vocab_size: int) -> list[BenchRequest]:
    """Prompts of `length` tokens with one token of output each. E.g. 8 prompts of 256 tokens, 1 of 4,000."""
    rng = random.Random(f"prompts {length}")
    count = max(1, PROMPT_TOKENS // length)
    return [BenchRequest(random_ids(rng, length, vocab_size), output_len=1) for _ in range(count)]


def random_ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """`count` token ids, no special ones. Raises ValueError if the vocabulary has hardly any others."""
    end = min(LAST_RANDOM_ID + 1, vocab_size)
    if end <= FIRST_RANDOM_ID:
        raise ValueError(
            f"the model's vocabulary has {vocab_size} tokens; the workloads need more than {FIRST_RANDOM_ID}"
        )
    return [rng.randrange(FIRST_RANDOM_ID, end) for _ in range(count)]


def random_requests(
    count: int, vocab_size: int, prompt_len: tuple[int, int], output_len: tuple[int, int]
) -> list[BenchRequest]:
    """`count` requests with lengths drawn evenly from the two ranges (both ends included).

    The order of the draws is part of the contract: per request the prompt's length, its ids, the output's length. A
    shorter workload is therefore a prefix of a longer one.
    """
    rng = random.Random(0)
    requests = []
    for _ in range(count):
        num_prompt_tokens = rng.randint(*prompt_len)
        prompt = random_ids(rng, num_prompt_tokens, vocab_size)
        requests.append(BenchRequest(prompt, rng.randint(*output_len)))
    return requests


A_PROMPT_LEN, A_OUTPUT_LEN = (32, 256), (32, 128)
workload_a = partial(random_requests, prompt_len=A_PROMPT_LEN, output_len=A_OUTPUT_LEN)
smoke = partial(random_requests, prompt_len=(4, 16), output_len=(3, 8))


def long_prompts(count: int, vocab_size: int) -> list[BenchRequest]:
    """8 requests decode; the others, with 4,000 tokens each, arrive one after the other while they do.

    The decoding requests must outlast the arrivals, so their output grows with the count. A stall that each arrival
    causes is then one gap in 64, well inside the slowest hundredth.
    """
    rng = random.Random(5)
    num_long = max(count - NUM_DECODING, 0)
    output_len = max(320, FIRST_ARRIVAL + BETWEEN_ARRIVALS * (num_long + 1) - 32)
    steady = [
        BenchRequest(random_ids(rng, rng.randint(32, 64), vocab_size), output_len, DECODING)
        for _ in range(min(count, NUM_DECODING))
    ]
    arrivals = [FIRST_ARRIVAL + BETWEEN_ARRIVALS * i for i in range(num_long)]
    return steady + [BenchRequest(random_ids(rng, 4_000, vocab_size), 16, LONG, arrival) for arrival in arrivals]


def shared_prefix(count: int, vocab_size: int, hit_rates: tuple[int, ...] = HIT_RATES) -> list[BenchRequest]:
    """For each hit rate, `count` prompts of 1,500 tokens of which that share is the same in all.

    The first one finds nothing in the cache ("cold"), the others find its system prompt ("warm"). Each hit rate has a
    system prompt of its own, and one more request of that rate does not change the others' tokens.
    """
    requests, length = [], 1_500
    for rate in hit_rates:
        common = random_ids(random.Random(f"common {rate}"), length * rate // 100, vocab_size)
        for index in range(count):
            own = random_ids(random.Random(f"own {rate} {index}"), length - len(common), vocab_size)
            group = f"{rate}% {'warm' if index else 'cold'}"
            requests.append(BenchRequest(common + own, 8, group))
    return requests


def multi_turn(count: int, vocab_size: int) -> list[BenchRequest]:
    """8 conversations side by side, turn after turn: prompt = last prompt + answer + 24-64 new tokens.

    All first turns come before all second ones, so that the first N requests are whole conversations too. The answers
    are the engine's own.
    """
    rng = random.Random(6)
    requests = []
    for index in range(count):
        turn = index // NUM_CONVERSATIONS
        tokens = random_ids(rng, rng.randint(24, 64) if turn else rng.randint(256, 384), vocab_size)
        follows = index - NUM_CONVERSATIONS if turn else None
        requests.append(BenchRequest(tokens, 32, f"turn {turn + 1}", follows=follows))
    return requests


def few_shot(count: int, vocab_size: int) -> list[BenchRequest]:
    """The same 1,024 tokens of examples before every short question."""
    rng = random.Random(7)
    examples = random_ids(rng, 1_024, vocab_size)
    requests = []
    for _ in range(count):
        question = random_ids(rng, rng.randint(16, 48), vocab_size)
        requests.append(BenchRequest(examples + question, rng.randint(8, 24), "few-shot"))
    return requests


# ---- workloads by name


@dataclass(frozen=True)
class WorkloadRecipe:
    """How to make a workload: `make(count, vocab_size)` gives the requests, or `make(.., hit_rates)` if it has some.

    `rungs`: the milestones it was made to compare, which are measured unless others are asked for; None: all of them.
    """

    about: str
    default_count: int
    make: Callable[..., list[BenchRequest]]
    modes: tuple[str, ...] = MODES
    num_single: int | None = NUM_SINGLE_STREAM
    rungs: tuple[str, ...] | None = None
    hit_rates: tuple[int, ...] = ()
    has_arrivals: bool = False


# A milestone that needs other requests adds a line.
WORKLOADS: dict[str, WorkloadRecipe] = {
    "A": WorkloadRecipe(
        "32 requests, 32-256 tokens in, 32-128 out, one by one (first 8) and all at once", 32, workload_a
    ),
    "single": WorkloadRecipe("the first 8 requests of A, only one after another", 8, workload_a, ("single",)),
    "smoke": WorkloadRecipe("4 requests of a few tokens: does it run? Not for figures", 4, smoke),
    "long-prompts": WorkloadRecipe(
        "8 requests of 32-64 tokens decode 320 each, and 4 prompts of 4,000 tokens arrive among them, one whenever "
        "they have got another 64 tokens; no HuggingFace arm, as generate takes no arrivals",
        12,
        long_prompts,
        ("batch",),
        rungs=("m4", "m5"),
        has_arrivals=True,
    ),
    "shared-prefix": WorkloadRecipe(
        "for each of --hit-rates, 6 prompts of 1,500 tokens that begin with the same share of them, 8 out, one by one; "
        "--num-requests is per hit rate",
        6,
        shared_prefix,
        ("single",),
        num_single=None,
        rungs=("m5", "m6"),
        hit_rates=HIT_RATES,
    ),
    "multi-turn": WorkloadRecipe(
        "8 conversations of 4 turns, 256-384 tokens first, 24-64 more each turn, 32 out; twice: cache cold, then warm",
        32,
        multi_turn,
        CACHE_MODES,
        rungs=("m5", "m6"),
    ),
    "few-shot": WorkloadRecipe(
        "24 questions of 16-48 tokens after the same 1,024 tokens of examples, 8-24 out; twice: cache cold, then warm",
        24,
        few_shot,
        CACHE_MODES,
        rungs=("m5", "m6"),
    ),
}


def make_workload(name: str, vocab_size: int, count: int | None = None, hit_rates: tuple[int, ...] = ()) -> Workload:
    """The workload called `name`, or its first `count` requests."""
    recipe = WORKLOADS[name]
    extra = (hit_rates or recipe.hit_rates,) if recipe.hit_rates else ()
    requests = recipe.make(count or recipe.default_count, vocab_size, *extra)
    return Workload(name, requests, recipe.modes, recipe.num_single, vocab_size)
