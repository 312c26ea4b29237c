"""Several engines behind one AsyncLLM, in threads: routing, aborts, calls, statistics, deaths and restarts.

With processes and real kills: test_replica_faults.py.
"""

import asyncio
import functools
import json
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from folovllm.engine import data_parallel_client
from folovllm.engine.async_llm import AsyncLLM, EngineDeadError, RequestFailedError
from folovllm.engine.data_parallel_client import pause_before_start
from folovllm.engine.router import LeastLoadedRouter
from folovllm.engine.select_client import replica_config
from folovllm.engine.stats_sum import ReplicaStats, sum_stats
from folovllm.outputs import NO_STATS, RequestOutput
from folovllm.request import Request
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.trace.replay import Replay
from tests.m8.serving_helpers import (
    assert_all_free,
    collect,
    eventually,
    greedy,
    make_async_llm,
    oracle,
    prompt_ids,
    run_async,
    serving_config,
)
from tests.m10.replica_helpers import Replicas, all_alive, client_of, kill, make_replicas

pytestmark = pytest.mark.m10

ReplicaTest = Callable[[AsyncLLM, Replicas], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "folovllm")


def replica_test(
    replicas: Callable[[], Replicas] = Replicas, **args: Any
) -> Callable[[ReplicaTest], Callable[[], None]]:
    """Decorator for a test that gets an AsyncLLM with two engines, or `num_replicas`, and their executors."""

    def decorate(test: ReplicaTest) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                made = replicas()
                async with make_replicas(made, **args) as engine:
                    await test(engine, made)

            run_async(main)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


async def no_suspects(engine: AsyncLLM) -> None:
    """Waits until each request of a dead engine has got another token."""
    requests = client_of(engine)._requests
    await eventually(lambda: not any(sent.is_suspect for sent in requests._requests.values()))


# ---- like one engine


@replica_test(num_replicas=3)
async def test_many_requests_get_their_own_answers_from_all_engines(engine: AsyncLLM, replicas: Replicas) -> None:
    assert engine.stats.replicas == (NO_STATS,) * 3, "before the first step"
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(20)) for i in range(24)]
    assert await asyncio.gather(*map(collect, streams)) == [oracle(prompt_ids(i), 20) for i in range(24)]
    await assert_all_free(engine)
    assert engine.num_engines == engine.num_alive == 3 and len(engine.stats.replicas) == 3
    assert all(stats.num_generation_tokens >= 100 for stats in engine.stats.replicas), "the load was even"
    assert engine.stats.num_generation_tokens == 24 * 20
    assert engine.stats.num_prompt_tokens == sum(stats.num_prompt_tokens for stats in engine.stats.replicas) == 240


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_the_completions_of_a_request_stay_together(kind: RequestOutputKind) -> None:
    async def test() -> None:
        replicas = Replicas()
        async with make_replicas(replicas, num_replicas=3) as engine:
            for number in range(6):
                params = SamplingParams(n=4, temperature=1.0, max_tokens=6, ignore_eos=True, output_kind=kind)
                stream = await engine.add_request(f"r{number}", prompt_ids(number), params)
                owners = {sent.replica for sent in client_of(engine)._requests._requests.values()}
                assert len(owners) == 1 and engine.num_unfinished == 4
                outputs = [output async for output in stream]
                assert outputs[-1].finished
                assert {part.index for output in outputs for part in output.outputs} == {0, 1, 2, 3}
            await assert_all_free(engine)

    run_async(test)


@replica_test(functools.partial(Replicas, seconds=0.005))
async def test_an_abort_reaches_the_engine_that_has_the_request(engine: AsyncLLM, replicas: Replicas) -> None:
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(200)) for i in range(4)]
    for stream in streams:
        await anext(stream)
        await stream.aclose()
    await assert_all_free(engine)
    assert engine.stats.num_generation_tokens < 4 * 200


@replica_test(functools.partial(Replicas, seconds=0.002))
async def test_a_name_can_be_used_again_at_once(engine: AsyncLLM, replicas: Replicas) -> None:
    """The new request must not go to another engine: its first tokens would be taken for late ones of the old one."""
    for number in range(10):
        old = await engine.add_request("same", prompt_ids(number), greedy(100))
        await anext(old)
        await old.aclose()
        new = await engine.add_request("same", prompt_ids(number + 50), greedy(5))
        assert await collect(new) == oracle(prompt_ids(number + 50), 5)
    await assert_all_free(engine)


