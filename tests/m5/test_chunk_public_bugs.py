"""Bugs that chunked prefill really brought to other engines, or invites: each test says whose.

Milestone: M5. Where a bug can be planted in our engine from outside, it is, and the test shows that it would be seen.
"""

from typing import Any

import pytest

from folovllm.core.sched.scheduler import Scheduler
from folovllm.core.sched.step import Step
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.request import RequestStatus
from tests import core_helpers as helpers
from tests.core_helpers import block_ids, caching_core, make_core, make_request

pytestmark = pytest.mark.m5

CHUNKS: dict[str, Any] = {"enable_chunked_prefill": True, "max_model_len": 64}


def counts(core: EngineCore) -> dict[str, int]:
    return helpers.schedule_and_run(core).num_scheduled_tokens


def all_counts(core: EngineCore) -> list[dict[str, int]]:
    """Of every step until nothing is left."""
    steps: list[dict[str, int]] = []
    while core.has_unfinished_requests():
        steps.append(counts(core))
        assert len(steps) < 1000, "somebody waits for ever"
    return steps


# ---- counts that are taken too early


def test_a_chunk_is_counted_from_the_end_of_the_hit() -> None:
    """nano-vllm pull 210: the tokens to compute were counted before the cache was asked, so the first chunk was too
    long and ran past what the request had. 21 tokens, 12 of them cached, in chunks of 4: 4, 4, 1."""
    core, _ = caching_core(**CHUNKS, num_kv_blocks=40, max_num_batched_tokens=4)
    prompt = list(range(100, 121))
    core.add_request(make_request("a", prompt[:13], max_tokens=1))
    helpers.drive(core)
    request = make_request("b", prompt, max_tokens=2)
    core.add_request(request)
    first = helpers.schedule_and_run(core)
    (new,) = first.scheduled_new_reqs
    assert (new.num_computed_tokens, first.num_scheduled_tokens, len(new.block_ids[0])) == (12, {"b": 4}, 4)
    assert first.sampling_req_ids == frozenset() and request.num_cached_tokens == 12
    assert [counts(core) for _ in range(3)] == [{"b": 4}, {"b": 1}, {"b": 1}]
    assert request.output_token_ids == fake_tokens(prompt, 2)


