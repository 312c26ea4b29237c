"""Real processes on Ray: the server whose machine breaks, and the examples of scripts/ray."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.m8.server_process import Client
from tests.m9.parallel_models import make_parallel
from tests.m10.conftest import is_alive, wait_for

pytestmark = [pytest.mark.m10, pytest.mark.ray]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_parallel("biases", tmp_path_factory.mktemp("biases")))


def test_a_server_whose_node_breaks_ends_with_the_cause(tmp_path, model):
    """Two replicas serve; then Ray's own process of this machine is killed, and with it every actor."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--max-model-len", "128", "--dtype", "float32", "--port", str(port)]
    options += ["--data-parallel-size", "2", "--data-parallel-backend", "ray"]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "folovllm", "serve", model, *options], stdout=file, stderr=file, cwd=ROOT
        )
    try:
        client = Client(port)
        wait_for(lambda: "Ctrl-C ends it" in log.read_text() or server.poll() is not None, "no start", seconds=180)
        answer = client.post("/v1/completions", {"prompt": "the", "max_tokens": 5, "temperature": 0})
        assert answer.status == 200 and answer.json["usage"]["completion_tokens"] == 5
        children = psutil.Process(server.pid).children(recursive=True)
        [raylet] = [child for child in children if child.name() == "raylet"]
        os.kill(raylet.pid, signal.SIGKILL)
        assert server.wait(120) == 1
    finally:
        server.kill()
        server.wait()
    assert "no machine of the Ray cluster is alive any more" in log.read_text()
    wait_for(lambda: not any(is_alive(child.pid) for child in children), "something is left", seconds=180)


@pytest.mark.parametrize(
    "script, args, wanted",
    [
        ("complete_dataset.py", ["--num-prompts", "16"], ["8 completed, 8 were there before, 2 rejected"]),
        ("tensor_parallel.py", ["--ranks", "2"], ["as one process"]),
        pytest.param("serve_app.py", [], ["one request, 1 replica", "2 replicas"], marks=pytest.mark.slow),
    ],
)
def test_the_examples_run(model, script, args, wanted):
    command = [sys.executable, str(ROOT / "scripts/ray" / script), "--model", model, *args]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert all(text in ended.stdout for text in wanted) and "DIFFERS" not in ended.stdout