@replica_test()
async def test_a_stop_string_ends_the_request_in_its_engine(engine: AsyncLLM, replicas: Replicas) -> None:
    final = greedy(40, output_kind=RequestOutputKind.FINAL_ONLY)
    (whole,) = [o async for o in engine.generate([7] * 5, final, "a")]
    text = whole.outputs[0].text
    (cut,) = [o async for o in engine.generate([7] * 5, final.replace(stop=[text[3:6]]), "b")]
    assert cut.outputs[0].finish_reason == "stop" and cut.outputs[0].text == text[: text.index(text[3:6])]
    await assert_all_free(engine)


@replica_test()
async def test_bad_requests_add_nothing(engine: AsyncLLM, replicas: Replicas) -> None:
    for prompt in ([], [10**6], [1] * 256):
        with pytest.raises(ValueError):
            await engine.add_request("r", prompt, greedy())
    first = await engine.add_request("r", prompt_ids(1), greedy(50))
    with pytest.raises(ValueError, match="in use"):
        await engine.add_request("r", prompt_ids(1), greedy())
    assert await collect(first) == oracle(prompt_ids(1), 50)
    await assert_all_free(engine)


@replica_test()
async def test_a_call_reaches_all_engines(engine: AsyncLLM, replicas: Replicas) -> None:
    for i in range(4):
        await collect(await engine.add_request(f"r{i}", prompt_ids(i, 40), greedy(2)))
    assert len(replicas.made) == 2
    await assert_all_free(engine)
    assert await engine.reset_prefix_cache() is True
    before = engine.stats.prefix_cache_hits
    for i in range(4):
        await collect(await engine.add_request(f"again{i}", prompt_ids(i, 40), greedy(2)))
    assert engine.stats.prefix_cache_hits == before, "no engine has kept a block"
    replicas.now[0].gate.clear()
    entered = replicas.now[0].num_entered
    streams = [await engine.add_request(f"busy{i}", prompt_ids(i), greedy(3)) for i in range(2)]
    await eventually(lambda: replicas.now[0].num_entered > entered)
    reset = asyncio.ensure_future(engine.reset_prefix_cache())
    await asyncio.sleep(0.02)
    assert not reset.done(), "it waits for the engine that computes"
    replicas.now[0].gate.set()
    await asyncio.gather(*map(collect, streams))
    assert await reset in (True, False)


@replica_test()
async def test_multi_turn_requests_find_their_blocks(engine: AsyncLLM, replicas: Replicas) -> None:
    """Eight conversations on two engines: each turn finds the last one, answer included."""
    conversations = [prompt_ids(i, 40) for i in range(8)]
    for turn in range(4):
        streams = [await engine.add_request(f"{turn}-{i}", c, greedy(16)) for i, c in enumerate(conversations)]
        answers = await asyncio.gather(*map(collect, streams))
        conversations = [[*c, *a, turn] for c, a in zip(conversations, answers, strict=True)]
    assert engine.stats.prefix_cache_hits > 0.6 * engine.stats.prefix_cache_queries
    await assert_all_free(engine)


# ---- the router is told

TOLD: list[tuple[Any, ...]] = []


class Noting(LeastLoadedRouter):
    """Notes what it hears."""

    def started(self, request: Request, replica: int) -> None:
        super().started(request, replica)
        TOLD.append(("started", request.request_id, replica))

    def finished(self, request: Request, replica: int, output_token_ids: Sequence[int]) -> None:
        TOLD.append(("finished", request.request_id, replica, len(output_token_ids)))

    def forget(self, replica: int) -> None:
        TOLD.append(("forget", replica))


