"""The checks of m8/abort_on_disconnect: clients of the toy engine that leave in every way, and its blocks, counted."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.request_stream import RequestStream
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_server import HeldExecutor, ToyServer, clients_run, play, start_toy_llm
from folovllm.sampling_params import RequestOutputKind, SamplingParams

DELTA = RequestOutputKind.DELTA
PROMPT, ANSWER = 8, 24


def prediction() -> str:
    async def scene() -> str:
        server = ToyServer(RequestStream)
        streams = {name: server.open(name, PROMPT, ANSWER) for name in "abc"}
        for _ in range(4):
            server.step()
        before = server.num_used_blocks
        await streams["b"].aclose()
        after = server.num_used_blocks
        return f"{before}, {after}, {sum(len(output.new_token_ids) for output in server.step())}"

    return play(scene())


async def read(stream: Any, num_outputs: int | None = None) -> list[int]:
    """The tokens of the next outputs, or of all that come."""
    tokens: list[int] = []
    while num_outputs is None or num_outputs > 0:
        try:
            output = await anext(stream)
        except StopAsyncIteration:
            break
        tokens += output.outputs[0].token_ids
        num_outputs = None if num_outputs is None else num_outputs - 1
    return tokens


async def was_cancelled(task: "asyncio.Task[Any]") -> bool:
    """Waits for the end of a task, and raises what it raised. Whether it was cancelled, and did not end otherwise."""
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return task.cancelled()


def check_it_left(server: ToyServer, name: str, how: str, num_used: int = 0) -> None:
    """The request was aborted once, and its blocks are free now, before the next step."""
    assert name in server.aborted, (
        f"the client of request {name!r} {how}, and abort was not called: the engine goes on to the end of an answer "
        "that is never read"
    )
    assert server.aborted == [name], f"the client of request {name!r} {how}; abort was called with {server.aborted}"
    assert server.num_used_blocks == num_used, (
        f"the client of request {name!r} {how}; {server.num_used_blocks} blocks are in use, expected {num_used}"
    )


# ---- a client that stays


@check("unit", spec="R8.3", hint=2)
def a_client_that_stays_gets_everything(mine: Mine) -> None:
    """All outputs come in order, the iteration ends after the last one, and nothing is aborted."""

    async def scene() -> tuple[list[int], int, list[str]]:
        server = ToyServer(mine.cls)
        stream = server.open("a", PROMPT, 5)
        tokens, _ = await asyncio.gather(read(stream), server.serve())
        with contextlib.suppress(StopAsyncIteration):
            await anext(stream)
            raise AssertionError("after the last output, anext(stream) returned another one")
        return tokens, server.num_used_blocks, server.aborted

    tokens, num_used, aborted = play(scene())
    assert len(tokens) == 5 and num_used == 0, f"an answer of 5 tokens came out as {tokens}; {num_used} blocks in use"
    assert aborted == [], f"the client read to the end, and abort was called with {aborted}"


@check("unit", spec="R8.3", hint=3)
def what_has_finished_is_not_aborted(mine: Mine) -> None:
    """A finished request is left alone: its id may belong to the next request already."""

    async def scene() -> tuple[list[str], int]:
        server = ToyServer(mine.cls)
        async with server.open("a", PROMPT, 3) as stream:
            await asyncio.gather(read(stream), server.serve())
            retry = server.open("a", PROMPT, ANSWER)  # the client asks again, under the same id
            server.step()
        await stream.aclose()
        tokens, _ = await asyncio.gather(read(retry), server.serve())
        return server.aborted, len(tokens)

    aborted, num_tokens = play(scene())
    assert aborted == [] and num_tokens == ANSWER, (
        "request 'a' finished, a new request took its id, and the old stream was closed: abort was called with "
        f"{aborted}, "
        f"and the new request got {num_tokens} of {ANSWER} tokens, so one client has ended the request of another"
    )


@check("unit", spec="R8.3", hint=2)
def a_reader_may_leave_with_the_last_output(mine: Mine) -> None:
    """A reader that breaks out of its loop at the output that is `finished` leaves nothing that could be aborted."""

    async def scene() -> list[str]:
        server = ToyServer(mine.cls)
        async with server.open("a", PROMPT, 1) as stream:
            server.step()
            async for output in stream:
                assert output.finished, "the only output of an answer of one token"
                break
        return server.aborted

    aborted = play(scene())
    assert aborted == [], (
        f"the reader broke out of its loop at the last output, and abort was called with {aborted}: the request had "
        "finished when that output was returned, and not only when the reader asked for the next one"
    )


# ---- a client that leaves


@check("unit", spec="R8.3", hint=1)
def breaking_out_frees_the_blocks(mine: Mine) -> None:
    """A reader that breaks out of its loop leaves the request, and the blocks are free before the next step."""

    async def scene() -> ToyServer:
        server = ToyServer(mine.cls)
        async with server.open("a", PROMPT, ANSWER) as stream:
            server.step()
            async for _ in stream:
                break
        return server

    check_it_left(play(scene()), "a", "left the block after its first output")


@check("unit", spec="R8.3", hint=1)
def closing_frees_the_blocks(mine: Mine) -> None:
    """aclose leaves the request, also without an `async with`. It may be called again."""

    async def scene() -> ToyServer:
        server = ToyServer(mine.cls)
        stream = server.open("a", PROMPT, ANSWER)
        server.step()
        async with stream:
            await read(stream, 1)
            await stream.aclose()
            check_it_left(server, "a", "called aclose()")
        await stream.aclose()
        return server

    check_it_left(play(scene()), "a", "called aclose() twice, and left the block")


@check("unit", spec="R8.3", hint=2)
def leaving_waits_for_nothing(mine: Mine) -> None:
    """aclose aborts before it gives other tasks a turn. A task that is cancelled again would not come back to it."""

    async def scene() -> list[str]:
        server = ToyServer(mine.cls)
        stream = server.open("a", PROMPT, ANSWER)
        server.step()
        await read(stream, 1)
        leaving = stream.aclose()
        with contextlib.suppress(StopIteration):
            leaving.send(None)  # runs until it ends, or until it waits
        leaving.close()
        return server.aborted

    aborted = play(scene())
    assert aborted == ["a"], (
        f"aclose() ran until it waited for the first time, and abort was called with {aborted}, expected ['a']: the "
        "engine may take its next step before the request is aborted"
    )


@check("unit", spec="R8.3", hint=3)
def a_cancelled_reader_leaves(mine: Mine) -> None:
    """A task that is cancelled while it waits in __anext__ has left, also without `async with`. It stays cancelled."""

    async def scene() -> tuple[ToyServer, bool]:
        server = ToyServer(mine.cls)
        task = asyncio.create_task(read(server.open("a", PROMPT, ANSWER)))
        server.step()
        await clients_run()
        task.cancel()
        return server, await was_cancelled(task)

    server, went_on = play(scene())
    check_it_left(server, "a", "was cancelled while it waited for its second output")
    assert went_on, (
        "the reader was cancelled while it waited, and its task ended as if nothing had happened: CancelledError was "
        "swallowed, so timeouts and the shutdown of the server cannot stop a handler"
    )


@check("unit", spec="R8.3", hint=3)
def a_reader_in_the_queue_leaves(mine: Mine) -> None:
    """A client may leave before its request was admitted. It is never admitted, then."""

    async def scene() -> tuple[ToyServer, int]:
        server = ToyServer(mine.cls, max_num_seqs=1)
        first = asyncio.create_task(read(server.open("a", PROMPT, ANSWER)))
        second = asyncio.create_task(read(server.open("b", PROMPT, ANSWER)))
        server.step()
        await clients_run()
        num_used = server.num_used_blocks
        second.cancel()
        await was_cancelled(second)
        check_it_left(server, "b", "was cancelled in the queue", num_used)
        await server.serve()
        return server, len(await first)

    server, num_tokens = play(scene())
    check_it_left(server, "b", "was cancelled in the queue")
    assert num_tokens == ANSWER, f"the other client got {num_tokens} of its {ANSWER} tokens"


@check("unit", spec="R8.3", hint=1)
def an_exception_of_the_reader_leaves(mine: Mine) -> None:
    """A failed write raises inside the block: the request ends, and the exception goes on."""

    async def scene() -> tuple[ToyServer, bool]:
        server, went_on = ToyServer(mine.cls), False
        try:
            async with server.open("a", PROMPT, ANSWER) as stream:
                server.step()
                await read(stream, 1)
                raise ConnectionResetError
        except ConnectionResetError:
            went_on = True
        return server, went_on

    server, went_on = play(scene())
    check_it_left(server, "a", "raised ConnectionResetError inside the block")
    assert went_on, "the reader raised ConnectionResetError inside the block, and it was swallowed: __aexit__ said True"


@check("unit", spec="R8.3", hint=2)
def a_stream_that_was_left_is_over(mine: Mine) -> None:
    """After aclose, __anext__ neither waits nor returns what was not read before."""

    async def scene() -> Any:
        server = ToyServer(mine.cls)
        stream = server.open("a", PROMPT, ANSWER)
        server.step()  # an output that is never read
        await stream.aclose()
        check_it_left(server, "a", "called aclose() before it had read an output")
        return await anext(stream, "StopAsyncIteration")

    got = play(scene())
    assert got == "StopAsyncIteration", f"after aclose(), anext(stream) returned {got}, expected StopAsyncIteration"


@check("unit", spec="R8.5", hint=2)
def an_error_of_the_engine_ends_the_stream(mine: Mine) -> None:
    """The reader gets the error, then StopAsyncIteration. There is no request left that could be aborted."""

    async def scene() -> tuple[list[Any], list[str]]:
        collector, aborted, seen = RequestOutputCollector(DELTA), list[str](), list[Any]()
        async with mine.cls("a", collector, aborted.append) as stream:
            collector.put(RuntimeError("the engine failed"))
            try:
                seen.append(await anext(stream))
            except RuntimeError as error:
                seen.append(str(error))
            seen.append(await anext(stream, "StopAsyncIteration"))
        return seen, aborted

    seen, aborted = play(scene())
    assert seen == ["the engine failed", "StopAsyncIteration"], (
        f"the engine failed the request; two calls of anext(stream) gave {seen}, expected the error, StopAsyncIteration"
    )
    assert aborted == [], f"the engine had ended the request itself, and abort was called with {aborted}"


# ---- the scene: many clients, some of which leave


@check("property", spec="R8.3", hint=2)
def those_who_stay_lose_nothing(mine: Mine) -> None:
    """Random clients leave in random ways. Each is aborted once, all blocks come back, and the others read on."""
    for seed in range(40):
        rng = random.Random(seed)
        plans = {f"r{i}": rng.choice(list(WAYS)) for i in range(1 + seed // 5)}
        server, tokens = play(many_clients(mine.cls, plans, rng))
        story = ", ".join(f"{name}: {how}" for name, how in plans.items())
        left = sorted(name for name, how in plans.items() if how != "stays")
        assert sorted(server.aborted) == left, (
            f"{story}. abort was called with {sorted(server.aborted)}, expected {left}"
        )
        short = {name: len(tokens[name]) for name in plans if name not in left and len(tokens[name]) != ANSWER}
        assert not short, f"{story}. Each answer has {ANSWER} tokens, but clients that stayed got {short}"
        assert server.num_used_blocks == 0, f"{story}. {server.num_used_blocks} blocks are still in use at the end"


async def stays(stream: Any) -> list[int]:
    return await read(stream)


async def breaks(stream: Any) -> list[int]:
    async with stream:
        return await read(stream, 3)


async def closes(stream: Any) -> list[int]:
    tokens = await read(stream, 2)
    await stream.aclose()
    return tokens


async def fails(stream: Any) -> list[int]:
    with contextlib.suppress(ConnectionResetError):
        async with stream:
            await read(stream, 4)
            raise ConnectionResetError
    return []


async def is_cancelled(stream: Any) -> list[int]:
    task = asyncio.create_task(read(stream))
    await clients_run(40)  # some steps of the engine
    task.cancel()
    await was_cancelled(task)
    return []


WAYS: dict[str, Callable[[Any], Awaitable[list[int]]]] = {
    "stays": stays, "breaks": breaks, "closes": closes, "fails": fails, "is cancelled": is_cancelled,
}  # fmt: skip


async def many_clients(cls: Any, plans: dict[str, str], rng: random.Random) -> tuple[ToyServer, dict[str, list[int]]]:
    server = ToyServer(cls, max_num_seqs=rng.randint(1, 4), num_kv_blocks=rng.randint(17, 40))
    clients = [WAYS[how](server.open(name, rng.randint(1, 20), ANSWER)) for name, how in plans.items()]
    *tokens, _ = await asyncio.gather(*clients, server.serve())
    return server, dict(zip(plans, tokens, strict=True))


# ---- the real front end


@check("engine", spec="R8.3", hint=3)
def one_leaves_and_two_stay(mine: Mine) -> None:
    """An AsyncLLM with its engine in a thread: a client leaves in mid-stream beside two that stay."""
    num_tokens, computed, usage = play(three_clients(mine))
    assert num_tokens == [ANSWER, ANSWER], f"the clients that stayed got {num_tokens} tokens, expected {ANSWER} each"
    most = 2 * ANSWER + 5  # it left after at most 4 steps, and the next one may have begun
    assert computed <= most, (
        f"client b left after at most 4 of its {ANSWER} tokens, and the engine generated {computed} tokens in all, "
        f"expected at most {most}: b's answer was computed to its end"
    )
    assert usage == 0, f"all clients are gone, and {usage:.0%} of the KV cache is still in use"


async def three_clients(mine: Mine) -> tuple[list[int], int, float]:
    """The tokens of the two that stay, the tokens that the engine generated, and the share of its cache in use."""
    held = HeldExecutor()
    greedy = SamplingParams(max_tokens=ANSWER, ignore_eos=True, temperature=0.0, output_kind=DELTA)
    async with await start_toy_llm(held, parts=mine.parts) as llm:
        try:
            a, b, c = [await llm.add_request(name, [ord(name)] * PROMPT, greedy) for name in "abc"]
            held.allow(4)  # the first may hold a alone; then b gets 3 tokens
            async with b:
                await read(b, 1)
            held.go_on()
            stayed = [len(tokens) for tokens in await asyncio.gather(read(a), read(c))]
            return stayed, llm.stats.num_generation_tokens, llm.stats.kv_cache_usage
        finally:
            held.go_on()
