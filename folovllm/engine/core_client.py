"""Core clients: how the front end reaches the engine core's loop, in a thread or in a process of its own.

Milestone: M8. vLLM counterparts: vllm/v1/engine/core_client.py (`AsyncMPClient`) and vllm/v1/engine/utils.py
(`CoreEngineProcManager`); there zmq sockets connect the two. Several engines: see
data_parallel_client.py. Left out: elastic scaling.

A client must never make the event loop wait, nor the engine, unless the event loop is a thousand steps behind:

    event loop --send()--> queue --writer thread--> pipe --> the loop's inbox, which it empties between two steps
    event loop <--call_soon_threadsafe-- reader thread <-- pipe <-- the loop sends after each step

In thread mode the queue itself is the inbox, and the loop's own thread calls the event loop.
Row 3, but without torch: the front end's process does not import it.
"""

import asyncio
import atexit
import contextlib
import functools
import logging
import multiprocessing
import pickle
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from folovllm.config import EngineConfig
from folovllm.engine.messages import Dead, DownMessage, Heartbeat, Ready, StartFailed, Stop, UpMessage
from folovllm.engine.start_core import ExecutorFactory, QueueInbox, build_core, run_core, run_core_process
from folovllm.parallel import MISSED_HEARTBEATS
from folovllm.utils import cause_of_death

logger = logging.getLogger(__name__)

MAX_UNDELIVERED = 1024  # messages that the event loop has not handled yet; then the engine waits for it
SECONDS_AFTER_KILL = 5.0  # a killed process ends at once, unless the kernel is busy with it


class EngineDeadError(RuntimeError):
    """The engine cannot serve any more. The text is the cause."""


