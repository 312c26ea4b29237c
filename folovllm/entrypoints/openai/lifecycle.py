"""The life of a server process: the socket, the engine, the routes, then one of three ends.

Milestone: M8. vLLM counterpart: vllm/entrypoints/launcher.py (serve_http) and run_server in api_server.py. Ours
differs: vLLM closes open streams at SIGTERM, here they run on until --shutdown-timeout.

    bind -> start the engine, and import the web framework meanwhile -> listen -> serve until
        a signal            no new requests (503), open answers run on or are cut off with "abort"; exit status 0
        a second signal     at once; exit status 128 + its number
        the engine's death  /health says why for two seconds; exit status 1

The port is bound before the model is loaded, so that a port in use is told at once, and listens when the engine is
ready: before that, a connection is refused.
"""

import asyncio
import contextlib
import gc
import importlib
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from folovllm.config import EngineConfig
from folovllm.engine.async_llm import AsyncLLM, EngineDeadError, EngineObserver
from folovllm.engine.chat.template import compile_template
from folovllm.entrypoints.commands.serve_options import ServeCommand
from folovllm.entrypoints.openai.listen import bind
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.start import find_model_files, start_async_llm

if TYPE_CHECKING:
    from folovllm.entrypoints.openai.state import ServerState

logger = logging.getLogger(__name__)
T = TypeVar("T")

EXIT_ENGINE_DIED = 1
EXIT_SIGNAL = 128  # plus the signal's number, as in a shell
SECONDS_OF_A_STEP = 10.0  # the engine ends the step that it computes, and its process is killed after this long
SECONDS_AT_ONCE = 0.5
SECONDS_WITH_CAUSE = 2.0  # how long /health tells why the engine died


def serve(command: ServeCommand) -> int:
    """Runs a server until it ends, and returns the exit status. Raises ValueError for what the user can mend."""
    log_to_stderr(command.options)
    template = read_template(command.options.chat_template)
    config = EngineConfig.from_args(preset=command.preset, without=command.without, **command.engine_args)
    with bind(command.options) as listener:
        find_model_files(config)  # before the event loop runs: there a Ctrl-C would wait for the end of a download
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(command, template, listener))


async def _serve(command: ServeCommand, chat_template: str | None, listener: socket.socket) -> int:
    signals = Signals()
    signals.listen()
    try:
        engine = await _unless(signals.first, _start_engine(command))
    except EngineDeadError as error:
        logger.error("the engine could not be started: %s", error)
        return EXIT_ENGINE_DIED
    if engine is None:
        logger.info("stopped before the engine was ready")
        return EXIT_SIGNAL + signals.number
    try:
        from folovllm.entrypoints.openai.start_block import start_block
        from folovllm.entrypoints.openai.state import make_state

        state = make_state(engine, command.options, chat_template)
        gc.collect()
        gc.freeze()  # what has been made so far stays: no collection looks at it again
        return await run_until_end(state, listener, signals, lambda: print(start_block(state, listener), flush=True))
    finally:
        await engine.shutdown(timeout=SECONDS_AT_ONCE if signals.second.is_set() else SECONDS_OF_A_STEP)


async def _start_engine(command: ServeCommand) -> AsyncLLM:
    """Starts the engine's process first, because loading the model takes longest."""
    starting = asyncio.create_task(
        start_async_llm(
            preset=command.preset,
            without=command.without,
            in_process=not command.options.disable_frontend_multiprocessing,
            **command.engine_args,
        )
    )
    try:
        await asyncio.sleep(0)  # the task runs until it waits for the engine
        await asyncio.to_thread(importlib.import_module, "folovllm.entrypoints.openai.app")
        return await starting
    finally:
        starting.cancel()


async def run_until_end(
    state: "ServerState", listener: socket.socket, signals: "Signals", on_ready: Callable[[], None]
) -> int:
    """Serves `state` on `listener` until a signal or the engine's death. Returns the exit status."""
    from folovllm.entrypoints.openai.http_server import HttpServer

    server = HttpServer(state, on_ready)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    death = DeathWatch(state.engine)
    try:
        await _first(serving, signals.first.wait(), death.happened.wait())
        if signals.first.is_set() and not death.happened.is_set():
            await _first(_drain(state), signals.second.wait(), death.happened.wait())
        if death.happened.is_set():
            logger.error("the engine has stopped: %s", death.cause)
            await _first(asyncio.sleep(SECONDS_WITH_CAUSE), signals.second.wait())
        server.should_exit = True
        await _first(serving, signals.second.wait())
    finally:
        server.should_exit = server.force_exit = True
        await serving
    if death.happened.is_set():
        return EXIT_ENGINE_DIED
    return EXIT_SIGNAL + signals.number if signals.second.is_set() else 0


async def _drain(state: "ServerState") -> None:
    """Lets the open answers run on until they or the time are over."""
    state.is_draining = True
    count, timeout = state.engine.num_unfinished, state.options.shutdown_timeout
    logger.info("shutting down, %d unfinished, up to %g s; a second signal ends at once", count, timeout)
    aborted = await state.engine.drain(timeout)
    if aborted:
        logger.warning("%d requests were cut off after %g s", aborted, timeout)


class Signals:
    """SIGINT and SIGTERM, as two events."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self.number = 0

    def listen(self) -> None:
        """From here on the event loop handles both signals. It must run in the main thread."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.receive, number)

    def receive(self, number: int) -> None:
        self.number = int(number)
        (self.second if self.first.is_set() else self.first).set()


class DeathWatch(EngineObserver):
    """Observes the engine: `happened` is set when it has died, and `cause` tells why."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.happened, self.cause = asyncio.Event(), ""
        engine.add_observer(self)
        if engine.dead_error is not None:
            self.on_dead(str(engine.dead_error))

    def on_dead(self, cause: str) -> None:
        self.cause = cause
        self.happened.set()


async def _first(*awaitables: Awaitable[Any]) -> None:
    """Waits for the first of `awaitables` and cancels the others, but no task that was there before."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task, awaitable in zip(tasks, awaitables, strict=True):
            if task is not awaitable:
                task.cancel()


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if `event` is set before: `work` is then cancelled."""
    task = asyncio.create_task(work)
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return None
    finally:
        waiter.cancel()


# ---- before the engine starts


def read_template(given: str | None) -> str | None:
    """The text of --chat-template: a file's, or `given` itself if it is jinja. ValueError if it cannot be compiled."""
    if given is None:
        return None
    text = given
    if not any(character in given for character in "{}\n"):
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ValueError(f"--chat-template {given}: {why}; give a file, or the text of a jinja template") from None
    try:
        compile_template(text)
    except ValueError as error:
        raise ValueError(
            f"--chat-template: {str(error).removeprefix('the chat template refuses these messages: ')}"
        ) from None
    return text


def log_to_stderr(options: ServerOptions) -> None:
    """One form for all lines of the log: those of FoloVLLM, of the requests, and of uvicorn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%m-%d %H:%M:%S"))
    uvicorn_level = 5 if options.uvicorn_log_level == "trace" else options.uvicorn_log_level.upper()
    for name, level in (("folovllm", "INFO"), ("uvicorn", uvicorn_level)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, which is faster, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
