"""RankProcesses: the processes of one model, as their parent sees them. It starts, hears, watches and ends them.

Milestone: M9. vLLM counterparts: WorkerProc.make_worker_process and the worker monitor
(vllm/v1/executor/multiproc_executor.py).

    parent --ring--> all ranks            a message is written once
    parent <--socket-- each rank          its answers; the end of the socket is the end of the process
    parent <--pipe-- each rank            what it prints, which appears on the parent's stderr

One thread, the listener, reads sockets and pipes. So the end of a rank is noticed at once, also while nothing is
computed. The listener then kills the other ranks, and from then on each call raises ExecutorDeadError.
"""

import contextlib
import logging
import os
import pickle
import queue
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from folovllm.config import EngineConfig
from folovllm.distributed.shm_ring import RingEnd, RingWriter
from folovllm.executor.base import ExecutorDeadError
from folovllm.executor.rank_messages import Answer, DownMessage, StartRank
from folovllm.utils import cause_of_death

END_SECONDS = 5.0  # for the end of a process that has closed its socket, or was killed
SHUT_DOWN = "the engine has been shut down"


class RankProcess:
    """One rank: its process, its socket, and the last line that it printed."""

    def __init__(self, rank: int, ring: RingEnd, threads: int) -> None:
        self.rank, self.last_line = rank, ""
        self._line = b""  # that has not ended yet
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        with theirs:
            # A process group of its own: Ctrl-C in the terminal does not reach it, and it ends with what it started.
            # -P: a file in the current folder must not take the place of a module.
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", "folovllm.worker.worker_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), ring.memory, ring.doorbell),
                process_group=0,
                env=_environment(threads),
            )
        assert self._process.stdout is not None
        self.output = self._process.stdout

    @property
    def process_id(self) -> int:
        return self._process.pid

    def read_output(self) -> bool:
        """Shows what the rank has printed. Returns False at the end."""
        data = os.read(self.output.fileno(), 2**16)
        *lines, self._line = (self._line + data).split(b"\n") if data else (self._line, b"")
        for line in lines:
            self._show(line.decode(errors="replace").rstrip())
        return bool(data)

    def _show(self, line: str) -> None:
        if line:
            self.last_line = line
            with contextlib.suppress(Exception):  # the parent's stderr may be closed
                print(f"(rank {self.rank}) {line}", file=sys.stderr)

    def how_it_ended(self) -> str:
        """Waits for the end of the process, which must be near. Returns a sentence about it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        self.drain()
        last = f"; the last line that it printed: {self.last_line}" if self.last_line else ""
        return cause_of_death(self._process.returncode, f"rank {self.rank} (process {self.process_id})") + last

    def drain(self) -> None:
        """Shows the rest of what the rank has printed, and waits for no more: others may hold the pipe open."""
        os.set_blocking(self.output.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while self.read_output():
                pass

    def kill(self) -> None:
        """Kills the process and what it has started, and waits for its end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process_id, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)

    def close(self) -> None:
        self.connection.close()
        self.output.close()


def fill_standard_descriptors() -> None:
    """If this process runs without stdin, stdout or stderr ("<&-"), opens the null device in their place.

    Otherwise the ring or a socket would get such a number, and a rank, which has all three, would not inherit it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _environment(threads: int) -> dict[str, str]:
    """The rank finds the modules that this process finds, and OpenMP starts no more threads than the rank uses."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


