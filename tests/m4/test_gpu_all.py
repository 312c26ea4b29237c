"""scripts/gpu_all.sh without a GPU: what is left of a run in which parts fail, hang, have no time, or are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.script_loader import SCRIPTS, load_script

pytestmark = pytest.mark.m4

# What a part does before it ends. It is called with --device, --out and --until.
SAVE = """
import json, pathlib, sys, time
name, out = pathlib.Path(sys.argv[0]).stem, pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
def save(**facts):
    text = json.dumps({"errors": {}, "not_run": {}, "results": [1]} | facts)
    (out / f"{name}.json").write_text(text)
"""
FAKES = {
    "good": "save()",
    "short": "save(not_run={'a': 'no time', 'b': 'no time'})",
    "bad": "save(errors={'case 3': 'ValueError: off by 2'}); sys.exit(1)",
    "broken": "raise ImportError('no module named x')",
    "hanging": "save(); print('hanging', flush=True); time.sleep(600)",
    "late": "save(); print('late', flush=True)",
}

MakePart = Callable[..., Any]


@pytest.fixture
def driver() -> Any:
    return load_script("gpu_all")


@pytest.fixture
def make_part(tmp_path: Path, driver: Any) -> MakePart:
    def make(name: str, share: float = 1.0, missing: str = "", in_summary: bool = False) -> Any:
        file = tmp_path / f"{name}.py"
        file.write_text(SAVE + FAKES[name])
        return driver.Part(name, "", share, (sys.executable, str(file)), missing, in_summary)

    return make


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


# --- the driver -------------------------------------------------------------------------------------------------------


def test_a_part_that_fails_stops_no_other(driver: Any, make_part: MakePart, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "broken.json").write_text("an older run's")
    parts = [make_part(name) for name in ("good", "bad", "broken", "short", "late")]
    outcomes = driver.run_parts(parts, "cpu", out, 600, {"command": "x"})
    assert [(o.part, o.status, o.note, o.file) for o in outcomes] == [
        ("good", "done", "", "good.json"),
        ("bad", "failed", "case 3: ValueError: off by 2", "bad.json"),
        ("broken", "failed", "ImportError: no module named x", ""),
        ("short", "done", "without 2 of its cases", "short.json"),
        ("late", "done", "", "late.json"),
    ]
    summary = read(out, "summary")
    assert [row["status"] for row in summary["results"]] == [o.status for o in outcomes]
    assert "Traceback" in summary["logs"]["broken"] and summary["command"] == "x"


def test_a_part_that_hangs_is_ended_and_keeps_its_file(driver: Any, make_part: MakePart, tmp_path: Path) -> None:
    parts = [make_part("hanging", share=0.01), make_part("late")]
    hanging, late = driver.run_parts(parts, "cpu", tmp_path, 600, {})
    assert (hanging.status, hanging.note) == ("failed", "ran out of its 6 s and was ended")
    assert read(tmp_path, "hanging")["results"] == [1]
    assert late.status == "done"


def test_a_result_moves_into_the_summary(driver: Any, make_part: MakePart, tmp_path: Path) -> None:
    parts = [make_part("bad", in_summary=True), make_part("broken", in_summary=True), make_part("late")]
    outcomes = driver.run_parts(parts, "cpu", tmp_path, 600, {})
    assert [(o.note, o.file) for o in outcomes[:2]] == [
        ("case 3: ValueError: off by 2", "summary.json"),
        ("ImportError: no module named x", ""),
    ]
    assert not (tmp_path / "bad.json").exists()
    assert read(tmp_path, "summary")["part_bad"]["results"] == [1]


def test_time_that_a_part_leaves_goes_to_the_later_ones(driver: Any, make_part: MakePart, tmp_path: Path) -> None:
    parts = [make_part("good"), make_part("bad", missing="x is not installed"), make_part("late")]
    good, missing, late = driver.run_parts(parts, "cpu", tmp_path, 6000, {})
    assert good.limit == 3000 and late.limit > 5000
    assert (missing.status, missing.note) == ("skipped", "x is not installed")


def test_without_time_a_part_is_skipped(driver: Any, make_part: MakePart, tmp_path: Path) -> None:
    outcomes = driver.run_parts([make_part("good"), make_part("late")], "cpu", tmp_path, 3, {})
    assert [(o.status, o.note) for o in outcomes] == [("skipped", "no time")] * 2
    assert [row["status"] for row in read(tmp_path, "summary")["results"]] == ["skipped"] * 2


def test_kill_9_leaves_every_part_that_had_ended(make_part: MakePart, tmp_path: Path) -> None:
    """And no process: the part that was running ends with the driver."""
    body = "import os; pathlib.Path(out / 'pid').write_text(str(os.getpid())); save(); time.sleep(600)"
    parts = [make_part(name) for name in ("good", "hanging")]
    (tmp_path / "hanging.py").write_text(SAVE + body)
    program = (
        f"import sys, pathlib; sys.path.insert(0, {str(SCRIPTS / 'dev')!r}); import gpu_all\n"
        f"parts = [gpu_all.Part(n, '', 1, (sys.executable, p)) for n, p in {[(p.name, p.command[1]) for p in parts]}]\n"
        f"gpu_all.run_parts(parts, 'cpu', pathlib.Path({str(tmp_path)!r}), 600, {{}})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=SCRIPTS.parent)
    wait_for((tmp_path / "pid").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = read(tmp_path, "summary")["results"]
    assert [(row["part"], row["status"]) for row in rows] == [("good", "done"), ("hanging", "running")]
    assert read(tmp_path, "good")["results"] == [1]
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not is_running(pid))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    command = ["bash", str(SCRIPTS / "gpu_all.sh"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("scripts/gpu_all.sh: error: device='cuda' was asked for but torch sees no CUDA device")


def test_an_unknown_part_is_refused(driver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--device", "cpu", "--parts", "machine,speed"]) == 2
    assert "there is no part speed; there are machine, tests" in capsys.readouterr().err


def test_at_most_eight_files_are_written(driver: Any) -> None:
    """A machine that is lent for minutes may give back only a few."""
    names = [part.name for part in driver.all_parts("cuda") if not part.in_summary]
    assert len({*names, "summary"}) <= 8
    scripts = {part.command[1] for part in driver.all_parts("cuda")}
    assert all(Path(script).is_file() for script in scripts)


# --- a part's result file ---------------------------------------------------------------------------------------------


def options_of(folder: Path, until: float = float("inf"), **more: Any) -> Any:
    return load_script("gpu_result").Options(**{"device": "cpu", "out": folder, "until": until, "resume": False} | more)


def fail() -> list[dict[str, Any]]:
    raise ValueError("wrong shape\nsecond line")


def test_a_case_that_fails_stops_no_other(tmp_path: Path) -> None:
    tools, seen = load_script("gpu_result"), []

    def last() -> list[dict[str, Any]]:
        seen.append(read(tmp_path, "part"))  # what a kill in this moment would leave
        return [{"case": "c", "ms": 2}]

    result = tools.Result("part", "ms", options_of(tmp_path), ("ms",))
    cases = [tools.Case("a", lambda: [{"case": "a", "ms": 1}]), tools.Case("b", fail), tools.Case("c", last)]
    assert result.run(cases) == 1
    assert seen[0]["results"] == [{"case": "a", "ms": 1}] and seen[0]["cases"] == ["a", "b"]
    content = read(tmp_path, "part")
    assert content["errors"] == {"b": "ValueError: wrong shape"}
    assert [row["case"] for row in content["results"]] == ["a", "c"]
    assert content["command"] == "scripts/dev/gpu_part.py --device cpu" and content["machine"]["torch"]


def test_a_case_is_not_begun_without_the_time_for_it(tmp_path: Path) -> None:
    tools = load_script("gpu_result")
    result = tools.Result("part", "ms", options_of(tmp_path, until=time.time() + 100), ())
    cases = [tools.Case("long", fail, seconds=1000), tools.Case("short", lambda: [{"case": "short"}], seconds=1)]
    assert result.run(cases) == 0
    assert read(tmp_path, "part")["not_run"] == {"long": "no time"}
    assert read(tmp_path, "part")["results"] == [{"case": "short"}]


@pytest.mark.parametrize("error", [MemoryError("16 GiB"), torch.OutOfMemoryError("CUDA out of memory. Tried ...")])
def test_too_little_memory_is_no_failure(tmp_path: Path, error: Exception) -> None:
    tools = load_script("gpu_result")

    def run() -> list[dict[str, Any]]:
        raise error

    assert tools.Result("part", "ms", options_of(tmp_path), ()).run([tools.Case("large", run)]) == 0
    content = read(tmp_path, "part")
    assert content["errors"] == {} and content["not_run"] == {"large": f"{type(error).__name__}: {error}"}


def test_if_cuda_is_broken_the_part_goes_on_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, started = load_script("gpu_result"), []
    monkeypatch.setattr(tools, "cuda_works", lambda: False)
    monkeypatch.setattr(tools, "describe_device", lambda device: {})
    monkeypatch.setattr(tools.os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(tools.sys, "orig_argv", ["python", "part.py", "--device", "cuda"])
    cases = [tools.Case("a", fail), tools.Case("b", lambda: [{"case": "b"}])]
    tools.Result("part", "ms", options_of(tmp_path, device="cuda"), ()).run(cases[:1])
    assert started == [(sys.executable, ["python", "part.py", "--device", "cuda", "--resume"])]
    resumed = tools.Result("part", "ms", options_of(tmp_path, device="cuda", resume=True), ())
    assert resumed.run(cases) == 1  # "a" is not run again, and its error is kept
    assert read(tmp_path, "part")["cases"] == ["a", "b"] and len(started) == 1


def test_the_clock_returns_medians(tmp_path: Path) -> None:
    tools, calls = load_script("gpu_result"), []
    timing = tools.Clock("cpu", 16, repeats=5).time(lambda: calls.append(1))
    assert len(calls) == tools.WARM_UPS + 5 and timing.device == timing.launch > 0


# --- pytest -m gpu ----------------------------------------------------------------------------------------------------

SOME_TESTS = """
import pytest, time
pytestmark = pytest.mark.gpu
def test_other(): pass
@pytest.mark.parametrize("n", [1, 2])
def test_first(n): assert n == 1, "two is wrong"
def test_early(): pytest.skip("it refuses")
def test_random_batches(): pass
"""


def run_tests(tmp_path: Path, *arguments: str) -> tuple[int, Any]:
    """gpu_tests.py on SOME_TESTS."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(SOME_TESTS)
    (tmp_path / "tests" / "test_plain.py").write_text("import a_package_that_is_not_here")
    program = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS / 'dev')!r}); import gpu_tests\n"
        f"gpu_tests.ROOT, gpu_tests.FIRST = gpu_tests.Path({str(tmp_path)!r}), ('test_early', 'test_first')\n"
        f"sys.exit(gpu_tests.main())"
    )
    command = [sys.executable, "-c", program, "--device", "cpu", "--out", str(tmp_path), *arguments]
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    return done.returncode, read(tmp_path, "tests_rest" if "--rest" in arguments else "tests")


