"""The checks of m8/backpressure: outputs by hand, a reader that sleeps beside one that does not, and what is kept."""

import asyncio
import copy
import random
import weakref
from typing import Any

from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.request_stream import RequestStream
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_server import ToyServer, clients_run, play
from folovllm.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from folovllm.sampling_params import RequestOutputKind

DELTA, CUMULATIVE, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


def prediction() -> str:
    async def scene() -> list[int]:
        server = ToyServer(RequestStream, RequestOutputCollector)
        stream, sizes = server.open("a", max_tokens=20), []
        for step in range(1, 21):
            server.step()
            if step in (1, 2, 10, 20):
                sizes.append(len((await anext(stream)).outputs[0].token_ids))
        return [*sizes, *[0 async for _ in stream]]

    sizes = play(scene())
    return (
        f"{len(sizes)} outputs, {max(sizes)} tokens\nthe outputs have {sizes} tokens; the last one said that it is over"
    )


def said(text: str, token_ids: list[int], index: int = 0, **fields: Any) -> CompletionOutput:
    return CompletionOutput(index, text, token_ids, **fields)


def output(*completions: CompletionOutput, **fields: Any) -> RequestOutput:
    finished = bool(completions) and all(c.finish_reason for c in completions)
    return RequestOutput("r", None, [1, 2, 3], list(completions), **{"finished": finished} | fields)


def shown(output: RequestOutput | None) -> list[tuple[Any, ...]] | None:
    """The completions of an output by index: (index, text, token ids, finish reason)."""
    completions = [] if output is None else sorted(output.outputs, key=lambda c: c.index)
    return None if output is None else [(c.index, c.text, list(c.token_ids), c.finish_reason) for c in completions]


def collected(mine: Mine, kind: RequestOutputKind, *outputs: RequestOutput) -> RequestOutput:
    """What one get_nowait returns after these outputs."""

    async def scene() -> Any:
        collector = mine.cls(kind)
        for one in outputs:
            collector.put(one)
        return collector.get_nowait()

    got: RequestOutput | None = play(scene())
    assert got is not None, f"{len(outputs)} outputs were put, and get_nowait() returned None: they are lost"
    return got


# ---- one output


@check("unit", spec="R8.4", hint=2)
def what_was_put_can_be_taken_once(mine: Mine) -> None:
    """An output is returned by get or by get_nowait, and then it is gone."""

    async def scene() -> list[Any]:
        collector = mine.cls(DELTA)
        seen = [collector.get_nowait()]
        collector.put(output(said("the", [5])))
        seen += [await collector.get(), collector.get_nowait()]
        collector.put(output(said(" cat", [6])))
        return [shown(one) for one in [*seen, collector.get_nowait(), collector.get_nowait()]]

    got, expected = play(scene()), [None, [(0, "the", [5], None)], None, [(0, " cat", [6], None)], None]
    assert got == expected, (
        f"get_nowait, put 'the', get, get_nowait, put ' cat', get_nowait, get_nowait returned {got}, expected "
        f"{expected}"
    )


@check("unit", spec="R8.4", hint=3)
def get_waits_for_a_put(mine: Mine) -> None:
    """A reader that comes first sleeps until an output comes, again and again."""

    async def scene() -> list[str]:
        collector, seen = mine.cls(DELTA), list[str]()

        async def reader() -> None:
            for _ in range(3):
                seen.append((await collector.get()).outputs[0].text)

        task = asyncio.create_task(reader())
        for text in "abc":
            await clients_run()
            collector.put(output(said(text, [1])))
            await clients_run()
            seen.append("|")
        if not task.done():
            task.cancel()
            return seen
        await task
        return seen

    got = "".join(play(scene()))
    assert got == "a|b|c|", (
        "a reader waited in get; a, b and c were put one by one, and after each the reader had a turn (|): it got "
        f"{got!r}, expected 'a|b|c|': put must wake the reader at once"
    )


# ---- outputs that were not taken


@check("unit", spec="R8.4", hint=2)
def deltas_are_put_together(mine: Mine) -> None:
    """Deltas that were not taken become one: texts, tokens and logprobs follow each other, the rest is the newest."""
    one, two, three = ([{token: Logprob(-1.0 * token)}] for token in (5, 6, 7))
    got = collected(
        mine,
        DELTA,
        output(said("the", [5], logprobs=one, cumulative_logprob=-5.0), prompt_logprobs=[None]),
        output(said(" cat", [6], logprobs=two, cumulative_logprob=-11.0)),
        output(said("", [7], logprobs=three, cumulative_logprob=-18.0, finish_reason="stop", stop_reason=7)),
    )
    expected = [(0, "the cat", [5, 6, 7], "stop")]
    assert shown(got) == expected, (
        f"'the', ' cat' and the end were put, and get_nowait() returned {shown(got)}, expected {expected}: a "
        "reader that "
        "sleeps for three steps must find everything"
    )
    (completion,) = got.outputs
    assert completion.logprobs == [*one, *two, *three], (
        f"the logprobs are {completion.logprobs}, expected those of 5, 6, 7"
    )
    rest = (completion.cumulative_logprob, completion.stop_reason, got.finished, got.prompt_logprobs)
    assert rest == (-18.0, 7, True, [None]), (
        f"(cumulative_logprob, stop_reason, finished, prompt_logprobs) is {rest}, expected (-18.0, 7, True, [None])"
    )


