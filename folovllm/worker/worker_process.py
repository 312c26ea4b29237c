"""The main program of a rank's process: it makes the rank's worker, and then does what the messages say.

Milestone: M9. vLLM counterpart: WorkerProc (vllm/v1/executor/multiproc_executor.py).

    python -m folovllm.worker.worker_process DESCRIPTOR       (MultiprocExecutor starts it; nothing else should)

`import torch` comes late: a process whose parent dies while it starts must notice it at once.
"""

import importlib
import logging
import os
import pickle
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from folovllm.distributed.shm_ring import RingReader
from folovllm.executor.rank_messages import Answer, Ask, Done, DownMessage, Failed, StartRank, Step
from folovllm.parts import load_part
from folovllm.worker.rank_steps import RankSteps

PARENT_SECONDS = 1.0  # between two looks whether the parent lives


def make_worker(start: StartRank) -> Any:
    """The real worker. Ranks find each other through a file in `start.folder`."""
    import torch
    import torch.distributed as dist

    from folovllm.worker.rank_worker import RankWorker

    torch.set_num_threads(start.threads)
    store = dist.FileStore(str(start.folder / "store"), start.config.parallel_config.world_size)
    return RankWorker(start.config, start.model_path, start.rank, store)


class RankLoop:
    """Answers the messages of the ring. `answers` says that this is the rank that answers the steps."""

    def __init__(self, worker: Any, ring: RingReader, send: Callable[[Answer], None], rank: int, answers: bool) -> None:
        self._worker, self._ring, self._send = worker, ring, send
        self._rank, self._answers_steps = rank, answers
        self._steps = RankSteps(worker)

    def run(self) -> None:
        """Raises EOFError when the parent has gone."""
        while True:
            message = pickle.loads(self._ring.receive())
            try:
                value = self._do(message)
            except Exception as error:
                self._send(Failed(message.number, portable(error, self._rank)))
                continue
            if self._answers_steps or isinstance(message, Ask):
                self._send(Done(message.number, value))

    def _do(self, message: DownMessage) -> Any:
        if isinstance(message, Step):
            return self._steps.step(message.scheduler_output)
        if message.name == "calls":
            return self._steps.calls()
        return getattr(self._worker, message.name)(*message.args)


def run_rank(connection: Connection, start: StartRank) -> None:
    """Serves until the parent has gone (EOFError). If the worker cannot be made, it says why and returns."""
    module, _, function = start.worker_factory.partition(":")
    try:
        for name in start.config.parts or {}:
            load_part(name, start.config.parts)  # a class of a learner's file must be loaded before one is unpickled
        worker = getattr(importlib.import_module(module), function)(start)
    except Exception as error:
        connection.send(Failed(0, portable(error, start.rank)))
        return
    connection.send(Done(0))
    answers = start.rank == start.config.parallel_config.answering_rank
    RankLoop(worker, RingReader(start.ring), connection.send, start.rank, answers).run()


def portable(error: Exception, rank: int) -> Exception:
    """`error` if the parent can unpickle it, and otherwise a RuntimeError with its type and text. The traceback of this
    process becomes a note of it.
    """
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in rank {rank}:\n{''.join(traceback.format_exception(error))}")
    return copy


def die_with_parent(descriptor: int, start: StartRank) -> None:
    """Ends this process, whatever it does, when the parent's end of the socket closes or the parent is another one."""
    poll = select.poll()
    poll.register(descriptor, 0)  # 0: only the hang-up, which is always reported
    while os.getppid() == start.parent_id:
        if poll.poll(PARENT_SECONDS * 1000):
            break
    shutil.rmtree(start.folder, ignore_errors=True)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)  # with the compilers that it has started
    os._exit(1)


def main(descriptor: int) -> None:
    """Signals to stop are the front end's affair, as for the engine's process: see `run_core_process`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection, status = Connection(descriptor), 1
    try:
        start: StartRank = connection.recv()
        threading.Thread(target=die_with_parent, args=(descriptor, start), daemon=True).start()
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("folovllm").setLevel(start.log_level)
        run_rank(connection, start)
        status = 0
    except (EOFError, ConnectionError):
        pass  # the parent has gone
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # at once: threads of the groups may still wait for ranks that have gone


if __name__ == "__main__":
    main(int(sys.argv[1]))
