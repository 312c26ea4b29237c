"""The default number of threads: the affinity mask, and CPU quotas as containers have them, in made-up files.

Milestone: M4.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from folovllm import cpus, platforms
from folovllm.config import EngineConfig, ParallelConfig
from folovllm.cpus import CpuCount, CpuQuota, cpu_quota, usable_cpus
from folovllm.engine.start_core import share_threads
from folovllm.entrypoints.commands.info import system_facts
from folovllm.executor import multiproc

pytestmark = pytest.mark.m4

MakeRoot = Callable[[dict[str, str]], Path]


@pytest.fixture
def make_root(tmp_path: Path) -> MakeRoot:
    """Writes the files of a system. The names are relative to its root."""

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


V1_DOCKER = {
    "proc/self/cgroup": "5:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n3:cpuset:/docker/1f\n",
    "sys/fs/cgroup/memory/cpu.cfs_quota_us": "1",
    "sys/fs/cgroup/memory/cpu.cfs_period_us": "100000",
}

SYSTEMS: dict[str, tuple[dict[str, str], CpuQuota | None]] = {
    "no control groups": ({}, None),
    "version 2, no limit": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"},
        None,
    ),
    "version 2, in a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        CpuQuota(1.5, "/sys/fs/cgroup/cpu.max"),
    ),
    "version 2, the parent's limit is lower": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/a/cpu.max": "100000 50000\n",
        },
        CpuQuota(2.0, "/sys/fs/cgroup/a/cpu.max"),
    ),
    "version 2 beside version 1": (
        {"proc/self/cgroup": "1:name=systemd:/\n0::/a\n", "sys/fs/cgroup/unified/a/cpu.max": "300000 100000\n"},
        CpuQuota(3.0, "/sys/fs/cgroup/unified/a/cpu.max"),
    ),
    "version 1": (
        V1_DOCKER
        | {
            "sys/fs/cgroup/cpu,cpuacct/docker/1f/cpu.cfs_quota_us": "250000\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/1f/cpu.cfs_period_us": "100000\n",
        },
        CpuQuota(2.5, "/sys/fs/cgroup/cpu,cpuacct/docker/1f/cpu.cfs_quota_us"),
    ),
    "version 1, in a container that does not see its path": (
        V1_DOCKER
        | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        CpuQuota(0.5, "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
    ),
    "version 1, no limit": (
        V1_DOCKER | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "files that make no sense": (
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "\n", "sys/fs/cgroup/cpu.max": "100000 0\n"},
        None,
    ),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_quota_of_a_control_group(name: str, make_root: MakeRoot) -> None:
    files, expected = SYSTEMS[name]
    assert cpu_quota(make_root(files)) == expected


def test_a_quota_is_rounded_to_the_nearest_number_of_threads() -> None:
    quotas = {0.1: 1, 1.0: 1, 1.2: 1, 1.5: 2, 2.4: 2, 2.5: 3, 4.0: 4, 63.9: 64}
    assert {quota: CpuQuota(quota, "").threads() for quota in quotas} == quotas


def machine(monkeypatch: pytest.MonkeyPatch, mask: int, quota: float | None, torch_threads: int) -> None:
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda pid: set(range(mask)), raising=False)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: None if quota is None else CpuQuota(quota, "/some/cpu.max"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: torch_threads)


@pytest.mark.parametrize(
    ("mask", "quota", "torch_threads", "expected"),
    [
        (64, None, 64, CpuCount(64, "torch.get_num_threads()")),
        (64, 4.0, 64, CpuCount(4, "a CPU quota of 4 (/some/cpu.max)")),
        (64, 1.5, 1, CpuCount(1, "torch.get_num_threads()")),
        (2, 4.0, 64, CpuCount(2, "the affinity mask")),  # the mask has changed since torch was loaded
        (2, 2.0, 64, CpuCount(2, "the affinity mask")),
    ],
)
def test_the_smallest_limit_decides(
    mask: int, quota: float | None, torch_threads: int, expected: CpuCount, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, mask, quota, torch_threads)
    assert platforms.default_threads() == expected
    facts = system_facts()
    assert (facts["threads"], facts["threads_from"]) == expected


def test_a_machine_without_affinity_masks_counts_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cpus.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cpus.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: None)
    assert usable_cpus() == CpuCount(3, "all CPUs")


def threads_of(**parallel: int) -> int | None:
    config = EngineConfig.from_args(model="some/model", device="cpu")
    return share_threads(dataclasses.replace(config, parallel_config=ParallelConfig(**parallel))).cpu_threads


def test_an_engine_respects_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 threads with a quota of 4 CPUs were all stopped for most of each 100 ms (C2 of a public report)."""
    machine(monkeypatch, mask=64, quota=4.0, torch_threads=64)
    assert threads_of() == 4
    assert threads_of(data_parallel_size=2) == 2
    assert threads_of(data_parallel_size=2, tensor_parallel_size=2) == 1
    two_ranks = dataclasses.replace(EngineConfig(), parallel_config=ParallelConfig(tensor_parallel_size=2))
    assert multiproc._threads_per_rank(share_threads(two_ranks)) == 2


def test_without_a_quota_an_engine_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, mask=64, quota=None, torch_threads=64)
    assert threads_of() is None
    given = dataclasses.replace(EngineConfig.from_args(model="some/model", device="cpu"), cpu_threads=7)
    assert share_threads(given).cpu_threads == 7