@replica_test(functools.partial(Replicas, seconds=0.002), parts={"serve.router": f"{__name__}:Noting"})
async def test_the_router_hears_what_happens(engine: AsyncLLM, replicas: Replicas) -> None:
    TOLD.clear()
    await collect(await engine.add_request("a", prompt_ids(1), greedy(3)))
    assert TOLD == [("started", "a", 0), ("finished", "a", 0, 3)]
    stream = await engine.add_request("b", prompt_ids(2), greedy(200))
    await anext(stream)
    await stream.aclose()
    assert TOLD[2] == ("started", "b", 1) and TOLD[3][:3] == ("finished", "b", 1) and TOLD[3][3] >= 1
    await assert_all_free(engine)
    assert await engine.reset_prefix_cache() is True
    assert sorted(TOLD[4:]) == [("forget", 0), ("forget", 1)]
    replicas.may_start.clear()
    stream = await engine.add_request("c", prompt_ids(3), greedy(40))
    await anext(stream)
    await kill(engine, replicas, 0)
    assert len(await collect(stream)) == 39
    assert TOLD[6:] == [("started", "c", 0), ("forget", 0), ("started", "c", 1), ("finished", "c", 1, 40)]


# ---- a learner's router


class Broken:
    """Chooses a replica that does not exist, or raises."""

    def __init__(self, *_: int) -> None:
        self.count = 0

    def route(self, request: Any, loads: Any) -> int:
        self.count += 1
        if self.count % 2:
            raise RuntimeError("a fault of the learner")
        return 99

    def started(self, request: Any, replica: int) -> None:
        raise RuntimeError("a fault of the learner")

    finished = forget = started


def test_a_router_with_faults_loses_no_request() -> None:
    async def test() -> None:
        async with make_replicas(Replicas(), parts={"serve.router": f"{__name__}:Broken"}) as engine:
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(5)) for i in range(8)]
            assert await asyncio.gather(*map(collect, streams)) == [oracle(prompt_ids(i), 5) for i in range(8)]
            await engine.reset_prefix_cache()
            await assert_all_free(engine)

    run_async(test)


def test_a_router_that_does_not_fit_is_refused_before_an_engine_starts() -> None:
    async def test() -> None:
        replicas = Replicas()
        with pytest.raises(ValueError, match=r"part serve\.router: .* lacks the methods"):
            async with make_replicas(replicas, parts={"serve.router": f"{__name__}:Unfit"}):
                pass
        assert not replicas.made

    run_async(test)


class Unfit:
    pass


# ---- deaths


@replica_test(functools.partial(Replicas, seconds=0.002))
async def test_the_requests_of_a_dead_engine_go_on(engine: AsyncLLM, replicas: Replicas) -> None:
    """Each reader gets every token once, and each request ends once. The dead engine comes back."""
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(60)) for i in range(16)]
    answers = asyncio.gather(*map(collect, streams))
    await eventually(lambda: engine.stats.num_generation_tokens > 100)
    assert all(replicas.requests_of(i) for i in (0, 1))
    await kill(engine, replicas, 0)
    assert await answers == [oracle(prompt_ids(i), 60) for i in range(16)]
    await all_alive(engine)
    assert len(replicas.made) == 3
    stream = [await engine.add_request(f"s{i}", prompt_ids(i), greedy(5)) for i in range(8)]
    assert await asyncio.gather(*map(collect, stream)) == [oracle(prompt_ids(i), 5) for i in range(8)]
    assert replicas.made[-1].num_entered, "the new engine computes, too"
    await assert_all_free(engine)


@replica_test(functools.partial(Replicas, seconds=0.002))
async def test_counters_do_not_fall_when_an_engine_dies(engine: AsyncLLM, replicas: Replicas) -> None:
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(60)) for i in range(8)]
    answers = asyncio.gather(*map(collect, streams))
    await eventually(lambda: engine.stats.num_generation_tokens > 100)
    before = engine.stats
    replicas.may_start.clear()
    await kill(engine, replicas, 0)
    after = engine.stats
    replicas.may_start.set()
    assert after.num_generation_tokens >= before.num_generation_tokens
    assert after.replicas[0].num_generation_tokens >= before.replicas[0].num_generation_tokens
    assert after.replicas[0].num_running == 0
    await answers
    await assert_all_free(engine)
    assert engine.stats.num_generation_tokens >= 8 * 60
    assert engine.stats.num_prompt_tokens == 8 * 10, "a prompt counts once, however often it is computed"


