"""ThreadRanksExecutor: the ranks are threads of this process, so that every layout runs in milliseconds."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.communicator import ParallelGroups
from folovllm.distributed.thread_communicator import ThreadCommunicator, ThreadGroup, thread_groups
from folovllm.executor.base import Executor
from folovllm.outputs import ModelRunnerOutput
from folovllm.worker.worker import Worker

DEADLINE = 60.0  # seconds

Inbox = queue.SimpleQueue[Callable[[], None] | None]
Handle = list[Future[ModelRunnerOutput]]  # by rank


class ThreadRanksExecutor(Executor):
    """One worker per rank. A step goes to all of them at once, and part 0 of the last stage answers.

    If a rank raises, the others stop waiting for it. When all steps that were under way have ended, the groups begin
    anew, and the engine lives on. Processes cannot promise that.
    """

    def __init__(self, config: EngineConfig, folder: Path) -> None:
        parallel = config.parallel_config
        self.groups = thread_groups(parallel, DEADLINE)
        # One after the other: while a model is built, torch's default dtype is the model's, for all threads.
        self.workers = [Worker(config, folder, groups) for groups in self.groups]
        self.answering = parallel.world_size - parallel.tensor_parallel_size
        self.under_way: list[Handle] = []
        self.inboxes: list[Inbox] = [queue.SimpleQueue() for _ in self.workers]
        for rank, inbox in enumerate(self.inboxes):
            threading.Thread(target=_serve, args=(inbox,), name=f"rank {rank}", daemon=True).start()
        weakref.finalize(self, _stop, self.inboxes)  # the threads hold no executor, so one that is dropped ends them

    def available_kv_cache_bytes(self) -> int:
        return min(worker.available_kv_cache_bytes() for worker in self.workers)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        for worker in self.workers:
            worker.initialize_kv_cache(kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> Handle:
        handle: Handle = [Future() for _ in self.workers]
        self.under_way.append(handle)
        for inbox, worker, future in zip(self.inboxes, self.workers, handle, strict=True):
            inbox.put(_step(worker, scheduler_output, future))
        return handle

    def sample(self, handle: Handle) -> ModelRunnerOutput:
        """The answer of part 0. The other parts of its stage must have sampled the same."""
        parts = handle[self.answering :]
        _, late = wait(parts, timeout=2 * DEADLINE)
        assert not late, "a rank that answers does not come back"
        if all(part.exception() is None for part in parts):
            self.under_way.remove(handle)
            answers = [part.result() for part in parts]
            assert all(answer == answers[0] for answer in answers), "the ranks do not agree"
            return answers[0]
        self.discard(handle)
        errors = [error for future in handle if (error := future.exception()) is not None]
        raise next((error for error in errors if not isinstance(error, TimeoutError)), errors[0])

    def discard(self, handle: Handle) -> None:
        if handle not in self.under_way:
            return
        _, late = wait(handle, timeout=2 * DEADLINE)
        assert not late, "a rank does not come back"
        self.under_way.remove(handle)
        if not self.under_way:
            for groups in self.groups:
                for group in _groups_of(groups):
                    group.renew()

    def describe(self) -> dict[str, Any]:
        return {"ranks": len(self.workers)}

    def shutdown(self) -> None:
        _stop(self.inboxes)


def _step(worker: Worker, output: SchedulerOutput, future: Future[ModelRunnerOutput]) -> Callable[[], None]:
    def run() -> None:
        try:
            answer = worker.sample(worker.execute(output))
        except BaseException as error:
            for group in _groups_of(worker.groups):
                group.abort()
            future.set_exception(error)
        else:
            future.set_result(answer)

    return run


def _groups_of(groups: ParallelGroups) -> list[ThreadGroup]:
    return [end.group for end in (groups.tp, groups.pp) if isinstance(end, ThreadCommunicator)]


def _serve(inbox: Inbox) -> None:
    while (work := inbox.get()) is not None:
        work()
        del work  # it holds a worker


def _stop(inboxes: list[Inbox]) -> None:
    for inbox in inboxes:
        inbox.put(None)
