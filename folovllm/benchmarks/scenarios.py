"""Requests that make chunked prefill and prefix caching matter: who arrives while others decode, who shares what.

Milestone: M5 (long-prompts), M6 (shared-prefix, multi-turn, few-shot). vLLM counterparts: PrefixRepetitionDataset and
benchmarks/multi_turn. Left out: arrivals by the clock (an engine half as fast would see another load). No torch.
"""

import random

from folovllm.benchmarks.requests import BenchRequest, random_ids

DECODING, LONG = "decoding", "long"  # groups of long-prompts
NUM_DECODING, DECODING_OUTPUT = 8, 320
LONG_PROMPT, LONG_OUTPUT = 4_000, 16
FIRST_ARRIVAL, BETWEEN_ARRIVALS = 32, 64  # tokens that each decoding request has got by then
SHARED_PROMPT, SHARED_OUTPUT = 1_500, 8
HIT_RATES = (0, 25, 50, 75, 95)  # percent
NUM_CONVERSATIONS = 8
FIRST_TURN, LATER_TURN, ANSWER = (256, 384), (24, 64), 32
EXAMPLES, QUESTION, SHORT_ANSWER = 1_024, (16, 48), (8, 24)


def long_prompts(count: int, vocab_size: int) -> list[BenchRequest]:
    """8 requests decode; the others, with 4,000 tokens each, arrive one after the other while they do.

    The decoding ones must outlast the arrivals: their output grows with the count. A stall that each arrival causes is
    then one gap in 64, well inside the slowest hundredth.
    """
    rng = random.Random(5)
    num_long = max(count - NUM_DECODING, 0)
    output_len = max(DECODING_OUTPUT, FIRST_ARRIVAL + BETWEEN_ARRIVALS * (num_long + 1) - 32)
    steady = [
        BenchRequest(random_ids(rng, rng.randint(32, 64), vocab_size), output_len, DECODING)
        for _ in range(min(count, NUM_DECODING))
    ]
    arrivals = [FIRST_ARRIVAL + BETWEEN_ARRIVALS * i for i in range(num_long)]
    return steady + [
        BenchRequest(random_ids(rng, LONG_PROMPT, vocab_size), LONG_OUTPUT, LONG, arrival) for arrival in arrivals
    ]


def shared_prefix(count: int, vocab_size: int, hit_rates: tuple[int, ...] = HIT_RATES) -> list[BenchRequest]:
    """For each hit rate, `count` prompts of 1,500 tokens of which that share is the same in all.

    The first one finds nothing in the cache ("cold"), the others its system prompt ("warm"). Each hit rate has a system
    prompt of its own, and one more request of that rate does not change the others' tokens.
    """
    requests = []
    for rate in hit_rates:
        common = random_ids(random.Random(f"common {rate}"), SHARED_PROMPT * rate // 100, vocab_size)
        for index in range(count):
            own = random_ids(random.Random(f"own {rate} {index}"), SHARED_PROMPT - len(common), vocab_size)
            requests.append(BenchRequest(common + own, SHARED_OUTPUT, hit_group(rate, warm=index > 0)))
    return requests


def hit_group(rate: int, warm: bool) -> str:
    return f"{rate}% {'warm' if warm else 'cold'}"


def multi_turn(count: int, vocab_size: int) -> list[BenchRequest]:
    """8 conversations side by side, turn after turn: prompt = last prompt + answer + 24-64 new tokens.

    All first turns, then all second ones: so the first N requests are whole again. The answers are the engine's own.
    """
    rng = random.Random(6)
    requests = []
    for index in range(count):
        turn = index // NUM_CONVERSATIONS
        tokens = random_ids(rng, rng.randint(*(LATER_TURN if turn else FIRST_TURN)), vocab_size)
        follows = index - NUM_CONVERSATIONS if turn else None
        requests.append(BenchRequest(tokens, ANSWER, f"turn {turn + 1}", follows=follows))
    return requests


def few_shot(count: int, vocab_size: int) -> list[BenchRequest]:
    """The same 1,024 tokens of examples before every short question."""
    rng = random.Random(7)
    examples = random_ids(rng, EXAMPLES, vocab_size)
    return [
        BenchRequest(
            examples + random_ids(rng, rng.randint(*QUESTION), vocab_size), rng.randint(*SHORT_ANSWER), "few-shot"
        )
        for _ in range(count)
    ]