@replica_test(functools.partial(Replicas, seconds=0.002))
async def test_metrics_of_a_request_span_its_engines(engine: AsyncLLM, replicas: Replicas) -> None:
    stream = await engine.add_request("r", prompt_ids(1), greedy(40))
    first = await anext(stream)
    while not (mine := [i for i in (0, 1) if "r" in replicas.requests_of(i)]):
        await asyncio.sleep(0.001)
    await kill(engine, replicas, mine[0])
    outputs: list[RequestOutput] = [first, *[o async for o in stream]]
    metrics = outputs[-1].metrics
    assert metrics is not None and metrics.num_generation_tokens == 40
    assert metrics.prefill_time is not None and metrics.prefill_time >= 0
    assert metrics.queue_time is not None and metrics.queue_time >= 0
    assert metrics.time_to_first_token is not None and 0 < metrics.time_to_first_token <= (metrics.e2e_latency or 0)
    assert first.metrics is not None and metrics.time_to_first_token == first.metrics.time_to_first_token
    assert metrics.replica == 1 - mine[0]
    await assert_all_free(engine)


@replica_test(functools.partial(Replicas, seconds=0.002))
async def test_two_deaths_in_a_row_lose_nothing(engine: AsyncLLM, replicas: Replicas) -> None:
    """The second engine dies when all the requests of the first have gone on: none of them was a suspect any more."""
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(150)) for i in range(8)]
    answers = asyncio.gather(*map(collect, streams))
    await eventually(lambda: engine.stats.num_generation_tokens > 40)
    await kill(engine, replicas, 0)
    await no_suspects(engine)
    await kill(engine, replicas, 1)
    assert await answers == [oracle(prompt_ids(i), 150) for i in range(8)]
    await assert_all_free(engine)


@replica_test(functools.partial(Replicas, seconds=0.001), num_replicas=3)
async def test_all_engines_killed_at_once_lose_nothing(engine: AsyncLLM, replicas: Replicas) -> None:
    """The front end hears of one death after another, and in between it sends requests to engines that are dead."""
    for number in range(5):
        await all_alive(engine)
        doomed = list(replicas.now.values())
        entered = [executor.num_entered for executor in doomed]
        for executor in doomed:
            executor.gate.clear()
        streams = [await engine.add_request(f"{number}-{i}", prompt_ids(i), greedy(40)) for i in range(7)]
        answers = asyncio.gather(*map(collect, streams))
        await eventually(lambda: all(e.num_entered > n for e, n in zip(doomed, entered, strict=True)))  # noqa: B023
        for executor in doomed:
            executor.is_killed = True
        replicas.open_gates()
        assert await answers == [oracle(prompt_ids(i), 40) for i in range(7)]
    await assert_all_free(engine)


@replica_test(functools.partial(Replicas, seconds=0.001))
async def test_while_no_engine_lives_requests_wait(engine: AsyncLLM, replicas: Replicas) -> None:
    replicas.may_start.clear()
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(100)) for i in range(4)]
    answers = asyncio.gather(*map(collect, streams))
    await eventually(lambda: all(replicas.requests_of(i) for i in (0, 1)))
    await kill(engine, replicas, 0)
    await no_suspects(engine)
    await kill(engine, replicas, 1)
    assert engine.num_alive == 0 and not engine.is_dead
    late = await engine.add_request("late", prompt_ids(9), greedy(5))
    gone = await engine.add_request("gone", prompt_ids(9), greedy(5, n=2, temperature=1.0))
    assert client_of(engine)._requests.num_waiting == 4 + 1 + 2
    engine.abort("gone")
    assert {o.outputs[0].finish_reason async for o in gone} == {"abort"}
    await eventually(lambda: engine.stats.num_waiting == 5)
    assert engine.stats.num_running == 0
    assert await engine.reset_prefix_cache() is True
    assert not answers.done()
    replicas.may_start.set()
    assert await answers == [oracle(prompt_ids(i), 100) for i in range(4)]
    assert await collect(late) == oracle(prompt_ids(9), 5)
    await assert_all_free(engine)


def poisoned() -> Replicas:
    return Replicas(poison=lambda request_id: request_id == "bad", seconds=0.001)


@replica_test(poisoned)
async def test_a_request_that_kills_two_engines_fails_alone(engine: AsyncLLM, replicas: Replicas) -> None:
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(40)) for i in range(12)]
    answers = asyncio.gather(*map(collect, streams))
    await eventually(lambda: engine.stats.num_generation_tokens > 20)
    with pytest.raises(RequestFailedError, match="'bad' failed inside the engine"):
        await collect(await engine.add_request("bad", prompt_ids(99), greedy(40)))
    assert await answers == [oracle(prompt_ids(i), 40) for i in range(12)]
    assert not engine.is_dead and len(replicas.made) <= 4
    await all_alive(engine)
    await assert_all_free(engine)