def test_the_tests_that_say_most_come_first(tmp_path: Path) -> None:
    status, content = run_tests(tmp_path)
    assert status == 1
    assert content["cases"] == [
        f"tests/test_some.py::{name}" for name in ("test_early", "test_first[1]", "test_first[2]")
    ]
    (cause,) = content["errors"].values()
    assert cause.startswith("AssertionError: two is wrong")
    assert content["skipped"] == {"Skipped: it refuses": 1}
    rows = {row["test"]: (row["passed"], row["failed"], row["skipped"]) for row in content["results"]}
    assert rows == {"test_early": (0, 0, 1), "test_first": (1, 1, 0)}


def test_the_rest_ends_when_its_time_does(tmp_path: Path) -> None:
    status, content = run_tests(tmp_path, "--rest", "--until", "1")
    assert status == 0 and content["cases"] == ["tests/test_some.py::test_other"]
    assert content["not_run"] == {"tests/test_some.py::test_random_batches": "no time"}


# --- what the parts compute -------------------------------------------------------------------------------------------


def test_the_ladder_sends_what_nano_vllm_sends() -> None:
    """Its README: 133,966 output tokens."""
    ladder = load_script("gpu_ladder")
    requests = ladder.nano_requests(*ladder.SIZES["cuda"].nano, vocab_size=151_936)
    assert sum(request.output_len for request in requests) == 133_966
    assert {request.temperature for request in requests} == {0.6}
    longest = max(len(request.prompt_token_ids) + request.output_len for request in requests)
    assert longest <= ladder.SIZES["cuda"].max_model_len


