"""pytest -m gpu with a clock: the tests that say most come first, and each outcome is saved when it is known.

Milestone: M4. vLLM counterpart: none. Most of the time of these tests goes into compiling: each kernel is compiled anew
for each head size, block size and dtype. So there are two parts, "tests" with a choice of all tests (FIRST) and, if
time is left, "tests_rest" with the others. Tests that there is no time for are counted as not run.

    python scripts/dev/gpu_tests.py [--rest] [--device cuda|cpu] [--out DIR]
"""

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from gpu_result import TRACEBACK_LENGTH, Options, Result, cuda_works, parse_options, say, start_again

ROOT = Path(__file__).resolve().parents[2]
# A test whose id contains one of these is in the first part, in this order.
FIRST = (
    "test_one_token_alone_gets_its_own_value",
    "test_a_key_that_outweighs_all_gives_its_value",
    "test_around_tile_boundaries",
    "it_is_dequant[fp16-4-4096",
    "it_is_dequant[bf16-4-4096",
    "it_is_dequant[fp32-4-576",
    "test_on_a_gpu_the_engine_gives_the_tokens_of_the_cpu",
    "test_every_preset_gives_the_tokens_of_the_cpu",
    "test_every_backend_gives_the_tokens_of_the_cpu",
    "test_half_precision_stays_close",
    "test_the_memory_of_the_gpu_is_shared_out",
    "test_a_seed_draws_alike",
    "test_gpu_sampler.py",
    "test_gpu_steps.py",
    "test_a_hundred_requests",
    "test_copied_blocks_read_like_the_originals",
    "test_a_context_of_8192",
)
LAST = "test_random_batches"  # compiles most
SAVE_SECONDS = 1.0
MOST_TRACEBACKS = 20  # of the first tests that fail; later ones often have the same cause


class Recorder:
    """A plugin of pytest: chooses the tests, notes what became of them, and stops when time or CUDA has ended."""

    def __init__(self, result: Result, options: Options) -> None:
        self.result, self.content, self.options = result, result.content, options
        self.tests: dict[str, Any] = self.content.setdefault("tests", {})  # function -> what became of its tests
        self.skipped = Counter(self.content.setdefault("skipped", {}))
        self.session: pytest.Session | None = None
        self.cuda_is_broken, self.saved = False, time.monotonic()

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)  # after -m gpu has taken the others away
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keeps the tests of this part that have not run, in order."""
        done = set(self.content["cases"])
        chosen = [item for item in items if (place_of(item.nodeid) == len(FIRST)) == self.options.flag]
        chosen.sort(key=lambda item: (LAST in item.nodeid, place_of(item.nodeid)))
        items[:] = [item for item in chosen if item.nodeid not in done]
        self.content["not_run"] = {item.nodeid: "no time" for item in items}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported has no tests: without this, nothing would say so."""
        if report.failed:
            self._note_error(report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.content["running"] = nodeid
        self.save()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.tests.setdefault(function_of(report.nodeid), dict.fromkeys(ROW, 0))
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        row["slowest"] = max(row["slowest"], round(report.duration, 2))
        if report.failed:
            self._note_error(report)
        if report.skipped:
            self.skipped[reason_of(report)] += 1
        if report.when == "call" or not report.passed:
            row[report.outcome] += 1

    def _note_error(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.content["errors"].setdefault(report.nodeid, cause_of(report.longreprtext))
        if len(self.content["tracebacks"]) < MOST_TRACEBACKS:
            self.content["tracebacks"].setdefault(report.nodeid, report.longreprtext[-TRACEBACK_LENGTH:])
        say(f"    FAILED {report.nodeid}: {self.content['errors'][report.nodeid]}")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.content["cases"].append(nodeid)
        self.content["running"] = None
        self.content["not_run"].pop(nodeid, None)
        failed = nodeid in self.content["errors"]
        self.cuda_is_broken = failed and self.options.device == "cuda" and not cuda_works()
        if self.cuda_is_broken or self.options.seconds_left < 0:
            assert self.session is not None
            self.session.shouldstop = "CUDA is broken" if self.cuda_is_broken else "no time"
        if failed or time.monotonic() > self.saved + SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        self.content["skipped"] = dict(self.skipped)
        self.content["results"] = [{"test": name, **row} for name, row in self.tests.items()]
        self.result.save()
        self.saved = time.monotonic()


def test_files() -> list[Path]:
    """The files with tests for a GPU. To collect all files would need every optional package."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [file for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


ROW = ("passed", "failed", "skipped", "seconds", "slowest")


def place_of(node_id: str) -> int:
    """The place in FIRST; its length if the test is not among them."""
    return next((place for place, name in enumerate(FIRST) if name in node_id), len(FIRST))


def function_of(node_id: str) -> str:
    return node_id.partition("::")[2].partition("[")[0]


def cause_of(text: str) -> str:
    """The first line of the error in pytest's account of a failure."""
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return lines[0] if lines else text.strip().splitlines()[-1]


def reason_of(report: pytest.TestReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


def main() -> int:
    options = parse_options(__doc__ or "", "--rest", "the tests that are not in the first part")
    result = Result("tests_rest" if options.flag else "tests", "tests, and seconds", options, ())
    recorder = Recorder(result, options)
    arguments = [
        "-m",
        "gpu",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        *map(str, test_files()),
    ]
    status = pytest.main(arguments, [recorder])
    recorder.save()
    if recorder.cuda_is_broken:
        start_again()
    counts = [f"{sum(row[name] for row in recorder.tests.values())} {name}" for name in ROW[:3]]
    say(f"    {', '.join(counts)}, {len(recorder.content['not_run'])} not run")
    was_stopped = recorder.session is not None and bool(recorder.session.shouldstop)
    good = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or was_stopped
    return int(bool(recorder.content["errors"]) or not good)


if __name__ == "__main__":
    sys.exit(main())
