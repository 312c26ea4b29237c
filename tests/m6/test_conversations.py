"""Multi-turn conversations under eviction pressure: warm equals cold, and every hit is what the token lists foretell.

The fake executor's answer to a prompt is a function of the prompt alone (`fake_tokens`): that is the cold run. The
oracle knows from token lists what every block holds, and holds every lookup of the engine against it.
"""

import itertools
import random
from typing import Any

import pytest

from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.parts import variants
from folovllm.request import Request
from tests import core_helpers as helpers
from tests.m6.cache_helpers import INDEXES, HitOracle, cached_core, weaken

pytestmark = pytest.mark.m6

MAX_MODEL_LEN = 64
SYSTEM_PROMPTS = [list(range(500, 509)), list(range(600, 621))]


class Conversation:
    """One user: a system prompt that others have too, turns, and pauses between them."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name, self.rng = name, rng
        self.salt = rng.choice([None, None, None, "tenant"])
        self.history = list(rng.choice(SYSTEM_PROMPTS))
        self.turns = 0
        self.pause = rng.randint(0, 12)
        self.request: Request | None = None
        self.expected: list[int] = []

    def next_turn(self) -> Request | None:
        """The next request; None when the context is full."""
        self.history += [self.rng.randrange(3) for _ in range(self.rng.randint(1, 7))]  # few words: users repeat others
        room = MAX_MODEL_LEN - len(self.history)
        if room < 1:
            return None
        num_tokens = min(self.rng.randint(1, 9), room)
        self.expected = fake_tokens(self.history, num_tokens)
        self.turns += 1
        self.request = helpers.make_request(
            f"{self.name}.{self.turns}",
            self.history,
            num_tokens,
            cache_salt=self.salt,
            priority=self.rng.randint(0, 2),
            prompt_logprobs=1 if self.rng.random() < 0.05 else None,
        )
        return self.request

    def heard(self) -> None:
        """The answer is complete: warm equals cold."""
        assert self.request is not None and self.request.output_token_ids == self.expected, self.name
        self.history += self.expected
        self.request, self.pause = None, self.rng.randint(0, 12)


def random_args(rng: random.Random) -> dict[str, Any]:
    block_size = rng.choice([1, 2, 3, 4, 8, 16])
    needed = -(-MAX_MODEL_LEN // block_size)
    chunked = rng.random() < 0.6
    return {
        "max_model_len": MAX_MODEL_LEN,
        "block_size": block_size,
        "num_kv_blocks": 1 + needed + rng.randint(0, 2 * needed),  # for 20 users
        "max_num_seqs": rng.choice([1, 3, 8]),
        "enable_chunked_prefill": chunked,
        "max_num_batched_tokens": rng.choice([1, 7, 16, 64]) if chunked else None,
        "long_prefill_token_threshold": rng.choice([0, 0, 5]) if chunked else 0,
        "scheduling_policy": rng.choice(variants("core.request_queue")),
        "reserve_full_sequence": rng.random() < 0.7,
        "free_uncached_first": rng.random() < 0.7,
        "partial_block_hits": rng.random() < 0.5,
    }


def converse(core: EngineCore, oracle: HitOracle, conversations: list[Conversation]) -> None:
    """Until everybody has said everything. Every lookup is judged, the whole books every few steps: they are long."""
    open_ones = list(conversations)
    for step in itertools.count():
        if not open_ones:
            return oracle.check(core)
        for conversation in list(open_ones):
            if conversation.request is not None and conversation.request.is_finished:
                conversation.heard()
            if conversation.request is None:
                conversation.pause -= 1
                if conversation.pause < 0:
                    request = conversation.next_turn()
                    core.add_request(request) if request else open_ones.remove(conversation)
        core.step()
        if step % 7 == 0:
            helpers.check(core)
            oracle.check(core)


def run_many(seeds: range, users: int) -> dict[str, int]:
    totals = dict.fromkeys(["conversations", "turns", "evictions", "preemptions", "hits", "partial", "queries"], 0)
    for seed in seeds:
        rng = random.Random(seed)
        args = random_args(rng)
        core = cached_core(INDEXES[seed % 2], **args)
        oracle = HitOracle(core)
        conversations = [Conversation(f"c{i}", random.Random(f"{seed} {i}")) for i in range(users)]
        converse(core, oracle, conversations)
        helpers.assert_nothing_leaked(core)
        for name, value in [
            ("conversations", users), ("turns", sum(c.turns for c in conversations)), ("evictions", oracle.evictions),
            ("preemptions", core.stats().num_preemptions), ("hits", oracle.hits), ("partial", oracle.partial_hits),
            ("queries", oracle.queries),
        ]:  # fmt: skip
            totals[name] += value
    return totals


def test_500_conversations() -> None:
    totals = run_many(range(50), users=10)
    print(totals)
    assert totals["conversations"] == 500 and totals["turns"] > 2_000, totals
    assert totals["evictions"] > 2_000 and totals["preemptions"] > 50 and totals["partial"] > 100, totals
    assert 0.1 < totals["hits"] / totals["queries"] < 0.9, totals


@pytest.mark.slow
def test_5000_conversations() -> None:
    totals = run_many(range(1000, 1500), users=10)
    print(totals)
    assert totals["conversations"] == 5_000 and totals["evictions"] > 50_000, totals


@pytest.mark.parametrize("seed", range(10))
def test_with_a_hash_of_seven_values(seed: int) -> None:
    """Nearly everything collides: few hits, and all tokens right."""
    core = cached_core(**random_args(random.Random(seed)))
    index = core.scheduler.kv_cache_manager.block_pool.prefix_index
    weaken(index, lambda data: bytes([sum(data) % 7]))
    requests = []
    for i in range(40):
        conversation = Conversation(f"c{i}", random.Random(f"{seed} {i}"))
        request = conversation.next_turn()
        assert request is not None
        requests.append((request, conversation.expected))
    helpers.add_all(core, [request for request, _ in requests])
    helpers.drive(core)
    assert all(request.output_token_ids == expected for request, expected in requests)
    assert len(index.meaning) <= 7
