"""TorchCommunicator: the ranks of a group are processes, and a process group of torch.distributed carries the tensors.

Milestone: M9. vLLM counterparts: DeviceCommunicatorBase and CpuCommunicator (vllm/distributed/device_communicators).
Left out: all-reduce kernels of our own over shared or peer memory.

It calls the methods of the group object and no function of torch.distributed, which would look groups up in a global
table. The group decides how tensors travel (gloo on a CPU, nccl on CUDA) and how long an operation may take: it was
made with a timeout, and an operation that takes longer raises.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from folovllm.distributed.communicator import Communicator

# How many tensors may be on their way at once. A pipeline of n stages has at most n batches in flight, of two tensors
# each. So in a pipeline of up to 32 stages, the oldest send has ended by the time that it is waited for.
MAX_ON_THEIR_WAY = 64
_TAG = 0


class TorchCommunicator(Communicator):
    """This process's end of `group`, a torch.distributed.ProcessGroup. Its tensors are on `device`."""

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group.rank(), group.size())
        self._group, self._device = group, device
        self._on_their_way: deque[tuple[Any, torch.Tensor]] = deque()  # a tensor must live until it is sent

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.counts.add("all_reduce", tensor)
        tensor = tensor.contiguous()
        self._group.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        self.counts.add("all_gather", tensor)
        tensor = tensor.contiguous()
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([gathered], [tensor]).wait()
        return torch.cat(gathered, dim=dim)

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        """Begins to send. If it waited for the end, the stage would stand still until the next stage asks for it."""
        self.counts.add("send", tensor)
        tensor = tensor.contiguous()
        self._on_their_way.append((self._group.send([tensor], destination, _TAG), tensor))
        if len(self._on_their_way) > MAX_ON_THEIR_WAY:
            self._on_their_way.popleft()[0].wait()

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> torch.Tensor:
        tensor = torch.empty(*shape, dtype=dtype, device=self._device)
        self._group.recv([tensor], source, _TAG).wait()
        self.counts.add("receive", tensor)
        return tensor
