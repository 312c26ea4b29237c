"""Groups of processes: their members, and that they need neither torch's global groups nor a name of this machine."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from folovllm.distributed.communicator import SINGLE_RANK, ParallelGroups
from folovllm.distributed.process_groups import make_process_groups
from folovllm.parallel import ParallelConfig
from tests.m9.multiproc_helpers import TIMEOUT

pytestmark = pytest.mark.m9
ROOT = Path(__file__).parents[2]


def on_ranks(parallel: ParallelConfig, work: Callable[[ParallelGroups], Any], timeout: float = TIMEOUT) -> list[Any]:
    """What `work` returns in each rank. The ranks are threads here: their groups are objects, and nothing is global."""
    store, results = dist.HashStore(), dict[int, Any]()

    def run(rank: int) -> None:
        results[rank] = work(make_process_groups(parallel, rank, torch.device("cpu"), store, timeout=timeout))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(parallel.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    return [results[rank] for rank in range(parallel.world_size)]


def test_each_rank_talks_to_its_stage_and_to_its_part_of_the_next_stage():
    def work(groups: ParallelGroups) -> tuple[Any, ...]:
        shard, one = groups.shard, torch.ones(1)
        summed = groups.tp.all_reduce(one * 10**shard.rank)
        received = 0
        if not shard.is_first_stage:
            received = int(groups.pp.receive((1,), torch.float32, groups.pp.rank - 1))
        if not shard.is_last_stage:
            groups.pp.send(one * shard.rank, groups.pp.rank + 1)
        groups.pp.all_reduce(torch.zeros(1))  # no rank leaves before the tensors have come
        return int(summed), received, groups.tp.rank, groups.pp.rank

    assert on_ranks(ParallelConfig(2, 3), work) == [
        (11, 0, 0, 0),
        (11, 0, 1, 0),
        (1100, 0, 0, 1),
        (1100, 1, 1, 1),
        (110000, 2, 0, 2),
        (110000, 3, 1, 2),
    ]
    assert not dist.is_initialized()


def test_a_group_of_one_needs_no_connection():
    (groups,) = on_ranks(ParallelConfig(), lambda groups: groups)
    assert groups.tp is SINGLE_RANK and groups.pp is SINGLE_RANK


def test_an_operation_that_no_other_rank_joins_ends_with_an_error():
    def work(groups: ParallelGroups) -> str | ParallelGroups:
        if groups.tp.rank == 0:
            return groups  # it stays, and says nothing
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out") as caught:
            groups.tp.all_reduce(torch.ones(1))
        return str(caught.value)

    _, error = on_ranks(ParallelConfig(2), work, timeout=0.5)
    assert error


ALONE = """
import torch
from tests.m9.test_process_groups import on_ranks
from folovllm.parallel import ParallelConfig
print(on_ranks(ParallelConfig(2), lambda groups: groups.tp.all_reduce(torch.ones(3)).tolist()))
"""


def test_a_machine_without_a_network_and_with_a_name_that_has_no_address():
    """Gloo by itself looks up the address of this machine's name, and fails in such a container."""
    inner = 'hostname nowhere.invalid && (ip link set lo up || ifconfig lo up) && exec "$0" -c "$1"'
    command = ["unshare", "--uts", "--net", "sh", "-c", inner]
    if subprocess.run([*command[:-1], "exec true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not let the test make a namespace")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, sys.executable, ALONE], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.stdout.strip() == "[[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]", done
