"""Where and of what a result was made: processor, memory and its speed, versions, commit, command line.

Milestone: M1. vLLM counterpart: vllm/collect_env.py. Nothing here names a user, a host or a folder, so that results can
be committed. Versions come from the packages' metadata; torch is imported only by the functions that measure with it,
so that the parent process of a benchmark stays small beside its arms.
"""

import os
import platform
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import folovllm
from folovllm.cpus import usable_cpus

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")
NUM_READS = 7
Allocate = Callable[[tuple[int, ...], "torch.dtype"], "torch.Tensor"]  # (shape, dtype) -> a tensor of zeros


def machine_header() -> dict[str, Any]:
    """The facts a reader of a number asks for first. If `load_average` is high at the start, other work was running."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": [round(load, 2) for load in psutil.getloadavg()],
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "folovllm": folovllm.__version__,
        **{package: package_version(package) for package in PACKAGES},
        "git": git_state(Path(folovllm.__file__).parents[1]),
    }


def cpu_model() -> str:
    """The processor's name. E.g. "AMD EPYC 9B45"."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if match is not None:
            return match[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use, by its affinity mask and its CPU quota."""
    return usable_cpus().number


def package_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout, and whether tracked files differ from it; None outside a repository."""

    def git(*args: str) -> str:
        return subprocess.check_output(["git", "-C", folder, *args], stderr=subprocess.DEVNULL, text=True, timeout=30)

    try:
        return {
            "sha": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def commit_of(machine: dict[str, Any]) -> str:
    """For titles: "59b34a9000", or "59b34a9000 with changes"."""
    git = machine["git"] or {"sha": "unknown", "dirty": False}
    return git["sha"][:10] + (" with changes" if git["dirty"] else "")


def command_line(script: str, argv: Sequence[str]) -> str:
    """The command that made a result, to be run again."""
    return shlex.join([script, *map(without_folders, argv)])


def without_folders(text: str) -> str:
    """An absolute path without the folders before its name: results are published, the layout of a disk is not."""
    return Path(text).name if Path(text).is_absolute() else text


class MemoryReader:
    """Measures the floor under every decode step. It sums a tensor far larger than the caches: each element is read
    once, nothing is written, and what the caches held before is gone.

    On a CPU the tensor lies in huge pages, as our weights do: ordinary pages are read more slowly, which would flatter
    us. `allocate` overrides that.
    """

    def __init__(self, device: str, num_bytes: int, allocate: Allocate | None = None) -> None:
        import torch

        from folovllm.model_executor.cpu.huge_pages import huge_zeros

        shape = (max(num_bytes // 4, 1),)
        if device == "cpu":
            self._data = (allocate or huge_zeros)(shape, torch.float32).fill_(1.0)  # [num_elements]
        else:
            self._data = torch.ones(shape, dtype=torch.float32, device=device)  # [num_elements]
        self.num_bytes = self._data.numel() * self._data.element_size()

    def read(self) -> float:
        """Bytes per second of one read."""
        start = time.perf_counter()
        self._data.sum().item()  # item() also waits for a GPU
        return self.num_bytes / (time.perf_counter() - start)


def measure_bandwidth(device: str, num_bytes: int, allocate: Allocate | None = None) -> dict[str, Any]:
    """Bytes per second: the best of several reads, since a disturbance makes a read slower and never faster."""
    import torch

    reader = MemoryReader(device, num_bytes, allocate)
    pages = "huge pages" if device == "cpu" else "device memory"
    tensor = f"one float32 tensor of {reader.num_bytes / 2**30:.2f} GiB in {pages}"
    how = f"best of {NUM_READS} sums over {tensor} with {torch.get_num_threads()} threads"
    return {"bytes_per_second": max(reader.read() for _ in range(NUM_READS)), "how": how}


def describe_device(device: str) -> dict[str, Any]:
    """What torch knows of the processor: name and memory of the GPU, or the CPU's vector instructions."""
    import torch

    from folovllm.csrc.levels import cpu_capabilities

    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    flags = cpu_capabilities()
    return {"cpu_capabilities": sorted(name for name, value in flags.items() if value is True)}