@replica_test(lambda: Replicas(poison=lambda request_id: request_id.startswith("bad"), seconds=0.001))
async def test_several_such_requests_fail_one_by_one(engine: AsyncLLM, replicas: Replicas) -> None:
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(60)) for i in range(6)]
    answers = asyncio.gather(*map(collect, streams))
    await eventually(lambda: engine.stats.num_generation_tokens > 10)
    bad = [await engine.add_request(f"bad{i}", prompt_ids(90 + i), greedy(40)) for i in range(3)]
    failures = await asyncio.gather(*map(collect, bad), return_exceptions=True)
    assert [type(failure) for failure in failures] == [RequestFailedError] * 3
    assert await answers == [oracle(prompt_ids(i), 60) for i in range(6)]
    await assert_all_free(engine)


@replica_test(lambda: Replicas(poison=lambda request_id: True))
async def test_a_death_with_every_request_ends_each_of_them_and_not_the_server(
    engine: AsyncLLM, replicas: Replicas
) -> None:
    for i in range(3):
        with pytest.raises(RequestFailedError):
            await collect(await engine.add_request(f"r{i}", prompt_ids(i), greedy(4)))
    assert not engine.is_dead


@replica_test(functools.partial(Replicas, seconds=0.001))
async def test_three_deaths_without_a_finished_request_end_the_server(engine: AsyncLLM, replicas: Replicas) -> None:
    """Every stream ends with the cause, and none hangs."""
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(200)) for i in range(6)]
    answers = [asyncio.ensure_future(collect(stream)) for stream in streams]
    for index in (0, 1, 0):
        await all_alive(engine)
        await no_suspects(engine)
        await kill(engine, replicas, index)
    for answer in answers:
        with pytest.raises(EngineDeadError, match=r"3 engines have died within 60 s.*replica 0 was killed"):
            await answer
    with pytest.raises(EngineDeadError):
        await engine.add_request("new", [1], greedy())
    assert engine.is_dead and engine.num_alive == 0


@replica_test(functools.partial(Replicas, seconds=0.001))
async def test_an_engine_that_cannot_be_started_again_ends_the_server_only_if_it_was_the_last(
    engine: AsyncLLM, replicas: Replicas
) -> None:
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(200)) for i in range(4)]
    answers = [asyncio.ensure_future(collect(stream)) for stream in streams]
    await eventually(lambda: all(replicas.requests_of(i) for i in (0, 1)))
    replicas.start_error = RuntimeError("no memory is left")
    await kill(engine, replicas, 0)
    await eventually(lambda: client_of(engine).replicas[0].num_deaths == 3)
    assert not engine.is_dead and await asyncio.gather(*answers) == [oracle(prompt_ids(i), 200) for i in range(4)]
    replicas.now[1].is_killed = True
    with pytest.raises(EngineDeadError, match=r"it could not be started again: RuntimeError: no memory is left"):
        await collect(await engine.add_request("last", prompt_ids(1), greedy(200)))


def test_deaths_far_apart_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel_client, "LONGEST_PAUSE", 0.001)

    async def test() -> None:
        replicas = Replicas()
        async with make_replicas(replicas) as engine:
            now = [0.0]
            client_of(engine)._clock = lambda: now[0]
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(200)) for i in range(6)]
            answers = asyncio.gather(*map(collect, streams))
            for number in range(6):
                now[0] += 31.0
                await all_alive(engine)
                await no_suspects(engine)
                for sent in client_of(engine)._requests._requests.values():
                    sent.num_blamed = 0  # what requests are blamed for is the matter of other tests
                await kill(engine, replicas, number % 2)
            assert await answers == [oracle(prompt_ids(i), 200) for i in range(6)]

    run_async(test)


def test_deaths_between_which_requests_end_do_not_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel_client, "LONGEST_PAUSE", 0.001)

    async def test() -> None:
        replicas = Replicas(seconds=0.001)
        async with make_replicas(replicas) as engine:
            for number in range(8):
                await all_alive(engine)
                streams = [await engine.add_request(f"{number}-{i}", prompt_ids(i), greedy(20)) for i in range(4)]
                answers = asyncio.gather(*map(collect, streams))
                await eventually(lambda index=number % 2: replicas.requests_of(index))
                await kill(engine, replicas, number % 2)
                assert await answers == [oracle(prompt_ids(i), 20) for i in range(4)]

    run_async(test)


