"""The small helpers that several parts share."""

import subprocess
import sys

import pytest

from folovllm.utils import (
    available_memory_bytes,
    cdiv,
    did_you_mean,
    nearest_name,
    peak_memory_bytes,
    round_up,
    unknown_name_message,
)

pytestmark = pytest.mark.m0


@pytest.mark.parametrize(("a", "b", "quotient", "rounded"), [(0, 4, 0, 0), (1, 4, 1, 4), (4, 4, 1, 4), (5, 4, 2, 8)])
def test_division_rounds_up(a: int, b: int, quotient: int, rounded: int) -> None:
    assert cdiv(a, b) == quotient and round_up(a, b) == rounded


def test_the_nearest_name() -> None:
    known = ["float16", "float32"]
    assert nearest_name("flaot16", known) == "float16" and did_you_mean("flaot16", known) == "; did you mean 'float16'?"
    assert nearest_name("zzz", known) is None and did_you_mean("zzz", known) == ""
    assert nearest_name("zzz", known, cutoff=0.0) in known, "cutoff 0 always finds one"
    assert unknown_name_message("dtype", "flaot16", known) == "unknown dtype 'flaot16'; did you mean 'float16'?"
    assert unknown_name_message("dtype", "zzz", known) == "unknown dtype 'zzz'; known: float16, float32"


def test_the_peak_of_a_small_child_is_its_own() -> None:
    """getrusage reports for a child what its parent held when it forked."""
    ballast = bytearray(300 * 2**20)
    code = "from folovllm.utils import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 2**20 < child < len(ballast) <= peak_memory_bytes()


def test_the_peak_counts_the_processes_that_hold_the_ranks() -> None:
    """A benchmark of two ranks showed the memory of the process that holds no weights."""
    alone = peak_memory_bytes()
    code = "ballast = b'x' * (300 * 2**20); print(len(ballast), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdout is not None and child.stdout.readline()
        assert peak_memory_bytes() > alone + 300 * 2**20
        child.communicate("\n")


def test_the_memory_of_this_machine_is_known() -> None:
    assert available_memory_bytes() > 0