@check("unit", spec="R8.4", hint=2)
def an_output_may_carry_all_completions(mine: Mine) -> None:
    """With n=2 an output may speak of both completions, and both are merged."""
    got = shown(
        collected(
            mine,
            DELTA,
            output(said("a ", [8], index=1)),
            output(said("the ", [5]), said("dog", [9], index=1)),
            output(said("cat", [6]), said("", [], index=1, finish_reason="stop")),
        )
    )
    expected = [(0, "the cat", [5, 6], None), (1, "a dog", [8, 9], "stop")]
    assert got == expected, (
        f"1 said 'a '; then 0 said 'the ' and 1 'dog' in one output; then 0 said 'cat' and 1 ended in one output: it "
        f"came out as {got}, expected {expected}"
    )


@check("unit", spec="R8.4", hint=2)
def completions_are_kept_apart(mine: Mine) -> None:
    """With n=2 each output speaks of one completion. The one must not displace the other."""
    got = shown(
        collected(
            mine,
            DELTA,
            output(said("the ", [5])),
            output(said("a ", [8], index=1)),
            output(said("cat", [6], finish_reason="stop"), finished=False),
        )
    )
    expected = [(0, "the cat", [5, 6], "stop"), (1, "a ", [8], None)]
    assert got == expected, (
        f"completion 0 said 'the ', 1 said 'a ', 0 said 'cat': it came out as {got}, expected {expected}"
    )


@check("unit", spec="R8.4", hint=2)
def the_newest_cumulative_output_is_enough(mine: Mine) -> None:
    """An output that says everything takes the place of the older one, of its completion."""
    outputs = (
        output(said("the", [5])),
        output(said("a", [8], index=1)),
        output(said("the cat", [5, 6], finish_reason="stop"), finished=False),
    )
    expected = [(0, "the cat", [5, 6], "stop"), (1, "a", [8], None)]
    for kind in (CUMULATIVE, FINAL_ONLY):
        got = shown(collected(mine, kind, *outputs))
        assert got == expected, (
            f"{kind.name}: completion 0 said 'the', 1 said 'a', 0 said 'the cat': it came out as {got}, expected "
            f"{expected}"
        )


@check("unit", spec="R8.4", hint=2)
def the_rest_is_the_newest(mine: Mine) -> None:
    """What is not text, tokens or logprobs comes from the newest output. If there are no logprobs, they stay None."""
    for kind in (DELTA, CUMULATIVE):
        got = collected(
            mine,
            kind,
            output(said("the", [5]), metrics=RequestMetrics(0.0, num_generation_tokens=1)),
            output(said(" cat", [6]), metrics=RequestMetrics(0.0, num_generation_tokens=2), num_cached_tokens=4),
        )
        rest = (got.metrics and got.metrics.num_generation_tokens, got.num_cached_tokens)
        assert rest == (2, 4), (
            f"{kind.name}: two outputs were put; (metrics.num_generation_tokens, num_cached_tokens) is {rest} in the "
            "merged one, expected those of the newer, (2, 4)"
        )
        logprobs = got.outputs[0].logprobs
        assert logprobs is None, f"{kind.name}: logprobs is None in both outputs, and {logprobs} in the merged one"
        got = collected(mine, kind, output(said("the", [5]), finished=True), output(said("", []), finished=False))
        assert got.finished, f"{kind.name}: `finished` is true in the older output, and False in the merged one"


@check("unit", spec="R8.4", hint=3)
def put_changes_nothing_that_it_is_given(mine: Mine) -> None:
    """The outputs also go to the metrics and to the log, so a merge makes a new object."""
    for kind in (DELTA, CUMULATIVE):
        outputs = [
            output(said(text, [i], logprobs=[{i: Logprob(-1.0)}])) for i, text in enumerate(("the", " cat", " sat"))
        ]
        outputs.append(output(said("a", [9], index=1)))
        before = copy.deepcopy(outputs)
        collected(mine, kind, *outputs)
        changed = [i for i in range(len(outputs)) if outputs[i] != before[i]]
        assert not changed, (
            f"{kind.name}: four outputs were put and merged; number {changed[0] + 1} was "
            f"{shown(before[changed[0]])} and "
            f"is {shown(outputs[changed[0]])} now, so the metrics, which hold it too, count tokens twice"
        )