@replica_test(functools.partial(Replicas, seconds=0.002), num_replicas=3)
async def test_the_completions_of_a_request_are_tried_one_by_one_after_a_death(
    engine: AsyncLLM, replicas: Replicas
) -> None:
    """A request with n > 1 that comes during the search: its completions may be the next to kill an engine."""
    replicas.may_start.clear()
    stream = await engine.add_request("old", prompt_ids(1), greedy(20))
    await anext(stream)
    replicas.now[1].gate.clear()
    replicas.now[2].gate.clear()
    await kill(engine, replicas, 0)
    several = await engine.add_request("new", prompt_ids(2), greedy(8, n=3, temperature=1.0))
    requests = client_of(engine)._requests
    assert sorted(requests.load(index).num_requests for index in (1, 2)) == [1, 1] and requests.num_waiting == 2
    replicas.open_gates()
    await collect(stream)
    outputs = [output async for output in several]
    assert outputs[-1].finished and {part.index for o in outputs for part in o.outputs} == {0, 1, 2}
    await assert_all_free(engine)


def test_the_pause_before_a_restart_grows() -> None:
    assert [pause_before_start(n) for n in (1, 2, 3, 4, 9)] == [0.0, 1.0, 2.0, 4.0, 30.0]


@replica_test(functools.partial(Replicas, seconds=0.002))
async def test_an_abort_that_a_dead_engine_did_not_confirm_is_over(engine: AsyncLLM, replicas: Replicas) -> None:
    """The name is free again, and nothing waits for the confirmation."""
    replicas.now[0].gate.clear()
    replicas.now[1].gate.clear()
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(20)) for i in range(4)]
    await eventually(lambda: all(replicas.now[i].num_entered for i in (0, 1)))
    engine.abort(["r0", "r1"])
    assert [[o.outputs[0].finish_reason async for o in stream] for stream in streams[:2]] == [["abort"]] * 2
    again = await engine.add_request("r0", prompt_ids(50), greedy(8))
    owner = next(sent.replica for sent in client_of(engine)._requests._requests.values() if sent.replica is not None)
    await kill(engine, replicas, owner)
    replicas.open_gates()
    assert await collect(again) == oracle(prompt_ids(50), 8)
    assert await asyncio.gather(*map(collect, streams[2:])) == [oracle(prompt_ids(i), 20) for i in (2, 3)]
    await assert_all_free(engine)


@replica_test(functools.partial(Replicas, seconds=0.002))
async def test_a_call_does_not_wait_for_a_dead_engine(engine: AsyncLLM, replicas: Replicas) -> None:
    replicas.now[0].gate.clear()
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(10)) for i in range(2)]
    await eventually(lambda: replicas.now[0].num_entered)
    call = asyncio.ensure_future(engine.reset_prefix_cache(True))
    await asyncio.sleep(0.02)
    assert not call.done()
    await kill(engine, replicas, 0)
    assert await call is True
    assert await asyncio.gather(*map(collect, streams)) == [oracle(prompt_ids(i), 10) for i in range(2)]


def test_random_kills_under_load_lose_no_token() -> None:
    """Requests come and are aborted while engines die. Whatever ends normally has all its tokens."""
    rng = random.Random(5)

    async def test() -> None:
        replicas = Replicas(seconds=0.0005)
        async with make_replicas(replicas, num_replicas=3) as engine:
            client_of(engine)._deaths = type(client_of(engine)._deaths)(maxlen=1000)
            finished, failed = 0, 0

            async def one(number: int) -> None:
                nonlocal finished, failed
                await asyncio.sleep(rng.random() * 0.6)
                wanted = oracle(prompt_ids(number), 30)
                try:
                    stream = await engine.add_request(f"r{number}", prompt_ids(number), greedy(30))
                    if number % 5 == 0:
                        await anext(stream)
                        await stream.aclose()
                    else:
                        assert await collect(stream) == wanted
                        finished += 1
                except RequestFailedError:  # it was tried alone when the second engine was killed
                    failed += 1

            async def killer() -> None:
                for _ in range(5):
                    await asyncio.sleep(0.1)
                    replicas.now[rng.randrange(3)].is_killed = True

            await asyncio.gather(killer(), *(one(number) for number in range(80)))
            assert finished >= 55 and failed <= 5
            await all_alive(engine)
            await assert_all_free(engine)

    run_async(test)


