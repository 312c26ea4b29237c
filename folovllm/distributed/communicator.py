"""Communicator: what the ranks of one group say to each other, and SingleRank, a group of one.

Milestone: M9. vLLM counterparts: GroupCoordinator (vllm/distributed/parallel_state.py) and
vllm/distributed/communication_op.py. Left out: custom all-reduce kernels, reduce-scatter, several nodes' topology.

A layer holds the communicator of its group, so there is no global state, and with one rank every call is the identity:
that null object is the off-switch of tensor parallelism.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from folovllm.parallel import WHOLE_MODEL, ModelShard


@dataclass
class CommunicationCounts:
    """Calls and bytes of one rank since the start, by operation.

    A call counts before it waits for another rank, with the size of the tensor that it hands over. A receive counts
    when it has got one.
    """

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str, tensor: torch.Tensor) -> None:
        self.calls[operation] = self.calls.get(operation, 0) + 1
        self.bytes[operation] = self.bytes.get(operation, 0) + tensor.numel() * tensor.element_size()


class Communicator(ABC):
    """One rank's end of a group. All ranks of the group make the same calls in the same order."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.counts = CommunicationCounts()

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of all ranks' tensors, the same bits on every rank. May overwrite `tensor`."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Returns the ranks' tensors, which have one shape, joined along `dim` in the order of the ranks."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, destination: int) -> None:
        """Hands `tensor` to rank `destination` of the group. It may return before that rank has it."""

    @abstractmethod
    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> torch.Tensor:
        """Waits for a tensor of this shape from rank `source` of the group."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Leaves the group."""


class SingleRank(Communicator):
    """A group of one: nothing is said, and nothing counted."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=1)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return tensor

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        raise AssertionError("a group of one has no neighbour")

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> torch.Tensor:
        raise AssertionError("a group of one has no neighbour")


SINGLE_RANK = SingleRank()


@dataclass(frozen=True)
class ParallelGroups:
    """One rank's place in the model and its two groups: the parts of its stage, and the stages of its part."""

    shard: ModelShard = WHOLE_MODEL
    tp: Communicator = SINGLE_RANK
    pp: Communicator = SINGLE_RANK


ONE_RANK = ParallelGroups()
