"""Sends the requests at their times and stamps what comes back. It looks into nothing before the run is over.

Milestone: M8. vLLM counterpart: vllm/benchmarks/lib/endpoint_request_func.py. Client and server share the machine's
cores: whatever the client computes while the server works makes the server look slower. So the bodies are written
before the run, the chunks are parsed after it (answers.py), and in between there is a time stamp per chunk.

The load is an open loop: a request is sent when it is due, whether or not the server has answered the ones before.
A client that waits for answers would send less to a slow server, and would never see the queue that real users make.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import aiohttp

LAG_TICK = 0.02  # seconds between two looks at how late the client's event loop is


@dataclass
class Exchange:
    """What the client saw of one request, in seconds since the start of the run.

    `due`: when it should be sent. `ready`: when the client got to it; the difference is the client's own lag. `sent`:
    when it went out, which is later than `ready` only if --max-concurrency held it back.
    """

    due: float
    ready: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    status: int | None = None  # of HTTP; None without an answer
    error: str | None = None  # what ended the connection
    chunks: list[tuple[float, bytes]] = field(default_factory=list)  # as they came, with the moment of each


@dataclass(frozen=True)
class LoadRun:
    """One run: an exchange per request, and what the client itself needed meanwhile."""

    exchanges: list[Exchange]
    seconds: float  # from the start to the end of the last answer
    cpu_seconds: float  # of this process
    loop_lags: list[float]  # how late the event loop woke up, every LAG_TICK


@dataclass(frozen=True)
class Target:
    """Where the requests go."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)
    timeout: float = 600.0  # seconds for one whole answer


async def run_load(
    target: Target,
    bodies: Sequence[bytes],
    due: Sequence[float],
    max_concurrency: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> LoadRun:
    """Send each of `bodies` at its second `due`, and wait for all answers. No failure of a request raises."""
    exchanges = [Exchange(moment) for moment in due]
    places = asyncio.Semaphore(max_concurrency or len(exchanges) or 1)
    timeout = aiohttp.ClientTimeout(total=target.timeout)
    headers = {"Content-Type": "application/json", **target.headers}
    # A limit of connections would hold requests back unseen. And each request has a connection of its own: a server
    # closes idle ones after a few seconds, and a request on one that it is just closing is lost.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        start, cpu_start, lags = time.perf_counter(), time.process_time(), [0.0]
        watch = asyncio.create_task(_watch_loop(lags))

        async def exchange(seen: Exchange, body: bytes) -> None:
            seen.ready = time.perf_counter() - start
            async with places:
                seen.sent = time.perf_counter() - start
                await _exchange(session, target.url, body, seen, start)
            seen.ended = time.perf_counter() - start
            on_done()

        tasks = []
        for seen, body in zip(exchanges, bodies, strict=True):
            if (wait := start + seen.due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(exchange(seen, body)))
        await asyncio.gather(*tasks)
        watch.cancel()
        return LoadRun(exchanges, time.perf_counter() - start, time.process_time() - cpu_start, lags)


async def _exchange(session: aiohttp.ClientSession, url: str, body: bytes, seen: Exchange, start: float) -> None:
    """One request and its answer. What goes wrong is written down: a failed request is a result, too."""
    try:
        async with session.post(url, data=body) as response:
            seen.status = response.status
            while chunk := await response.content.readany():
                seen.chunks.append((time.perf_counter() - start, chunk))
    except TimeoutError:
        seen.error = f"no complete answer within {session.timeout.total:g} s (--timeout)"
    except (aiohttp.ClientError, OSError) as error:
        seen.error = f"{type(error).__name__}: {error}"


async def _watch_loop(lags: list[float]) -> None:
    """How late the event loop wakes up is how late it stamps a chunk."""
    while True:
        planned = time.perf_counter() + LAG_TICK
        await asyncio.sleep(LAG_TICK)
        lags.append(max(time.perf_counter() - planned, 0.0))
