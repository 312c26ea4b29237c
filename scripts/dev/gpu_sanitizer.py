"""Every Triton kernel once under NVIDIA's compute-sanitizer: bad memory accesses, and races in shared memory.

Milestone: M4. vLLM counterpart: none. The kernels run on the small cases of gpu_kernels.py, whose results are checked.
Under the sanitizer everything takes many times as long. torch's allocator would hide accesses beyond the end of a
tensor, so it is switched off.

    python scripts/dev/gpu_sanitizer.py [--device cuda|cpu] [--out DIR]
"""

import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from gpu_result import Case, Options, Result, Row, parse_options

from folovllm.benchmarks.runner import run_child

TOOLS = ("memcheck", "racecheck")
NO_SUMMARY = "no summary"
FOUND = 9  # the exit status of the sanitizer if it finds something
KERNELS = Path(__file__).with_name("gpu_kernels.py")
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
LOG_LENGTH = 4_000  # characters


def command(tool: str, options: Options, out: Path) -> list[str]:
    """Without a GPU, the same program without the sanitizer."""
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    if tool == "memcheck":  # libraries ask CUDA for what it may not have, and handle the error
        sanitizer += ["--report-api-errors", "no"]
    program = [sys.executable, str(KERNELS), "--once", "--device", options.device, "--out", str(out)]
    return [*(sanitizer if options.device == "cuda" else []), *program]


def check(tool: str, options: Options, logs: dict[str, str]) -> list[Row]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        try:
            status = run_child(command(tool, options, Path(folder)), max(options.seconds_left, 1), log, ENVIRONMENT)
        finally:
            text = log.read_text(encoding="utf-8", errors="replace")
            logs[tool] = text[-LOG_LENGTH:]
    if status:
        raise AssertionError(first_problem(text) or f"ended with status {status}")
    if options.device == "cuda" and summary_of(text) == NO_SUMMARY:
        raise AssertionError("the sanitizer printed no summary, so it may not have run")
    return [{"case": tool, "summary": summary_of(text), "seconds": round(time.perf_counter() - start, 1)}]


def first_problem(text: str) -> str:
    """The first line in which the sanitizer, or the program under it, reports an error."""
    lines = [line.lstrip("= ").strip() for line in text.splitlines()]
    pattern = re.compile(r"Invalid|hazard|Error:|ERROR|error:|off by")
    return next((line for line in lines if pattern.search(line)), "")


def summary_of(text: str) -> str:
    """E.g. "ERROR SUMMARY: 0 errors"."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", text)
    return str(found[-1]) if found else NO_SUMMARY


def main() -> int:
    options = parse_options(__doc__ or "")
    result = Result("sanitizer", "s", options, ("summary",))
    logs = result.content.setdefault("logs", {})
    return result.run([Case(tool, partial(check, tool, options, logs), 5.0) for tool in TOOLS])


if __name__ == "__main__":
    sys.exit(main())