def test_every_rung_is_on_the_ladder() -> None:
    ladder = load_script("gpu_ladder")
    for sizes in ladder.SIZES.values():
        entries = ladder.entries(sizes)
        assert len({entry.name for entry in entries}) == len(entries)
        assert {"m1", "m2", "m3", "m4", "m5", "m6", "m7", "m7 GPTQ", "hf"} == {entry.arm for entry in entries}
        assert not any(entry.arm == "m1" and entry.mode == "batch" for entry in entries)


def test_ratios_are_those_of_the_same_shape_and_mode() -> None:
    ladder = load_script("gpu_ladder")
    rows = [
        {"shape": shape, "arm": arm, "mode": mode, "output_tok_per_s": speed}
        for shape, arm, mode, speed in (
            ("a", "m7", "single", 10.0),
            ("a", "m7 GPTQ", "single", 25.0),
            ("a", "hf", "single", 5.0),
            ("b", "m7", "single", 7.0),
        )
    ]
    ladder.add_ratios(rows)
    assert [(row.get("x_hf"), row.get("x_bf16")) for row in rows] == [
        (2.0, None),
        (5.0, 2.5),
        (1.0, None),
        (None, None),
    ]


def event(name: str, start: float, end: float, on_gpu: bool = True, parent: Any = None) -> Any:
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, time_range=span, device_type=device, cpu_parent=parent)


