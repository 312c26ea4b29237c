"""Runs the parts of scripts/gpu_all.sh one after another, each in a process and within a time of its own.

Milestone: M4. vLLM counterpart: none (its CI runs .buildkite/test-pipeline.yaml). Left out: several GPUs.

Parts come in the order of what they are worth, since time may end before they do. A part may use its share of what is
left, so time that one part does not need goes to the later ones. A part that fails, hangs or runs out of time does not
stop the next one. Each part writes its own result file while it runs, and summary.json is written anew after each part,
so that a killed run leaves all that was measured until then. The result of the first part, the machine, moves into
summary.json: a machine that is lent for minutes may give back only eight files. What earlier runs of other parts have
written to the same folder is kept. docs/dev/gpu_status.md says how to read the files.

    bash scripts/gpu_all.sh [--device cuda|cpu] [--out DIR] [--minutes 8] [--parts machine,tests,...]
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import command_line, machine_header
from folovllm.benchmarks.report import write_json
from folovllm.benchmarks.runner import end_group, start_child

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent
FOLDERS = {"cuda": "bench_results/gpu", "cpu": "bench_results/gpu_rehearsal"}  # in the checkout
STEM = "scripts/gpu_all.sh"
RUNNING, DONE, FAILED, SKIPPED = "running", "done", "failed", "skipped"
TO_SAVE = 0.9  # a part is told to end after this share of its time, and is ended by force after all of it
LOG_LENGTH = 4_000  # characters of a failed part's output that the summary keeps
MOVED = "part_"  # begins the names of results in summary.json
SIGNALLED = 128  # added to the number of the signal that ended a process
LEAST_SECONDS = 5.0  # with less than this, a part cannot even import torch


@dataclass(frozen=True)
class Part:
    """One process. `share` is its share of the time: the seconds that it may use of an 8-minute run."""

    name: str
    about: str
    share: float
    command: tuple[str, ...]
    missing: str = ""  # why it cannot run here
    in_summary: bool = False  # its result file moves into summary.json


@dataclass(frozen=True)
class Outcome:
    """What became of a part. `file`: its result file, if it has one. `date`: when it ended."""

    part: str
    status: str
    note: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    file: str = ""
    date: str = ""


def all_parts(device: str) -> list[Part]:
    """The parts, the most valuable first. The order is an estimate of what is needed if only a minute is left."""
    sanitizer = shutil.which("compute-sanitizer")
    missing = "compute-sanitizer is not on the PATH" if device == "cuda" and sanitizer is None else ""
    return [
        Part("machine", "the GPU, and what it can do", 15, script("machine"), in_summary=True),
        Part("tests", "pytest -m gpu: do the kernels run, are the engine's tokens equal?", 85, script("tests")),
        Part("kernels", "time of each kernel beside its floor and beside torch", 70, script("kernels")),
        Part("ladder", "tokens per second: the rungs, GPTQ, HuggingFace", 140, script("ladder")),
        Part("steps", "where a decode step waits", 30, script("steps")),
        Part("sanitizer", "memcheck and racecheck of every kernel", 40, script("sanitizer"), missing),
        # It ends by itself, while the last part takes all the time that is left.
        Part("tiles", "would other sizes of the kernels' tiles be faster?", 60, script("tiles")),
        Part("tests_rest", "the other tests of pytest -m gpu", 40, (*script("tests"), "--rest")),
    ]


def script(name: str) -> tuple[str, ...]:
    return (sys.executable, str(SCRIPTS / f"gpu_{name}.py"))


def run_parts(parts: Sequence[Part], device: str, out: Path, seconds: float, summary: dict[str, Any]) -> list[Outcome]:
    """Runs the parts within `seconds`; what became of them. `summary` is what summary.json says besides.

    Its `results` are rows of earlier runs, which stay.
    """
    end, logs = time.monotonic() + seconds, summary.setdefault("logs", {})
    outcomes = [Outcome(part.name, SKIPPED, part.missing or "no time") for part in parts]
    for index, part in enumerate(parts):
        left = end - time.monotonic()
        limit = (
            left * part.share / sum(later.share for later in parts[index:] if not later.missing) if left > 0 else 0.0
        )
        if part.missing or limit < LEAST_SECONDS:
            say(f"{part.name}: skipped ({outcomes[index].note})")
            continue
        say(f"{part.name}: {part.about} (at most {limit:.0f} s)")
        outcomes[index] = Outcome(part.name, RUNNING, limit=round(limit, 1))
        save(outcomes, out, summary)
        try:
            outcomes[index] = run_part(part, device, out, limit, logs)
            if part.in_summary and outcomes[index].file:
                outcomes[index] = replace(outcomes[index], file="summary.json")
                summary |= move_result(out / f"{part.name}.json")
        except OSError as error:  # e.g. a full disk
            outcomes[index] = Outcome(part.name, FAILED, str(error), limit=round(limit, 1), date=now())
        say(f"{part.name}: {outcomes[index].status} after {outcomes[index].seconds:.0f} s {outcomes[index].note}")
        save(outcomes, out, summary)
    save(outcomes, out, summary)
    return outcomes


def run_part(part: Part, device: str, out: Path, limit: float, logs: dict[str, str]) -> Outcome:
    """Runs one part in a process of its own. If it fails, `logs` gets the end of what it printed.

    If a case kills the process, as a bug in CUDA's libraries may, the case is noted and the part goes on after it.
    """
    file, start = out / f"{part.name}.json", time.monotonic()
    file.unlink(missing_ok=True)
    text, status, culprit, resume = "", None, "", False
    while (left := limit - (time.monotonic() - start)) > (LEAST_SECONDS if resume else 0):
        text, status = run_once(part, device, out, left, resume)
        if status is not None and 0 <= status < SIGNALLED:
            break
        culprit = blame(file, "hung" if status is None else f"ended by signal {abs(status) % SIGNALLED}")
        if not culprit:
            break
        resume = True
    cause = ""
    if status is None:
        cause = f"ran out of its {limit:.0f} s and was ended" + (f", in {culprit}" if culprit else "")
    elif status:
        cause = next(iter(read_problems(file)[0]), "") or last_line(text) or f"ended with status {status}"
    if cause:
        logs[part.name] = text[-LOG_LENGTH:]
    not_run = read_problems(file)[1]
    note = cause or (f"without {not_run} of its cases" if not_run else "")
    seconds, state = round(time.monotonic() - start, 1), FAILED if cause else DONE
    return Outcome(part.name, state, note, seconds, round(limit, 1), file.name if file.exists() else "", now())


def run_once(part: Part, device: str, out: Path, limit: float, resume: bool) -> tuple[str, int | None]:
    """Returns what the process printed, and its exit status, which is None if its time was over."""
    until = time.time() + TO_SAVE * limit
    command = [*part.command, "--device", device, "--out", str(out), "--until", f"{until:.1f}"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        status = follow([*command, *(["--resume"] if resume else [])], limit, log, variables(device))
        return log.read_text(encoding="utf-8", errors="replace"), status


def blame(file: Path, what: str) -> str:
    """Notes in the result file that its running case has failed; the name of the case, if there is one."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    case = str(content.get("running") or "")
    if case:
        content["errors"][case], content["running"] = what, None
        content["cases"].append(case)
        content["not_run"].pop(case, None)
        write_json(content, file)
    return case