# ---- errors and cancellations


@check("unit", spec="R8.5", hint=2)
def an_error_comes_after_the_text(mine: Mine) -> None:
    """If the engine fails a request, its reader first gets the text that was made, and then the error."""
    for put_first in (True, False):
        got = play(errors_seen(mine, put_first))
        expected = [*["the cat"] * put_first, "ValueError: failed"]
        assert got == expected, (
            f"{'the deltas of `the cat`, then ' if put_first else ''}an error was put, and the reader got {got}, "
            "expected "
            f"{expected}: the error must reach it, and must not throw away what came before"
        )


async def errors_seen(mine: Mine, put_first: bool) -> list[str]:
    collector, seen = mine.cls(DELTA), list[str]()
    if put_first:
        collector.put(output(said("the", [5])))
        collector.put(output(said(" cat", [6])))
    collector.put(ValueError("failed"))
    try:
        for _ in range(2):
            seen.append((await collector.get()).outputs[0].text)
    except ValueError as error:
        seen.append(f"ValueError: {error}")
    return seen


@check("unit", spec="R8.5", hint=3)
def a_sleeping_reader_hears_of_an_error(mine: Mine) -> None:
    """An error wakes the reader that waits in get."""

    async def scene() -> str:
        collector = mine.cls(DELTA)
        task = asyncio.create_task(collector.get())
        await clients_run()
        collector.put(ValueError("failed"))
        try:
            return str(await task)
        except ValueError as error:
            return f"ValueError: {error}"

    got = play(scene())
    assert got == "ValueError: failed", f"a reader waited in get, and an error was put: it got {got!r}"


@check("unit", spec="R8.4", hint=3)
def a_cancelled_get_loses_nothing(mine: Mine) -> None:
    """A reader with a timeout may be cancelled at any moment, also between the put and its turn."""

    async def scene(put_first: bool) -> str:
        collector = mine.cls(DELTA)
        task = asyncio.create_task(collector.get())
        await clients_run()
        if put_first:
            collector.put(output(said("the", [5])))
        task.cancel()
        await asyncio.wait([task])
        if not put_first:
            collector.put(output(said("the", [5])))
        found = collector.get_nowait()
        return "" if found is None else found.outputs[0].text

    for put_first in (True, False):
        got = play(scene(put_first))
        assert got == "the", (
            f"a reader waited in get and was cancelled {'just after' if put_first else 'before'} 'the' was put; "
            "the next "
            f"get found {got!r}, expected 'the'"
        )


@check("unit", spec="R8.4", hint=3)
def a_get_that_is_cancelled_late_loses_nothing(mine: Mine) -> None:
    """The cancellation may also come some turns after the reader was woken: get has returned the output, or kept it."""

    async def scene(turns: int) -> str:
        collector = mine.cls(DELTA)
        task = asyncio.create_task(collector.get())
        await clients_run()
        collector.put(output(said("the", [5])))
        await clients_run(turns)
        task.cancel()
        await asyncio.wait([task])
        found = collector.get_nowait() if task.cancelled() else task.result()
        return "" if found is None else found.outputs[0].text

    for turns in range(1, 6):
        got = play(scene(turns))
        assert got == "the", (
            f"a reader waited in get, 'the' was put, and the reader was cancelled {turns} turn(s) of the event loop "
            f"later. get did not return, and the next one found {got!r}, expected 'the': an output that was "
            "taken must be returned before anything is awaited"
        )


# ---- any order of puts and gets


