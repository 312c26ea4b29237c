"""The cluster of a process: which one it joins, and that a cluster of its own ends with it, however it ends."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from folovllm.distributed.ray_cluster import join_cluster
from tests.m10.conftest import is_alive, wait_for

pytestmark = [pytest.mark.m10, pytest.mark.ray]
ROOT = Path(__file__).parents[2]
DRIVER = """
import sys, threading, time
from folovllm.distributed.ray_cluster import join_cluster
threads = [threading.Thread(target=join_cluster, args=(None, 3)) for _ in range(2)]  # as two engines do
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
import ray
time.sleep(2)  # the cluster must not end with the threads that asked for it
print(int(ray.cluster_resources()["CPU"]), flush=True)
sys.stdin.readline()
"""


@contextmanager
def driver() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process with a cluster of its own, and the processes of that cluster."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{max(3, os.cpu_count() or 1)}\n"
        yield process, [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_cluster_of_its_own_ends_with_the_process(is_killed):
    """After a SIGKILL two of Ray's helpers look for the dead servers for up to a minute, and end then: this test does
    not wait for them, but the one of a node that breaks does (test_ray_processes.py).
    """
    with driver() as (process, pids):
        assert "raylet" in [psutil.Process(pid).name() for pid in pids]
        if is_killed:
            pids = [pid for pid in pids if not psutil.Process(pid).name().endswith("Agent")]
        if is_killed:
            process.kill()
        else:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        process.wait(60)
        wait_for(lambda: not any(map(is_alive, pids)), "Ray has outlived its process")


def test_a_process_that_is_connected_stays_where_it_is(ray_cluster):
    before = ray_cluster.get_runtime_context().get_node_id()
    join_cluster(None, num_cpus=99)
    join_cluster("127.0.0.1:1", num_cpus=1)
    assert ray_cluster.get_runtime_context().get_node_id() == before


def test_an_address_without_a_cluster_is_an_error_of_the_user():
    """In a process of its own: this one is connected."""
    script = "from folovllm.distributed.ray_cluster import join_cluster; join_cluster('127.0.0.1:1', 1)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert ended.returncode == 1
    assert "ValueError: ray_address='127.0.0.1:1': " in ended.stderr and "ray start --head" in ended.stderr


def test_a_cluster_that_runs_already_can_be_joined(ray_cluster):
    """As the second process of a machine does, with the address of the first one's cluster."""
    script = (
        "import sys; from folovllm.distributed.ray_cluster import join_cluster; join_cluster(sys.argv[1], 1);"
        "import ray; print(ray.get_runtime_context().get_node_id())"
    )
    context = ray_cluster.get_runtime_context()
    ended = subprocess.run(
        [sys.executable, "-c", script, context.gcs_address], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[-1] == context.get_node_id()