def move_result(file: Path) -> dict[str, Any]:
    """Removes a part's result file; its content by the name that it has in the summary. E.g. {"part_machine": ...}."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return {f"{MOVED}{file.stem}": content}


def follow(command: Sequence[str], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """Runs `command` and shows what it prints; its exit status, or None if it had to be ended after `seconds`."""
    process, end = start_child(command, log, environment), time.monotonic() + seconds
    with log.open(encoding="utf-8", errors="replace") as output:
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
                print(output.read(), end="", flush=True)
            status = process.poll()
        finally:
            end_group(process)
        print(output.read(), end="", flush=True)
    return status


def variables(device: str) -> dict[str, str]:
    """Without a GPU, Triton's interpreter runs the kernels. torch's profiler is to keep silent."""
    return {"KINETO_LOG_LEVEL": "99"} | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})


def read_problems(file: Path) -> tuple[list[str], int]:
    """The errors in a result file, and how many cases had no time or no memory."""
    if not file.exists():
        return [], 0
    content = json.loads(file.read_text(encoding="utf-8"))
    return [f"{case}: {error}" for case, error in content["errors"].items()], len(content["not_run"])


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def save(outcomes: Sequence[Outcome], out: Path, summary: dict[str, Any]) -> None:
    """Replaces summary.json at once. If that fails, the parts go on."""
    rows = [*summary.get("results", []), *(asdict(outcome) for outcome in outcomes)]
    try:
        scratch = write_json(summary | {"unit": "seconds", "results": rows}, out / "summary.tmp")
        scratch.replace(out / "summary.json")
    except OSError as error:
        say(f"summary.json could not be written: {error}")


def kept(out: Path, device: str, parts: Sequence[Part]) -> dict[str, Any]:
    """What the folder's summary says about other parts than these, if they ran on the same kind of device."""
    file, names = out / "summary.json", {part.name for part in parts}
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if old.get("device") != device:
        return {"results": [], "logs": {}}
    moved = {key: value for key, value in old.items() if key.startswith(MOVED) and key[len(MOVED) :] not in names}
    return moved | {
        "results": [row for row in old["results"] if row["part"] not in names],
        "logs": {name: log for name, log in old["logs"].items() if name not in names},
    }


