"""What the parts of scripts/gpu_all.sh share: their options, a result file that grows case by case, and a GPU's clock.

Milestone: M4. vLLM counterpart: none. A part is a list of cases. Each case adds its rows to the part's file, which is
written anew before and after every case, so that a part that is killed leaves what it has measured and names the case
that was running.

If a kernel of one case reads memory that is not its own, CUDA refuses every later call of the process. The part then
starts itself again and goes on with the case after it. If a case kills the process, gpu_all.py does the same.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from folovllm.benchmarks.machine import command_line, describe_device, machine_header
from folovllm.benchmarks.report import read_json, write_json
from folovllm.platforms import choose_device

SCHEMA = "folovllm.gpu/1"
DEVICES = ("cuda", "cpu")
WARM_UPS, REPEATS = 3, 21
TRACEBACK_LENGTH = 4_000  # characters
SMI_SECONDS = 5.0
STATE = ("clocks.sm", "utilization.gpu", "memory.used", "temperature.gpu")
REASONS = "clocks_event_reasons.active"  # why the clocks are not higher; older drivers do not have it
FLUSH_SECONDS = 1.5e-3  # of writing memory before each timed call: more than the host needs to launch a few kernels

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How a part was called."""

    device: str
    out: Path  # the folder
    until: float  # time.time() at which the part must have ended
    resume: bool  # cases that the file has already are not run again
    flag: bool = False  # the part's own, if it has one

    @property
    def seconds_left(self) -> float:
        return self.until - time.time()


@dataclass(frozen=True)
class Case:
    """`run` returns the rows of the file that the case fills. It is not begun with less than `seconds` left."""

    name: str
    run: Callable[[], list[Row]]
    seconds: float = 0.0


