"""A local Ray for the tests that have the marker `ray`. It ends with the session, and leaves no process."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The package ray, joined to a cluster that counts 4 CPUs; the machine may have fewer."""
    from folovllm.distributed.ray_cluster import join_cluster

    join_cluster(None, num_cpus=4)
    import ray

    pids = ray_processes()
    assert pids
    yield ray
    ray.shutdown()
    wait_for(lambda: not any(is_alive(pid) for pid in pids), "Ray left processes behind")


def ray_processes() -> list[int]:
    """The processes of Ray that have started from this one: its servers, and the workers below them."""
    import psutil

    return [child.pid for child in psutil.Process().children(recursive=True)]


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that is dead and not waited for counts as dead."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Any, message: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


def all_cpus_are_free() -> bool:
    """Whether no actor holds a CPU of the cluster. Ray's count follows the end of an actor after a moment."""
    import ray

    return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
