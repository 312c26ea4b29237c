"""make_process_groups: connects the processes of a model, each with the parts of its stage and the stages of its part.

Milestone: M9. vLLM counterparts: initialize_model_parallel (vllm/distributed/parallel_state.py) and
stateless_init_torch_distributed_process_group (vllm/distributed/utils.py).
Left out: torch's global table of groups (`init_process_group`). A layer holds its communicator, so nothing looks it up.

E.g. tensor_parallel_size 2 and pipeline_parallel_size 2 make four groups, and each rank is in two of them:

    rank 0 -- tp/0 -- rank 1       tp/0, tp/1: all-reduces of a stage
      |                 |
     pp/0              pp/1        pp/0, pp/1: from one stage to the next
      |                 |
    rank 2 -- tp/1 -- rank 3
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from folovllm.distributed.communicator import SINGLE_RANK, Communicator, ParallelGroups
from folovllm.distributed.torch_communicator import TorchCommunicator
from folovllm.parallel import ParallelConfig

LOOPBACK = "127.0.0.1"
COMMUNICATION_SECONDS = 300.0  # the deadline of one operation: as long as another rank may compute before it


def make_process_groups(
    parallel: ParallelConfig,
    rank: int,
    device: torch.device,
    store: dist.Store,
    host: str = LOOPBACK,
    timeout: float = COMMUNICATION_SECONDS,
) -> ParallelGroups:
    """The groups of `rank`. All ranks call it with the same `store`, and each waits for the ranks of its groups.

    `host` is the address under which the others reach this process (gloo). Each operation ends after `timeout` seconds.
    """
    shard = parallel.shard(rank)
    deadline = timedelta(seconds=timeout)

    def connect(name: str, group_rank: int, size: int) -> Communicator:
        if size == 1:
            return SINGLE_RANK
        group = _group(dist.PrefixStore(name, store), group_rank, size, device, host, deadline)
        return TorchCommunicator(group, device)

    return ParallelGroups(
        shard,
        tp=connect(f"tp/{shard.pp_rank}", shard.tp_rank, shard.tp_size),
        pp=connect(f"pp/{shard.tp_rank}", shard.pp_rank, shard.pp_size),
    )


def _group(
    store: dist.Store, rank: int, size: int, device: torch.device, host: str, deadline: timedelta
) -> dist.ProcessGroup:
    group = dist.ProcessGroup(store, rank, size)
    if device.type == "cuda":
        kind, backend = dist.ProcessGroup.BackendType.NCCL, _nccl(store, rank, size, deadline)
    else:
        kind, backend = dist.ProcessGroup.BackendType.GLOO, _gloo(store, rank, size, host, deadline)
    group._set_default_backend(kind)
    group._register_backend(device, kind, backend)
    return group


def _nccl(store: dist.Store, rank: int, size: int, deadline: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = deadline
    return dist.ProcessGroupNCCL(store, rank, size, options)


def _gloo(store: dist.Store, rank: int, size: int, host: str, deadline: timedelta) -> Any:
    """Gloo on the given address. By itself it asks for the address of this machine's name, which may have none."""
    gloo: Any = dist.ProcessGroupGloo  # the stubs leave its options out
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = deadline
    options._threads = 1  # operations come one after another
    return gloo(store, rank, size, options)