@check("property", spec="R8.4", hint=2)
def nothing_is_lost_in_any_order(mine: Mine) -> None:
    """Whenever the reader takes, it gets every token of each completion once and in order, as one output."""
    for seed in range(60):
        rng = random.Random(seed)
        events = [rng.choice(("get", "0", "1")) for _ in range(1 + seed // 3)]
        for kind in (DELTA, CUMULATIVE):
            play(puts_and_gets(mine, kind, events))


async def puts_and_gets(mine: Mine, kind: RequestOutputKind, events: list[str]) -> None:
    collector, made = mine.cls(kind), {0: list[int](), 1: list[int]()}
    got = {0: list[int](), 1: list[int]()}
    for number, event in enumerate([*events, "get"]):
        if event != "get":
            index = int(event)
            made[index].append(number)
            new = [number] if kind is DELTA else list(made[index])
            collector.put(output(said("".join(f"{t} " for t in new), new, index)))
        elif (found := collector.get_nowait()) is not None:
            for c in found.outputs:
                got[c.index] = got[c.index] + list(c.token_ids) if kind is DELTA else list(c.token_ids)
            second = collector.get_nowait()
            assert second is None, f"{kind.name}, {events}: two outputs waited, the second one is {shown(second)}"
    assert got == made, (
        f"{kind.name}: after the events {events} (0 and 1: a token of that completion was put) and a last get, the "
        "reader "
        f"has {got}, expected {made}"
    )


# ---- the scene: a reader that sleeps beside one that does not


@check("engine", spec="R8.4", hint=1)
def a_sleeping_reader_delays_no_other(mine: Mine) -> None:
    """Two clients of one engine: one reads every token, one sleeps. Both get their texts, in as many steps as alone."""
    steps, sizes, texts = play(two_readers(mine, max_tokens=30, naps={5: 12}))
    alone, _, expected = play(two_readers(mine, max_tokens=30, naps={}))
    assert texts == expected, f"with a nap of 12 steps the texts are {texts}, without it {expected}: something was lost"
    assert steps == alone, (
        f"the engine took {steps} steps for both with a nap, and {alone} without: it waited for a reader"
    )
    assert set(sizes["awake"]) <= {0, 1}, (
        f"the reader that was awake got outputs of {sizes['awake']} tokens, expected 1 each"
    )
    assert max(sizes["sleeper"]) == 13, (
        f"the sleeper missed 12 steps and read after the next; its outputs have {sizes['sleeper']} tokens, "
        "expected one of "
        "13: it must catch up at once, and not output by output"
    )


async def two_readers(
    mine: Mine, max_tokens: int, naps: dict[int, int]
) -> tuple[int, dict[str, list[int]], dict[str, str]]:
    """Steps of the engine, and the outputs' sizes and the text of each reader. naps: step -> steps without reading."""
    server = ToyServer(RequestStream, mine.cls)
    streams = {name: server.open(name, max_tokens=max_tokens) for name in ("awake", "sleeper")}
    sizes: dict[str, list[int]] = {name: [] for name in streams}
    texts, step, asleep_until = dict.fromkeys(streams, ""), 0, 0

    async def take(name: str) -> bool:
        found = await anext(streams[name], None)
        if found is not None:
            sizes[name].append(len(found.outputs[0].token_ids))
            texts[name] += found.outputs[0].text
        return found is not None

    while server.core.has_unfinished_requests():
        server.step()
        step += 1
        asleep_until = max(asleep_until, step + naps.get(step, 0))
        await take("awake")
        if step >= asleep_until:
            await take("sleeper")
    for name in streams:
        while await take(name):
            pass
    return step, sizes, texts


# ---- what is kept, and what waiting costs


@check("counters", spec="R8.4", hint=1)
def what_is_kept_does_not_grow(mine: Mine) -> None:
    """Of 2,000 outputs that are never read, only the merged one is left: memory is bounded by the answer."""
    for kind in (DELTA, CUMULATIVE):
        alive = play(unread(mine, kind, 2000))
        assert alive <= 3, (
            f"{kind.name}: 2000 outputs were put and none was taken; {alive} of them are still in memory, expected "
            "at most "
            "3: a client that never reads would fill the server's memory"
        )


async def unread(mine: Mine, kind: RequestOutputKind, num_outputs: int) -> int:
    collector, outputs = mine.cls(kind), list["weakref.ref[CompletionOutput]"]()
    for i in range(num_outputs):
        completion = said(f"{i} ", [i])
        outputs.append(weakref.ref(completion))
        collector.put(output(completion))
        del completion
    return sum(ref() is not None for ref in outputs)


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts the callbacks that it is asked to run."""

    num_calls = 0

    def call_soon(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return super().call_soon(*args, **kwargs)

    def call_at(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return super().call_at(*args, **kwargs)


@check("counters", spec="R8.4", hint=3)
def waiting_costs_nothing(mine: Mine) -> None:
    """A reader that waits does not run: a server has thousands of them."""

    async def calls(wait: bool) -> int:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, CountingLoop), "the loop of this check"
        task = asyncio.create_task(mine.cls(DELTA).get()) if wait else None
        await clients_run()
        before = loop.num_calls
        await clients_run(100)
        num_calls = loop.num_calls - before
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            _ = task.cancelled() or task.result()
        return num_calls

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        extra = runner.run(calls(wait=True)) - runner.run(calls(wait=False))
    assert extra <= 1, (
        f"while a reader waited in get for 100 turns of the event loop, it ran {extra} times, expected 0: it "
        "polls, and a "
        "thousand waiting readers would leave no time for the others"
    )