def test_what_a_step_waits_for_by_hand() -> None:
    """Two steps of 100 us with two overlapping kernels and a copy each: 30 + 10 us, and 55 us between the steps."""
    steps = load_script("gpu_steps")
    events = [event("cudaDeviceSynchronize", 500, 600, on_gpu=False)]  # the profiler's own, after the last step
    for start in (0, 100):
        events += [
            event("engine step", start, start + 95, on_gpu=False),
            event("engine step", start, start + 95),  # the profiler's copy on the GPU's line
            event("aten::mm", start + 1, start + 4, on_gpu=False),
            event("cudaStreamSynchronize", start + 60, start + 80, on_gpu=False),
            event("gemm", start + 20, start + 40),
            event("merge", start + 30, start + 50),
            event("Memcpy DtoH", start + 55, start + 65),
        ]
    assert steps.step_figures(events) == {
        "gpu_busy_ms": 0.04,
        "between_steps_ms": 0.055,
        "kernels": 2,
        "copies": 1,
        "waits": 1.0,
    }
    assert steps.longest(events, 2)[0] == {"kernel": "gemm", "per_step": 1.0, "us_per_step": 20.0}


def test_the_sanitizers_first_problem_is_the_cause() -> None:
    sanitizer = load_script("gpu_sanitizer")
    lines = ("COMPUTE-SANITIZER", "Invalid __global__ read of size 2 bytes", "ERROR SUMMARY: 1 error")
    text = "\n".join(f"========= {line}" for line in lines)
    assert sanitizer.first_problem(text) == "Invalid __global__ read of size 2 bytes"
    assert sanitizer.summary_of(text) == "ERROR SUMMARY: 1 error"


@pytest.mark.slow
def test_the_rehearsal_ends_well(tmp_path: Path) -> None:
    """The parts themselves, with tiny sizes and Triton's interpreter."""
    command = ["bash", str(SCRIPTS / "gpu_all.sh"), "--device", "cpu", "--out", str(tmp_path), "--minutes", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    rows = read(tmp_path, "summary")["results"]
    assert [row["status"] for row in rows] == ["done"] * 8
    assert read(tmp_path, "summary")["part_machine"]["results"]
    assert all(read(tmp_path, row["part"])["results"] for row in rows[1:])
    tiles = read(tmp_path, "tiles")
    assert len(tiles["choices"]) == 8 and not any("refused" in row for row in tiles["results"])
    errors = [row["error"] for row in read(tmp_path, "kernels")["results"]]
    assert len(errors) == 16 and all(float(error) < 1e-5 for error in errors)
