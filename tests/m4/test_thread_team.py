"""The threads of the C++ kernels: parts that no worker begins, lost cores, forks, errors, and the exit.

Milestone: M4. What a program does without torch is in thread_team_driver.cpp, which this file compiles twice: plain,
and with the thread sanitizer, which reports two threads that touch the same memory without an order between them.
"""

import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.csrc.build import SOURCE_DIR, build, default_cache_dir, find_compiler, load_ops

pytestmark = pytest.mark.m4

DRIVER = Path(__file__).with_name("thread_team_driver.cpp")
CASES = ("jobs", "exceptions", "nesting", "no parts", "callers", "fork", "exit", "busy exit")
FAULTS = {  # what happens, and what the program says to its user
    "fork in the leader's part": "",
    "fork in a worker's part": "a part of a parallel job forked the process",
    "missing threads": "thread 1 of the C++ kernels did not start",
}
SEEDS = range(100)


# ---- without torch


@pytest.fixture(scope="module", params=["plain", "sanitizer"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver's path. Skips if this machine cannot compile or run it."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("driver") / "driver"
    flags = ["-fsanitize=thread", "-g"] if request.param == "sanitizer" else []
    sources = [str(DRIVER), str(SOURCE_DIR / "thread_team.cpp")]
    command = [compiler, "-std=c++20", "-O1", "-pthread", *flags, f"-I{SOURCE_DIR}", *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    if flags and (built.returncode != 0 or run_driver(program, "nesting").returncode != 0):
        pytest.skip("this compiler or this kernel has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    return program


def run_driver(program: Path, case: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), case, str(seed)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("seed", [0, 1, 2], ids=["in order", "disturbed", "disturbed otherwise"])
@pytest.mark.parametrize("case", CASES)
def test_driver(driver: Path, case: str, seed: int, request: pytest.FixtureRequest) -> None:
    if case == "fork" and "sanitizer" in request.node.name:
        pytest.skip("the sanitizer ends a child that starts threads")
    done = run_driver(driver, case, seed)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("case", FAULTS)
def test_driver_with_a_fault(driver: Path, case: str, request: pytest.FixtureRequest) -> None:
    """A fork within a part (C6 of a public report), and a thread that does not start (C7)."""
    if "fork" in case and "sanitizer" in request.node.name:
        pytest.skip("the sanitizer ends a child that starts threads")
    done = run_driver(driver, case)
    assert (done.returncode, bool(done.stderr)) == (0, bool(FAULTS[case]))
    assert FAULTS[case] in done.stderr


# ---- the operators


@pytest.fixture(scope="module")
def ops() -> Any:
    loaded = load_ops()
    if loaded is None:
        pytest.skip("no C++ kernels here")
    return loaded


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def disturb(ops: Any) -> Iterator[Callable[[int, bool], None]]:
    yield ops.disturb_thread_team
    ops.disturb_thread_team(0)


PROMPTS = [[3 + i * 7 % 250 for i in range(n)] for n in (40, 3, 90, 17)]
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
SEEDED = GREEDY.replace(temperature=1, top_p=0.9, seed=5)
PARAMS = [GREEDY, SEEDED, GREEDY, SEEDED]


def tokens(llm: LLM) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Callable[[str], Path], ops: Any) -> LLM:
    """Four threads, also where there are fewer cores."""
    return LLM(str(tiny_model_dir("llama")), dtype="float32", skip_tokenizer_init=True, cpu_threads=4)


def test_tokens_do_not_depend_on_who_computes(llm: LLM, ops: Any, disturb: Callable[[int, bool], None]) -> None:
    """fp32, greedy and seeded, in 100 schedules in which workers come late, pause and stay away."""
    expected = tokens(llm)
    parts = ops.thread_team_stats()["parts_by_workers"]
    for seed in SEEDS:
        disturb(seed + 1, seed % 2 == 0)  # in every second one, a worker that is often late sits out
        assert tokens(llm) == expected, f"schedule {seed}"
    assert ops.thread_team_stats()["parts_by_workers"] > parts, "the workers took part"


def test_the_engine_has_its_own_number_of_threads(llm: LLM, set_threads: Callable[[int], None], ops: Any) -> None:
    """`cpu_threads` holds within the engine, and torch's number stays what it was."""
    set_threads(1)
    jobs = ops.thread_team_stats()["jobs"]
    tokens(llm)
    assert ops.thread_team_stats()["jobs"] > jobs and torch.get_num_threads() == 1
    assert llm.describe()["threads"] == 4


def test_a_thread_count_that_is_no_count_is_refused() -> None:
    for bad in (0, -1, 2.0, "4", 10**6):
        with pytest.raises(ValueError, match="cpu_threads"):
            LLM("some/model", cpu_threads=bad)


def row_sums(ops: Any, rows: int = 4096) -> torch.Tensor:
    """A job of our team: rows of ones, normalised."""
    return ops.rms_norm(torch.ones(rows, 64), None, torch.ones(64), 1e-6)


def test_more_threads_later(ops: Any, set_threads: Callable[[int], None]) -> None:
    expected = row_sums(ops)
    for threads in (2, 5, 3, 1, 8):
        set_threads(threads)
        assert torch.equal(row_sums(ops), expected)


def child_of_a_fork(queue: Any, rows: torch.Tensor) -> None:
    """Calls no operator of torch that has many threads: after a fork, OpenMP waits for threads that are not there."""
    ops = load_ops()
    assert ops is not None
    queue.put(ops.rms_norm(rows, None, torch.ones(64), 1e-6)[-1].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_child_computes(ops: Any, set_threads: Callable[[int], None]) -> None:
    """With a team of its own: a child has none of its parent's threads."""
    set_threads(3)
    rows = torch.ones(4096, 64)
    expected = ops.rms_norm(rows, None, torch.ones(64), 1e-6)[-1].tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=child_of_a_fork, args=(queue, rows))
    child.start()
    assert queue.get(timeout=120) == expected
    child.join(60)
    assert child.exitcode == 0


EXIT = """
import os, torch
from folovllm.csrc.build import load_ops
ops, x = load_ops(), torch.ones(4096, 64)
torch.set_num_threads(3)
for _ in range(100):
    ops.rms_norm(x, None, torch.ones(64), 1e-6)
print(sorted({open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_python_ends_with_a_team() -> None:
    """Workers that look for work or sleep neither keep the process nor crash it."""
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'folovllm-1', 'folovllm-2'" in done.stdout


def test_no_openmp_in_our_library(isa: str) -> None:
    """Its threads would look for work in a loop for milliseconds after each region, on the cores of our workers."""
    if sys.platform != "linux" or (nm := shutil.which("nm")) is None:
        pytest.skip("needs nm")
    library = build(default_cache_dir(), isa=isa)
    symbols = subprocess.run(
        [nm, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    assert "GOMP" not in symbols and "kmpc" not in symbols
