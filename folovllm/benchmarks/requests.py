"""Requests of a benchmark: what is sent, when, and after whom.

Milestone: M1; arrivals (M5) and conversations (M6) came with the workloads that need them. vLLM counterpart:
SampleRequest in vllm/benchmarks/datasets.py. Left out: data sets of real conversations.

Prompts are random token ids, so that no engine profits from text it has seen, and the length of every output is forced
(EOS is ignored): all engines do the same work. No torch.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST_RANDOM_ID = 100  # below are special tokens in many vocabularies
LAST_RANDOM_ID = 48_999  # within every vocabulary that the benchmark is meant for; a smaller one lowers it
NUM_SINGLE_STREAM = 8  # one after another is slow: the first few requests stand for all
MODES = ("single", "batch")
CACHE_MODES = ("cold", "warm")  # everything twice: with an empty prefix cache, then with what the first time left


@dataclass(frozen=True)
class BenchRequest:
    """One request: token ids in, and how many tokens must come out.

    `group`: figures are also given per group. `arrival`: sent once the requests of arrival 0 have that many tokens
    each, on average; counting tokens and not seconds makes it the same moment for every engine. `follows`: index of the
    turn before in a conversation; that one's prompt and answer come before `prompt_token_ids`, so it must be complete.
    """

    prompt_token_ids: list[int]
    output_len: int
    group: str = ""
    arrival: int = 0
    follows: int | None = None


@dataclass(frozen=True)
class Workload:
    """Requests and the modes to run them in.

    "single" sends one after another, "batch" all at once; "cold" and "warm" are two batches, before the first of which
    the prefix cache is emptied.
    """

    name: str
    requests: list[BenchRequest] = field(repr=False)
    modes: tuple[str, ...] = MODES
    num_single: int | None = NUM_SINGLE_STREAM  # how many of them "single" sends; None: all

    def for_mode(self, mode: str) -> list[BenchRequest]:
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
        plain = [_plain(request) for request in self.requests]
        return hashlib.sha256(json.dumps(plain, separators=(",", ":")).encode()).hexdigest()


def _plain(request: BenchRequest) -> list[object]:
    """When and after whom only where it is not "at once": the digest of workload A is older than both."""
    what: list[object] = [request.prompt_token_ids, request.output_len]
    return what if not request.arrival and request.follows is None else [*what, request.arrival, request.follows]


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
        """Requests to send now, in order. `idle`: nobody runs, so the clock of arrivals stands: the next one comes."""
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
        return BenchRequest(self.prompt(index), request.output_len, request.group)

    def _is_due(self, request: BenchRequest, tokens_each: float) -> bool:
        if request.follows is not None:
            return request.follows in self._answers
        return request.arrival <= tokens_each


def random_ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """`count` token ids, no special ones. ValueError if the vocabulary has hardly any others."""
    end = min(LAST_RANDOM_ID + 1, vocab_size)
    if end <= FIRST_RANDOM_ID:
        raise ValueError(
            f"the model's vocabulary has {vocab_size} tokens; the workloads need more than {FIRST_RANDOM_ID}"
        )
    return [rng.randrange(FIRST_RANDOM_ID, end) for _ in range(count)]


def random_requests(
    count: int, prompt_len: tuple[int, int], output_len: tuple[int, int], vocab_size: int, seed: int = 0
) -> list[BenchRequest]:
    """`count` requests with lengths drawn evenly from the two ranges (both ends included).

    The order of the draws is part of the contract: per request the prompt's length, its ids, the output's length. So a
    shorter workload is a prefix of a longer one.
    """
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        num_prompt_tokens = rng.randint(*prompt_len)
        prompt = random_ids(rng, num_prompt_tokens, vocab_size)
        requests.append(BenchRequest(prompt, rng.randint(*output_len)))
    return requests
