"""Fixtures of the client tests: two running servers, and calls into the project's own environment.

These tests run in .venv-clients (`make test-clients`), where the package folovllm cannot be imported: they know the
server only through HTTP, as its users do.
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.server_process import PROJECT_BIN, ROOT, ServerProcess, serve

MODEL = "smollm2-135m"
TINY_MAX_MODEL_LEN = 8192


def project(function: str, **arguments: Any) -> Any:
    """Calls `function` of project_side.py in a process of the project's .venv."""
    finished = subprocess.run(
        [str(PROJECT_BIN / "python"), "-m", "tests.clients.project_side", function],
        cwd=ROOT,
        input=json.dumps(arguments),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def model_folder() -> Path:
    """Folder of the default model."""
    return Path(project("model_folder", model=MODEL))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random model that makes thousands of tokens per second, for faults that need many of them."""
    folder = tmp_path_factory.mktemp("tiny")
    return project("tiny_model", folder=str(folder), max_position_embeddings=TINY_MAX_MODEL_LEN)


@pytest.fixture(scope="session")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The default model in fp32 under its default name, for all tests that do not end or change the server."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with serve(log, "--dtype", "float32", "--num-kv-blocks", "4096", model=MODEL) as running:
        yield running


@pytest.fixture
def serve_tiny(tiny_model: str, tmp_path: Path) -> Callable[..., Any]:
    """serve_tiny("--max-num-seqs", "4"): a context manager with a server of the tiny model."""

    def start(*options: str, uds: Path | None = None) -> Any:
        return serve(tmp_path / "server.log", *options, model=tiny_model, uds=uds)

    return start


@pytest.fixture(autouse=True)
def idle_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that used `server`, no request is left and all its blocks are free."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").wait_until_idle()