class CoreClient(ABC):
    """One engine core's loop, as the event loop sees it."""

    def __init__(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._first_message: asyncio.Future[UpMessage] = self._event_loop.create_future()
        self._early_messages: list[UpMessage] = []  # after the first one, and before `subscribe`
        self._receive: Callable[[UpMessage], None] = self._early_messages.append
        self._is_closing = False
        self._undelivered = threading.Semaphore(MAX_UNDELIVERED)  # acquired for each message on its way

    @abstractmethod
    def launch(self) -> None:
        """Begins to start the engine. It sends one message when it is ready, or when it cannot be."""

    @abstractmethod
    def send(self, message: DownMessage) -> None:
        """Sends a message without waiting. Nothing happens if the engine is dead. Raises if it cannot be pickled."""

    @abstractmethod
    def close(self, timeout: float = 10.0) -> None:
        """Stops the engine, and waits up to `timeout` seconds for the end of its step. Blocks. Idempotent."""

    @property
    def num_alive(self) -> int:
        """How many engines serve now: of several, those that are not being started again."""
        return 1

    async def ready(self) -> Ready:
        """Waits until the engine is ready. Raises ValueError or EngineDeadError if it cannot be started."""
        message = await self._first_message
        if isinstance(message, Ready):
            return message
        await asyncio.to_thread(self.close, 5.0)  # it is ending by itself
        assert isinstance(message, StartFailed | Dead)
        is_user_error = isinstance(message, StartFailed) and message.is_user_error
        raise ValueError(message.cause) if is_user_error else EngineDeadError(message.cause)

    def subscribe(self, receive: Callable[[UpMessage], None]) -> None:
        """From now on `receive` is called on the event loop with each message."""
        self._receive = receive
        while self._early_messages:
            receive(self._early_messages.pop(0))

    def _deliver(self, message: UpMessage) -> None:
        """Hands a message to the event loop, from any thread.

        If steps come faster than the event loop handles their outputs, this waits, and with it the engine. Otherwise
        the outputs on their way would grow without bound, and every client would be further and further behind.
        """
        while not self._undelivered.acquire(timeout=0.1) and not self._is_closing:
            pass
        with contextlib.suppress(RuntimeError):  # the event loop is closed: there is no one to tell
            self._event_loop.call_soon_threadsafe(self._dispatch, message)

    def _dispatch(self, message: UpMessage) -> None:
        self._undelivered.release()
        self._take(message)

    def _take(self, message: UpMessage) -> None:
        """On the event loop: hands a message to its reader."""
        if not self._first_message.done():
            self._first_message.set_result(message)
        elif not self._is_closing:
            self._receive(message)


class ThreadCoreClient(CoreClient):
    """The loop in a thread of this process: nothing is pickled, but Python code of both sides runs in turns."""

    def __init__(self, config: EngineConfig, model_path: Path, executor_factory: ExecutorFactory | None = None) -> None:
        super().__init__()
        self._inbox = QueueInbox()
        make_core = functools.partial(build_core, config, model_path, executor_factory)
        arguments = (make_core, self._inbox, self._deliver)
        self._thread = threading.Thread(target=run_core, args=arguments, name="folovllm-engine", daemon=True)

    def launch(self) -> None:
        self._thread.start()

    def send(self, message: DownMessage) -> None:
        self._inbox.put(message)

    def close(self, timeout: float = 10.0) -> None:
        self._is_closing = True
        self._inbox.put(Stop())
        if self._thread.ident is not None:
            self._thread.join(timeout)


class ProcessCoreClient(CoreClient):
    """The loop in a process of its own, started afresh ("spawn"), so that it has its own interpreter and GIL."""

    def __init__(self, config: EngineConfig, model_path: Path, executor_factory: ExecutorFactory | None = None) -> None:
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self._connection, self._child_connection = context.Pipe()
        arguments = (self._child_connection, config, model_path, executor_factory)
        self._process = context.Process(target=run_core_process, args=arguments, name="folovllm-engine", daemon=True)
        self._heartbeat_seconds = config.parallel_config.heartbeat_seconds
        self._cause: str | None = None  # why the process was killed here
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="folovllm-writer", daemon=True)
        self._reader = threading.Thread(target=self._read, name="folovllm-reader", daemon=True)

    def launch(self) -> None:
        # At exit multiprocessing waits for its children, so ours must be told before. Last in, first out.
        atexit.register(self.close, timeout=1.0)
        self._process.start()
        self._child_connection.close()  # otherwise the pipe would not end when the child does
        self._writer.start()
        self._reader.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def send(self, message: DownMessage) -> None:
        self._outbox.put(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))

    def close(self, timeout: float = 10.0) -> None:
        self._is_closing = True
        atexit.unregister(self.close)
        if self._process.pid is None:
            return
        self.send(Stop())
        self._outbox.put(None)
        if self._reader.ident is None:  # `launch` was interrupted
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive():
            logger.info("the engine process did not end within %g s: it is killed", timeout)
            self._process.kill()
            self._reader.join(SECONDS_AFTER_KILL)

    def _write(self) -> None:
        """The writer thread: a pipe takes 64 KiB, and then waits for the loop, which may be in the middle of a step."""
        with contextlib.suppress(OSError):  # the engine is dead: the reader says so
            while (data := self._outbox.get()) is not None:
                self._connection.send_bytes(data)

    def _read(self) -> None:
        """The reader thread: takes what the loop sends at once, so that the loop never waits for the event loop.

        At the end it waits for the end of the process, and is the only thread that does. If two threads wait for a
        process, one of them finds it gone without a status, which `multiprocessing` takes for a process that runs.
        """
        try:
            is_ready = False  # a start takes as long as it takes
            while True:
                if is_ready:
                    self._wait_for_message()
                message = self._connection.recv()
                if not isinstance(message, Heartbeat):
                    self._deliver(message)
                    is_ready = True
        except (EOFError, OSError):
            self._process.join()
            self._deliver(Dead(self._cause or cause_of_death(self._process.exitcode)))
        except Exception as error:  # a message that cannot be unpickled
            logger.exception("a message of the engine process cannot be read")
            self._process.kill()
            self._process.join(SECONDS_AFTER_KILL)
            self._deliver(Dead(f"a message of the engine process cannot be read: {error}"))
        finally:
            self._connection.close()

    def _wait_for_message(self) -> None:
        """Waits for a message or the end of the process. Kills a process that has stopped to say that it lives.

        It counts the heartbeats that it misses and not the time: if both processes were stopped, e.g. by Ctrl-Z, one
        is missing when they go on.
        """
        num_missed = 0
        while not self._connection.poll(self._heartbeat_seconds):
            num_missed += 1
            if num_missed == MISSED_HEARTBEATS:
                seconds = MISSED_HEARTBEATS * (self._heartbeat_seconds or 0.0)
                self._cause = f"the engine process gave no sign of life for {seconds:g} s and was killed"
                self._process.kill()