def test_a_chunk_after_a_preemption_is_counted_from_the_end_of_the_hit() -> None:
    """nano-vllm pull 211: the same on the way back. b, preempted in mid-prompt, finds its own first chunks again."""
    core, _ = caching_core(**CHUNKS, num_kv_blocks=17, max_num_batched_tokens=12, reserve_full_sequence=False)
    a, b = make_request("a", 37, max_tokens=20), make_request("b", 30, max_tokens=3)
    core.add_request(a)
    while a.num_output_tokens < 2:
        core.step()
    core.add_request(b)
    while b.num_preemptions == 0:
        core.step()
    assert b.num_output_tokens == 0, "in mid-prompt"
    while b.status == RequestStatus.PREEMPTED:
        output = helpers.schedule_and_run(core)
    (resumed,) = [cached for cached in output.scheduled_cached_reqs if cached.resumed]
    hit, chunk = resumed.num_computed_tokens, output.num_scheduled_tokens["b"]
    assert 0 < hit < hit + chunk <= b.num_tokens and chunk <= 12
    assert len(resumed.new_block_ids[0]) == -(-(hit + chunk) // 4)
    helpers.drive(core)
    assert b.output_token_ids == fake_tokens(b.prompt_token_ids, 3)


def test_only_computed_chunks_can_be_hit() -> None:
    """A prompt in mid-prefill is known whole, but only the blocks of its scheduled chunks hold anything."""
    core, index = caching_core(**CHUNKS, num_kv_blocks=40, max_num_batched_tokens=10)
    prompt = list(range(100, 130))
    core.add_request(make_request("a", prompt, max_tokens=1))
    core.step()
    assert len(index.blocks) == 2, "10 tokens: two full blocks of 4"
    core.add_request(make_request("b", prompt, max_tokens=1))
    assert counts(core) == {"a": 10} and len(index.blocks) == 5
    steps = helpers.schedule_and_run(core)
    assert steps.num_scheduled_tokens == {"a": 10}
    assert counts(core) == {"b": 2}, "all but what lies behind the last full block"


def test_a_full_hit_leaves_one_token_whatever_the_chunk() -> None:
    """A chunk of length zero: 16 cached tokens and a budget of 1."""
    core, _ = caching_core(**CHUNKS, num_kv_blocks=40, max_num_batched_tokens=1)
    prompt = list(range(100, 116))
    core.add_request(make_request("a", prompt, max_tokens=1))
    helpers.drive(core)
    core.add_request(make_request("b", prompt, max_tokens=1))
    assert all_counts(core) == [{"b": 1}] * 4, "never zero; the last block is computed again"


@pytest.mark.parametrize(("threshold", "parts"), [(0, [9]), (9, [9]), (8, [8, 1])])
def test_a_resume_is_cut_like_a_prompt(threshold: int, parts: list[int]) -> None:
    """R5.15: 8 prompt tokens and one of output are known, and all nine are one thing to cut. b gives way to
    a in the second step, in a pool of 4 blocks of 4."""
    core = make_core(
        enable_chunked_prefill=True, num_kv_blocks=5, max_num_batched_tokens=15, long_prefill_token_threshold=threshold
    )
    b = make_request("b", 8, max_tokens=4)
    helpers.add_all(core, [make_request("a", 7, max_tokens=4), b])
    assert counts(core) == {"a": 7, "b": 8} and counts(core) == {"a": 1} and b.num_output_tokens == 1
    cut = [step["b"] for step in (counts(core) for _ in range(6)) if "b" in step]
    assert cut[: len(parts)] == parts and cut[len(parts) :] == [1] * (len(cut) - len(parts))
    helpers.drive(core)
    assert b.output_token_ids == fake_tokens(b.prompt_token_ids, 4)


# ---- sampling in mid-prompt


class SamplesInMidPrompt(Scheduler):
    """Takes every request of a step for complete."""

    def choose_sampling(self, step: Step) -> frozenset[str]:
        return frozenset(step.num_scheduled_tokens)


def test_a_sample_in_mid_prompt_would_be_seen() -> None:
    """The learner's classic: the last row of a chunk has logits like any other, and they predict a *prompt* token."""
    config = helpers.make_config(**CHUNKS, max_num_batched_tokens=4)
    core = EngineCore(config, helpers.AttendingExecutor())
    core.scheduler = SamplesInMidPrompt(config, core.kv_cache_config)
    core.add_request(make_request("a", 10, max_tokens=2))
    with pytest.raises(AssertionError, match="samples in mid-prompt"):
        core.step()


def test_the_first_token_follows_the_last_of_the_prompt() -> None:
    """Sampled after the first chunk, it would be the token that follows `prompt[:4]`."""
    core, request = make_core(FakeExecutor(), **CHUNKS, max_num_batched_tokens=4), make_request("a", 10, max_tokens=1)
    core.add_request(request)
    emitted = [[output.new_token_ids for output in core.step()] for _ in range(3)]
    assert emitted == [[], [], [fake_tokens(request.prompt_token_ids, 1)]]
    assert emitted[2] != [fake_tokens(request.prompt_token_ids[:4], 1)]


@pytest.mark.parametrize("prompt", [7, 8, 9])
def test_a_prompt_that_ends_with_its_chunk_samples_there(prompt: int) -> None:
    """Off by one at the edge: 8 = 2 * 4 samples in the second step, and takes no empty third."""
    core = make_core(**CHUNKS, max_num_batched_tokens=4)
    core.add_request(make_request("a", prompt, max_tokens=1))
    steps = [helpers.schedule_and_run(core) for _ in range(-(-prompt // 4))]
    assert [len(step.sampling_req_ids) for step in steps] == [0] * (len(steps) - 1) + [1]
    assert not core.has_unfinished_requests()


# ---- who goes first


def test_a_stream_of_long_prompts_does_not_stop_a_decode() -> None:
    """Prefill first, as vLLM's first scheduler had it: with long prompts always waiting, nobody would decode."""
    core = make_core(**CHUNKS, max_num_batched_tokens=8, max_num_seqs=64, num_kv_blocks=400)
    old = make_request("old", 3, max_tokens=30)
    core.add_request(old)
    for i in range(29):
        core.add_request(make_request(f"new{i}", 50, max_tokens=1))
        core.step()
        assert old.num_output_tokens == i + 1


def test_a_prompt_begun_is_finished_before_the_next_begins() -> None:
    """Two halves of prompts hold blocks and give nobody a token. Who has begun runs, ahead of arrivals."""
    core = make_core(**CHUNKS, max_num_batched_tokens=8, max_num_seqs=8, num_kv_blocks=400)
    helpers.add_all(core, [make_request(name, 20, max_tokens=1) for name in "abc"])
    assert all_counts(core) == [{"a": 8}, {"a": 8}, {"a": 4, "b": 4}, {"b": 8}, {"b": 8}, {"c": 8}, {"c": 8}, {"c": 4}]


def dance(reserve_full_sequence: bool) -> tuple[int, int]:
    """A decode beside a prompt that does not fit yet: preemptions, and prompt tokens computed of it."""
    core = make_core(**CHUNKS, max_num_batched_tokens=8, num_kv_blocks=17, reserve_full_sequence=reserve_full_sequence)
    core.add_request(make_request("a", 20, max_tokens=40))
    for _ in range(4):
        core.step()
    core.add_request(make_request("b", 48, max_tokens=2))
    computed = sum(step.get("b", 0) for step in all_counts(core))
    return core.stats().num_preemptions, computed


def test_a_prompt_is_not_begun_that_cannot_be_finished() -> None:
    """vLLM issue 25538: admitted by its first chunk, out of blocks at a later one, preempted, and again from zero."""
    assert dance(reserve_full_sequence=True) == (0, 48 + 1)
    assert dance(reserve_full_sequence=False) == (11, 224), "docs/learn/05 quotes it"


# ---- life in mid-prompt


def test_an_abort_in_mid_prompt_gives_everything_back() -> None:
    core = make_core(**CHUNKS, max_num_batched_tokens=8, num_kv_blocks=40)
    helpers.add_all(core, [make_request("a", 30, max_tokens=2), make_request("b", 9, max_tokens=2)])
    core.step()
    assert len(block_ids(core, "a")) == 2
    core.abort_requests(["a"])
    assert list(helpers.drive(core)) == ["b"]
    helpers.assert_nothing_leaked(core)


def test_a_preemption_in_mid_prompt_starts_again_and_emits_once() -> None:
    core = make_core(**CHUNKS, max_num_batched_tokens=8, num_kv_blocks=17, reserve_full_sequence=False)
    a, b = make_request("a", 30, max_tokens=30), make_request("b", 40, max_tokens=3)
    helpers.add_all(core, [a, b])
    outputs = helpers.drive(core)
    assert b.num_preemptions > 0
    for request in (a, b):
        expected = fake_tokens(request.prompt_token_ids, request.max_tokens)
        assert helpers.tokens_of(outputs[request.request_id]) == expected