# ---- the start


def test_a_start_that_fails_says_why_and_leaves_nothing() -> None:
    async def test() -> None:
        def refused(config: Any) -> Any:
            if config.parallel_config.data_parallel_rank == 1:
                raise ValueError("block_size is odd: use an even one")
            return Replicas()(config)

        with pytest.raises(ValueError, match=r"^block_size is odd: use an even one$"):
            async with make_replicas(refused, num_replicas=3):
                pass

    run_async(test)


def test_one_engine_needs_no_router() -> None:
    async def test() -> None:
        async with make_async_llm() as engine:
            assert not hasattr(engine._client, "replicas") and engine.num_alive == engine.num_engines == 1
            assert engine.stats.replicas == ()

    run_async(test)


def test_each_engine_writes_a_trace_of_its_own() -> None:
    config = serving_config(trace="out/run.jsonl")
    assert replica_config(config, 1).trace == "out/run.1.jsonl"
    assert replica_config(config, 1, start=2).trace == "out/run.1-2.jsonl"
    assert replica_config(config, 2).parallel_config.data_parallel_rank == 2
    assert replica_config(serving_config(), 1).trace is None


# ---- watching


@replica_test(functools.partial(Replicas, seconds=0.002))
async def test_the_live_trace_of_each_engine_survives_a_death(engine: AsyncLLM, replicas: Replicas) -> None:
    """The lines carry the engine's number, and the lines of each engine alone are a complete trace."""
    with engine.watch() as watcher:
        streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(60)) for i in range(6)]
        answers = asyncio.gather(*map(collect, streams))
        await eventually(lambda: engine.stats.num_generation_tokens > 60)
        replicas.may_start.clear()
        await kill(engine, replicas, 0)
        with engine.watch() as late:  # it is told of the death that it has not seen
            await eventually(lambda: '"dead"' in "".join(late._lines))
        replicas.may_start.set()
        await answers
        await all_alive(engine)
        last = [await engine.add_request(f"s{i}", prompt_ids(i), greedy(4)) for i in range(4)]
        await asyncio.gather(*map(collect, last))
        await assert_all_free(engine)
        await asyncio.sleep(0.05)
        lines = []
        while watcher._lines:
            lines.append(json.loads(await anext(watcher)))
    assert {line["replica"] for line in lines} == {0, 1}
    for index in (0, 1):
        own = [line for line in lines if line["replica"] == index]
        num_dead = sum(line.get("type") == "dead" for line in own)
        assert (num_dead > 0) == (index == 0), "otherwise the page shows the last step as if it were the present"
        own = [line for line in own if line.get("type") != "dead"]
        assert [line.get("type") for line in own[:2]] == ["header", "snapshot"]
        assert sum(line.get("type") == "snapshot" for line in own) == 2  # engine 1: one more for the late watcher
        replay = Replay()
        for line in own:
            if line.get("type") == "snapshot":
                replay = Replay()
            if "events" in line:
                for event in line["events"][: line["planned"]]:
                    if event[0] != "cached":
                        replay.apply(event)
                replay.run(line["sched"])
                for event in line["events"][line["planned"] :]:
                    replay.apply(event)
        assert replay.requests == {} and replay.tables == {}, "every request that it saw has ended"


# ---- statistics


def test_the_sum_of_statistics() -> None:
    one, two = ReplicaStats(), ReplicaStats()
    numbers = {"num_running": 3, "num_steps": 10, "num_generation_tokens": 30, "kv_cache_usage": 0.5}
    one.update(type(NO_STATS)(**{**vars(NO_STATS), **numbers}))
    total = sum_stats([one.total, two.total], num_unsent=4)
    assert (total.num_running, total.num_waiting, total.num_steps) == (3, 4, 10)
    assert total.kv_cache_usage == 0.25 and total.replicas == (one.total, two.total)
    one.restart()
    assert one.total.num_running == 0 and one.total.kv_cache_usage == 0 and one.total.num_generation_tokens == 30
    one.update(type(NO_STATS)(**{**vars(NO_STATS), **numbers}))
    assert one.total.num_generation_tokens == 60 and one.total.num_running == 3
