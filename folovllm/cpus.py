"""How many CPUs this process may use: its affinity mask, and the CPU quota of its control groups.

Milestone: M4. vLLM counterpart: `CPUWorker.init_device` in vllm/v1/worker/cpu_worker.py, which binds threads to the
CPUs of the mask. Left out: the quota of an ancestor that this process cannot see, as inside a container.

A quota limits the CPU time of a group of processes. E.g. `docker run --cpus=4` allows 400 ms of CPU time in every
100 ms. If 64 threads use that up in 6 ms, the system stops all of them for the other 94 ms.
"""

import os
from pathlib import Path
from typing import NamedTuple


class CpuCount(NamedTuple):
    number: int
    source: str  # where the number comes from, for people to read


class CpuQuota(NamedTuple):
    cpus: float
    file: str

    def threads(self) -> int:
        """The quota rounded to the nearest number of threads, half a CPU upwards, and at least 1.

        On the reference machine, two threads are 1.1 times as fast as one for one request and 1.8 times for many
        (milestones/m4/results/threads_cpu.json), but use twice the CPU time. So with a quota of 1.2 CPUs one thread is
        better for one request, and hardly worse for many. With 1.5 CPUs, one request loses a little, and many gain.
        """
        return max(1, int(self.cpus + 0.5))


def usable_cpus() -> CpuCount:
    """The CPUs of the affinity mask, or the threads that the quota feeds if they are fewer."""
    affinity = getattr(os, "sched_getaffinity", None)
    mask = CpuCount(len(affinity(0)), "the affinity mask") if affinity else CpuCount(os.cpu_count() or 1, "all CPUs")
    quota = cpu_quota()
    if quota is None or quota.threads() >= mask.number:
        return mask
    return CpuCount(quota.threads(), f"a CPU quota of {quota.cpus:g} ({quota.file})")


def cpu_quota(root: Path = Path("/")) -> CpuQuota | None:
    """The smallest quota of this process's control groups and their ancestors, or None. Tests give a `root`."""
    quotas = [quota for folder in _group_folders(root) if (quota := _quota_in(folder, root)) is not None]
    return min(quotas, default=None)


def _group_folders(root: Path) -> list[Path]:
    """Each control group of this process that may limit its CPUs, and the group's ancestors.

    E.g. the line "0::/user.slice/app" of version 2 -> [/sys/fs/cgroup/user.slice/app, /sys/fs/cgroup/user.slice,
    /sys/fs/cgroup], and "4:cpu,cpuacct:/docker/1f" of version 1 -> [/sys/fs/cgroup/cpu,cpuacct/docker/1f, ...]. In a
    container the path may be the host's, of which the container sees nothing but the folder at the top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for top in _tops(root / "sys/fs/cgroup", controllers):
            group = top / path.lstrip("/")
            folders += [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return folders


def _tops(cgroup: Path, controllers: str) -> list[Path]:
    """Where the hierarchy with these controllers is mounted. Version 2 names none, and may lie beside version 1."""
    if not controllers:
        return [cgroup, cgroup / "unified"]
    return [cgroup / controllers, cgroup / "cpu"] if "cpu" in controllers.split(",") else []


def _quota_in(folder: Path, root: Path) -> CpuQuota | None:
    """The quota that a group sets, from `cpu.max` of version 2 or the two files of version 1. None if it sets none."""
    for name in ("cpu.max", "cpu.cfs_quota_us"):
        try:
            words = (folder / name).read_text().split()  # "150000 100000", "max 100000"; version 1: "150000", "-1"
            if name != "cpu.max":
                words.append((folder / "cpu.cfs_period_us").read_text())
            cpus = int(words[0]) / int(words[1])
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
        if cpus > 0:
            return CpuQuota(cpus, f"/{(folder / name).relative_to(root)}")
    return None