def parse_options(description: str, flag: str | None = None, about: str = "") -> Options:
    """The options of a part, which may have one of its own; without a GPU, `--device cuda` ends the program."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="cpu: a rehearsal with tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("bench_results/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--until", type=float, default=float("inf"), help="when to have ended, in seconds since 1970")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the result file has already")
    if flag:
        parser.add_argument(flag, dest="flag", action="store_true", help=about)
    options = Options(**vars(parser.parse_args()))
    try:
        choose_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    return options


class Result:
    """The file `<out>/<part>.json`: the machine, the command, `results` (rows), and which cases gave none and why."""

    def __init__(
        self,
        part: str,
        unit: str,
        options: Options,
        shown: Sequence[str],  # columns of the progress line
        complete: Callable[[list[Row]], None] = lambda rows: None,  # adds to rows what needs other rows
        **facts: Any,
    ) -> None:
        self.options, self.shown, self.complete = options, shown, complete
        self.path = options.out / f"{part}.json"
        script = f"scripts/dev/gpu_{part}.py"
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "part": part,
            "command": command_line(script, ["--device", options.device]),
            "unit": unit,
            "machine": machine_header() | {"triton": triton_version()} | describe_device(options.device),
            **facts,
            "cases": [],  # that ended, well or not
            "running": None,  # the case that has begun: if the process dies, this one is to blame
            "errors": {},  # case -> the first line of its error
            "tracebacks": {},  # of these cases
            "not_run": {},  # case -> why
            "results": [],
        }
        if options.resume and self.path.exists():
            self.content = read_json(self.path, SCHEMA)
        self.save()

    def save(self) -> None:
        """Replaces the file at once, so that after a kill there is the old one or the new one, but whole."""
        scratch = self.path.with_suffix(".tmp")
        write_json(self.content, scratch)
        scratch.replace(self.path)

    def run(self, cases: Sequence[Case]) -> int:
        """Runs the cases that the file does not have; the exit status. A case that fails stops none."""
        left = [case for case in cases if case.name not in self.content["cases"]]
        self.content["not_run"] |= {case.name: "not begun" for case in left}
        state = self.content["gpu_before"] = self.content.get("gpu_before") or gpu_state(self.options.device)
        if state.get("programs", 0) > 1:  # one is this process
            say(f"    {state['programs']} programs compute on this machine's GPUs: the GPU may be shared")
        for case in left:
            if self.options.seconds_left < case.seconds:
                self.content["not_run"][case.name] = "no time"
                say(f"    {case.name}: no time")
                continue
            self._run(case)
        self.content["gpu_after"] = gpu_state(self.options.device)
        self.save()
        return 1 if self.content["errors"] else 0

    def _run(self, case: Case) -> None:
        start, error = time.perf_counter(), None
        del self.content["not_run"][case.name]
        self.content["running"] = case.name
        self.save()
        rows: list[Row] = []
        try:
            rows = case.run()
        except (torch.OutOfMemoryError, MemoryError) as raised:  # a smaller GPU is no mistake
            error = self.content["not_run"][case.name] = first_line(raised)
        except Exception as raised:
            error = self.content["errors"][case.name] = first_line(raised)
            self.content["tracebacks"][case.name] = traceback.format_exc()[-TRACEBACK_LENGTH:]
        self.content["cases"].append(case.name)
        self.content["running"] = None
        self.content["results"] += rows
        self.complete(self.content["results"])
        self.save()
        say(f"    {case.name}: {error or '; '.join(map(self._in_words, rows))} ({time.perf_counter() - start:.1f} s)")
        if error and self.options.device == "cuda" and not cuda_works():
            start_again()

    def _in_words(self, row: Row) -> str:
        """E.g. {"case": "x", "ours_us": 1.2} -> "ours_us 1.2"."""
        return ", ".join(f"{name} {row[name]}" for name in self.shown if name in row)


def first_line(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def say(text: str) -> None:
    print(text, flush=True)


def nvidia_smi(*query: str, of: str = "gpu") -> list[dict[str, str]]:
    """What nvidia-smi answers, word for word, one dict per line; nothing if it is missing, fails or hangs."""
    command = ["nvidia-smi", f"--query-{of}={','.join(query)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(query, map(str.strip, line.split(",")), strict=False)) for line in answer.stdout.splitlines()]


def gpu_state(device: str) -> dict[str, Any]:
    """Whether the GPU is shared or throttled: its clocks, why they are not higher, and how many programs compute."""
    if device == "cpu":
        return {}
    gpus = nvidia_smi(*STATE, REASONS) or nvidia_smi(*STATE)
    return {"gpus": gpus, "programs": len(nvidia_smi("pid", of="compute-apps"))}


def cuda_works() -> bool:
    """Whether CUDA still answers this process: after a bad memory access it does not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def start_again() -> None:
    """Replaces this process by one that goes on with the next case."""
    say("    CUDA answers this process no longer: the part starts again with its next case")
    resume = [] if "--resume" in sys.argv else ["--resume"]
    os.execv(sys.executable, [*sys.orig_argv, *resume])


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


# ---- the clock


@dataclass(frozen=True)
class Timing:
    """Medians of one call: the seconds that the device computed, and those that the host needed to launch it."""

    device: float
    launch: float


class Clock:
    """Times calls on a device, each on cold caches.

    Before each call, the clock writes so much memory that the second-level cache holds none of the call's data. While
    the GPU does that, the host launches the call's kernels, so the events around them see no gap that the host causes.
    """

    def __init__(self, device: str, flush_bytes: int, repeats: int = REPEATS) -> None:
        self.device, self.repeats = device, repeats
        self._flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)  # [flush_bytes]

    def time(self, call: Callable[[], object]) -> Timing:
        for _ in range(WARM_UPS):
            call()
        measure = self._on_gpu if self.device == "cuda" else self._on_cpu
        pairs = [measure(call) for _ in range(self.repeats)]
        if self.device == "cuda":
            torch.cuda.synchronize()
        device, launch = zip(*((read(), host) for read, host in pairs), strict=True)
        return Timing(statistics.median(device), statistics.median(launch))

    def _on_gpu(self, call: Callable[[], object]) -> tuple[Callable[[], float], float]:
        """What reads the seconds once the GPU has ended, and the host's seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        begun = time.perf_counter()
        call()
        launch = time.perf_counter() - begun
        end.record()
        return lambda: start.elapsed_time(end) / 1e3, launch

    def _on_cpu(self, call: Callable[[], object]) -> tuple[Callable[[], float], float]:
        self._flush.zero_()
        begun = time.perf_counter()
        call()
        seconds = time.perf_counter() - begun
        return lambda: seconds, seconds