class RankProcesses:
    """All ranks of a resolved config. `worker_factory` ("module:function") makes the worker in each process."""

    def __init__(self, config: EngineConfig, model_path: Path, threads: int, worker_factory: str) -> None:
        self._cause: str | None = None  # why no call can be made any more
        self._parent_id = os.getpid()
        self._processes: list[RankProcess] = []
        self._arrived: queue.SimpleQueue[tuple[int, Answer] | None] = queue.SimpleQueue()  # None: see _cause
        self._listener = threading.Thread(target=self._listen, name="folovllm-ranks", daemon=True)
        self._resources = contextlib.ExitStack()  # what `close` frees
        fill_standard_descriptors()
        try:
            self._ring = self._open_ring(config.parallel_config.world_size)
            self._folder = self._open_folder()
            for rank in range(config.parallel_config.world_size):
                process = RankProcess(rank, self._ring.end(rank), threads)
                self._processes.append(process)
                self._resources.callback(process.close)
            self._listener.start()
            for process in self._processes:
                self._send_start(process, config, model_path, threads, worker_factory)
            self._ring.close_ends()
        except BaseException:
            self.close()
            raise

    def _open_ring(self, num_ranks: int) -> RingWriter:
        ring = RingWriter(num_ranks)
        self._resources.callback(ring.close)
        return ring

    def _open_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="folovllm-"))
        self._resources.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _send_start(
        self, process: RankProcess, config: EngineConfig, model_path: Path, threads: int, worker_factory: str
    ) -> None:
        level = logging.getLogger("folovllm").getEffectiveLevel()
        start = StartRank(
            rank=process.rank,
            config=config,
            model_path=model_path,
            folder=self._folder,
            ring=self._ring.end(process.rank),
            threads=threads,
            log_level=level if process.rank == 0 else max(level, logging.WARNING),
            parent_id=self._parent_id,
            worker_factory=worker_factory,
        )
        with contextlib.suppress(ConnectionError):  # the rank has died: the listener says so
            process.connection.send(start)

    @property
    def process_ids(self) -> list[int]:
        return [process.process_id for process in self._processes]

    def check(self) -> None:
        """Raises ExecutorDeadError, with the cause, if no call can be made any more."""
        if self._cause is not None:
            raise ExecutorDeadError(self._cause)

    def all_have_met(self) -> None:
        """The ranks are connected and need no rendezvous: from here on nothing of them is on the disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- messages

    def send(self, message: DownMessage, timeout: float) -> None:
        """Writes a message for all ranks, which must make room for it in `timeout` seconds."""
        self.check()
        try:
            self._ring.send(pickle.dumps(message, pickle.HIGHEST_PROTOCOL), timeout, while_waiting=self.check)
        except TimeoutError as error:
            self.die(f"the ranks have taken no message for {timeout:g} s: {error}")
            self.check()

    def receive(self, deadline: float, too_late: str) -> tuple[int, Answer]:
        """Returns the next answer, and the rank that sent it. At `deadline` the ranks are killed: see `die`."""
        if self._arrived.empty():
            self.check()
        arrived: tuple[int, Answer] | None = None
        try:
            arrived = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self.die(too_late)
        if arrived is None:
            self.check()
        assert arrived is not None, "the queue was woken without a cause"
        return arrived

    # ---- the listener

    def _listen(self) -> None:
        """Reads until all ranks have ended. What else may hold a pipe open is not waited for."""
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                selector.register(process.output, selectors.EVENT_READ, process)
                selector.register(process.connection, selectors.EVENT_READ, process)
            num_alive = len(self._processes)
            while num_alive:
                for key, _ in selector.select():
                    process = key.data
                    if key.fileobj is process.output:
                        is_open = process.read_output()
                    else:
                        is_open = self._hear(process)
                        num_alive -= not is_open
                    if not is_open:
                        selector.unregister(key.fileobj)

    def _hear(self, process: RankProcess) -> bool:
        """Takes one answer. Returns False at the end of the rank, which is the end of all."""
        try:
            self._arrived.put((process.rank, process.connection.recv()))
            return True
        except (EOFError, OSError):
            cause = SHUT_DOWN if self._cause is not None else process.how_it_ended()
        except Exception as error:  # the answer cannot be unpickled
            cause = f"an answer of rank {process.rank} cannot be read: {error}"
        self.die(cause)
        process.drain()
        return False

    # ---- the end

    def die(self, cause: str) -> None:
        """Kills all ranks. Every call that waits or comes later raises ExecutorDeadError with the first cause."""
        if self._cause is None:
            self._cause = cause
        for process in self._processes:
            process.kill()
        self._arrived.put(None)

    def close(self) -> None:
        """Ends all processes, and frees what they shared. Idempotent. A forked child has nothing to close."""
        if os.getpid() != self._parent_id:
            return
        self.die(SHUT_DOWN)
        if self._listener.ident is not None:
            self._listener.join(END_SECONDS)
        self._resources.close()