def now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def say(text: str) -> None:
    print(f"[{datetime.now():%H:%M:%S}] {text}", flush=True)


def print_table(outcomes: Sequence[Outcome], out: Path) -> None:
    print(f"\n{'part':<12}{'outcome':<10}{'seconds':>8}{'limit':>7}  {'result file':<18}note")
    for o in outcomes:
        print(f"{o.part:<12}{o.status:<10}{o.seconds:>8.0f}{o.limit:>7.0f}  {o.file or '-':<18}{o.note[:120]}")
    print(f"result files: {shlex.quote(str(out))}", flush=True)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=STEM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=epilog()
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal with tiny sizes")
    folders = f"{FOLDERS['cuda']} of this checkout, for a rehearsal {FOLDERS['cpu']}"
    parser.add_argument("--out", type=Path, help=f"folder (default: {folders})")
    parser.add_argument("--minutes", type=minutes, default=8.0, help="for all parts together (default: %(default)s)")
    parser.add_argument("--parts", help="only these, in this order, with commas between them")
    args = parser.parse_args(argv)
    args.out = args.out or ROOT / FOLDERS[args.device]
    return args


def epilog() -> str:
    """The parts, the outcomes and the exit statuses."""
    parts = "\n".join(f"    {part.name:<12}{part.share:>4.0f} s  {part.about}" for part in all_parts("cpu"))
    return f"""parts, and their limits in a run of 8 minutes in which no part leaves time:

{parts}

outcomes: done (maybe without some cases), failed (an error, or its time was over), skipped (no time, or a program is
missing). `logs` in summary.json has the end of what a failed part printed.

exit status: 0 if no part failed, also if parts or cases were skipped; 1 if one failed; 2 if nothing could run; 130
after Ctrl-C"""


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e4:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text}")
    return value


def chosen(parts: list[Part], names: str | None) -> list[Part]:
    """Raises ValueError if there is no part of that name."""
    wanted = names.split(",") if names else [part.name for part in parts]
    known = {part.name: part for part in parts}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--parts: there is no part {', '.join(unknown)}; there are {', '.join(known)}")
    return [replace(known[name]) for name in wanted]


def why_not(device: str) -> str | None:
    """Why this machine cannot run the parts on `device`, in one line."""
    try:
        from folovllm.platforms import choose_device

        choose_device(device)
    except (ValueError, ImportError) as error:
        return str(error)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        parts = chosen(all_parts(args.device), args.parts)
    except ValueError as error:
        print(f"{STEM}: error: {error}", file=sys.stderr)
        return 2
    if reason := why_not(args.device):
        print(f"{STEM}: error: {reason}; for a rehearsal without a GPU: --device cpu", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    command = command_line(STEM, sys.argv[1:] if argv is None else argv)
    summary = {"command": command, "device": args.device, "machine": machine_header(), "date": now()}
    summary |= kept(args.out, args.device, parts)
    try:
        outcomes = run_parts(parts, args.device, args.out, 60 * args.minutes, summary)
    except KeyboardInterrupt:
        print(f"{STEM}: interrupted; what has been measured is in {args.out}", file=sys.stderr)
        return 130
    print_table(outcomes, args.out)
    return int(any(outcome.status == FAILED for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
