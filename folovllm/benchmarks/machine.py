"""Where and of what a result was made: processor, memory, versions, commit.

Milestone: M1. vLLM counterpart: vllm/collect_env.py. No torch: versions come from the packages' metadata. Nothing here
names a user, a host or a folder, so that results can be committed.
"""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import folovllm
from folovllm.benchmarks.options import usable_cores

PACKAGES = ("torch", "transformers", "tokenizers", "numpy")


def machine_header() -> dict[str, Any]:
    """The facts a reader of a number asks for first. A `load_average` at the start well above 0 means: not alone."""
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


def package_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout, and whether tracked files differ from it; None outside a repository."""
    sha = _git(folder, "rev-parse", "HEAD")
    if sha is None:
        return None
    return {"sha": sha, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
