"""ThreadCommunicator: the ranks of a group are threads of one process, and their tensors lie in one shared list.

Milestone: M9. vLLM counterpart: none. It is for tests and for learners: the ranks run the very layers that processes
run, they start in no time, and a debugger sees them all.

An all-reduce of two ranks:

    rank 0    puts its tensor into the list | meets rank 1 | adds both | meets rank 1
    rank 1    puts its tensor into the list | meets rank 0 | adds both | meets rank 0

After the first meeting the list is complete. After the second one every rank has read it, and the owners may change
their tensors. No rank waits longer than the deadline of the group.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from folovllm.distributed.communicator import SINGLE_RANK, Communicator, ParallelGroups
from folovllm.parallel import ParallelConfig

DEADLINE = 60.0  # seconds that a rank waits for the others

T = TypeVar("T")
# By (source, destination). None says that the group was aborted.
Mail = dict[tuple[int, int], "queue.SimpleQueue[torch.Tensor | None]"]


class ThreadGroup:
    """What the ranks of one group share."""

    def __init__(self, size: int, deadline: float = DEADLINE) -> None:
        self.size, self.deadline = size, deadline
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size  # what each rank gives to the operation under way
        self.mail = _empty_mail(size)
        self._barrier = threading.Barrier(size)

    def communicator(self, rank: int) -> Communicator:
        """The end of `rank`."""
        return SINGLE_RANK if self.size == 1 else ThreadCommunicator(self, rank)

    def meet(self, rank: int) -> None:
        """Waits until all ranks are here. Raises TimeoutError if one does not come, and from then on at once."""
        try:
            self._barrier.wait(self.deadline)
        except threading.BrokenBarrierError:
            raise TimeoutError(
                f"rank {rank} of {self.size} waited for the others in vain: one of them has failed, or makes other "
                f"calls (deadline {self.deadline:g} s)"
            ) from None

    def abort(self) -> None:
        """Lets every rank that waits, or that will wait, raise at once, until `renew`."""
        self._barrier.abort()
        for mail in self.mail.values():
            mail.put(None)

    def renew(self) -> None:
        """Forgets the operations under way, of which no rank may be in the middle."""
        self._barrier.reset()
        self.mail = _empty_mail(self.size)


def _empty_mail(size: int) -> Mail:
    return {(source, destination): queue.SimpleQueue() for source in range(size) for destination in range(size)}


class ThreadCommunicator(Communicator):
    """One thread's end of a ThreadGroup."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        super().__init__(rank, group.size)
        self.group = group

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.counts.add("all_reduce", tensor)
        return self._with_all(tensor, _sum)

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        self.counts.add("all_gather", tensor)
        return self._with_all(tensor, lambda tensors: torch.cat(tensors, dim=dim))

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        self.counts.add("send", tensor)
        self.group.mail[self.rank, destination].put(tensor.clone())  # the sender may change its own

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> torch.Tensor:
        try:
            tensor = self.group.mail[source, self.rank].get(timeout=self.group.deadline)
        except queue.Empty:
            tensor = None
        if tensor is None:
            raise TimeoutError(
                f"rank {self.rank} of {self.size} waited for a tensor from rank {source} in vain: it has failed, or "
                f"sends none (deadline {self.group.deadline:g} s)"
            )
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(shape), dtype), "the ranks are not in the same step"
        self.counts.add("receive", tensor)
        return tensor

    def _with_all(self, tensor: torch.Tensor, compute: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
        group = self.group
        group.tensors[self.rank] = tensor
        group.meet(self.rank)
        result = compute(group.tensors)
        group.meet(self.rank)
        return result


def _sum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """In the order of the ranks, whichever rank computes it, so that all ranks get the same bits."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def thread_groups(config: ParallelConfig, deadline: float = DEADLINE) -> list[ParallelGroups]:
    """The place of every rank of `config`, with groups among threads. Each result is for one thread."""
    tp_size, pp_size = config.tensor_parallel_size, config.pipeline_parallel_size
    stages = [ThreadGroup(tp_size, deadline) for _ in range(pp_size)]
    parts = [ThreadGroup(pp_size, deadline) for _ in range(tp_size)]
    shards = [config.shard(rank) for rank in range(config.world_size)]
    return [
        ParallelGroups(s, stages[s.pp_rank].communicator(s.tp_rank), parts[s.tp_rank].communicator(s.pp_rank))
        for s in shards
    ]


def run_ranks(size: int, work: Callable[[Communicator], T], deadline: float = DEADLINE) -> list[T]:
    """Calls work(communicator) in a thread for each rank of a new group, and returns the results by rank.

    If a rank raises, the others stop waiting for it, and the first exception goes to the caller.
    """
    group = ThreadGroup(size, deadline)
    failures: list[BaseException] = []

    def run(rank: int) -> T:
        try:
            return work(group.communicator(rank))
        except BaseException as error:
            failures.append(error)
            group.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run, rank) for rank in range(size)]
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
