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

from folovllm.config import EngineConfig
from folovllm.engine.start_core import resolve_config
from folovllm.model_shapes import shape_architecture
from tests.fake_gpu import pretend_cuda
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
    "crashing": """
import os, signal
if "--resume" not in sys.argv:
    save(cases=["a"], running="b", not_run={"c": "not begun"})
    os.kill(os.getpid(), signal.SIGABRT)
old = json.loads((out / f"{name}.json").read_text())
save(cases=[*old["cases"], "c"], running=None, errors=old["errors"])
sys.exit(1)
""",
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


def test_a_case_that_kills_its_process_is_named_and_the_next_one_runs(
    driver: Any, make_part: MakePart, tmp_path: Path
) -> None:
    (crashing,) = driver.run_parts([make_part("crashing")], "cpu", tmp_path, 600, {})
    assert (crashing.status, crashing.note) == ("failed", "b: ended by signal 6")
    content = read(tmp_path, "crashing")
    assert content["cases"] == ["a", "b", "c"] and content["errors"] == {"b": "ended by signal 6"}


def test_a_case_that_hangs_is_named(driver: Any, make_part: MakePart, tmp_path: Path) -> None:
    part = make_part("hanging")
    (tmp_path / "hanging.py").write_text(SAVE + "save(cases=[], running='a'); time.sleep(600)")
    (hanging,) = driver.run_parts([part], "cpu", tmp_path, 6, {})
    assert hanging.note == "ran out of its 6 s and was ended, in a"
    assert read(tmp_path, "hanging")["errors"] == {"a": "hung"}


def test_a_full_disk_stops_no_part(
    driver: Any, make_part: MakePart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_once, full = driver.run_once, OSError(28, "No space left on device")

    def run(part: Any, *args: Any) -> Any:
        if part.name == "bad":
            raise full
        return run_once(part, *args)

    monkeypatch.setattr(driver, "run_once", run)
    bad, good = driver.run_parts([make_part("bad"), make_part("good")], "cpu", tmp_path, 600, {})
    assert (bad.status, good.status) == ("failed", "done") and "No space left" in bad.note


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


@pytest.mark.parametrize("device, num_lines", [("auto", 1), ("cuda", 1), ("cpu", 0)])
def test_an_engine_on_a_gpu_says_that_it_is_untried(
    device: str, num_lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a machine with a GPU, `make demo` takes it. The line names the path that is tested."""
    pretend_cuda(monkeypatch)
    config = EngineConfig.from_args(model="tiny", device=device, dtype="float32")
    resolve_config(config, shape_architecture("tiny"))
    lines = [record.message for record in caplog.records if "--device cpu" in record.message]
    assert len(lines) == num_lines


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


def test_another_run_keeps_the_other_parts(
    driver: Any, make_part: MakePart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part is run again, and the rest of the table stays, unless it is a rehearsal's."""
    moved = make_part("late", in_summary=True)
    monkeypatch.setattr(driver, "all_parts", lambda device: [make_part("good"), make_part("broken"), moved])
    monkeypatch.setattr(driver, "why_not", lambda device: None)
    arguments = ["--device", "cpu", "--out", str(tmp_path)]
    assert driver.main(arguments) == 1
    assert driver.main([*arguments, "--parts", "good"]) == 0
    summary = read(tmp_path, "summary")
    statuses = [(row["part"], row["status"]) for row in summary["results"]]
    assert statuses == [("broken", "failed"), ("late", "done"), ("good", "done")]
    assert "Traceback" in summary["logs"]["broken"] and summary["part_late"]["results"] == [1]
    assert summary["command"] == f"scripts/gpu_all.sh --device cpu --out {tmp_path.name} --parts good"
    assert driver.main(["--device", "cuda", "--out", str(tmp_path), "--parts", "good"]) == 0
    assert [row["part"] for row in read(tmp_path, "summary")["results"]] == ["good"]


def test_a_rehearsal_overwrites_no_results(driver: Any) -> None:
    """And both folders are those of the checkout, wherever the shell is."""
    folders = [driver.parse_args(["--device", device]).out for device in ("cuda", "cpu")]
    assert folders == [SCRIPTS.parent / "bench_results" / name for name in ("gpu", "gpu_rehearsal")]


def test_help_has_the_parts(driver: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        driver.parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"{part.name} " in text for part in driver.all_parts("cuda")) and "exit status" in text


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
    assert seen[0]["running"] == "c"
    content = read(tmp_path, "part")
    assert content["errors"] == {"b": "ValueError: wrong shape"}
    assert "in fail" in content["tracebacks"]["b"] and "second line" in content["tracebacks"]["b"]
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


def test_an_nvidia_smi_that_fails_or_hangs_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, smi = load_script("gpu_result"), tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(tools, "SMI_SECONDS", 0.5)
    for body, expected in (
        ("echo '1980 MHz, 0 %'", [{"clocks.sm": "1980 MHz", "utilization.gpu": "0 %"}]),
        ("exit 2", []),
        ("exec sleep 60", []),
    ):
        smi.write_text(f"#!/bin/sh\n{body}\n")
        smi.chmod(0o755)
        assert tools.nvidia_smi("clocks.sm", "utilization.gpu") == expected


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


def test_a_file_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    """The tests of the other files run."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_broken.py").write_text("import a_package_that_is_not_here  # pytest.mark.gpu")
    status, content = run_tests(tmp_path)
    assert status == 1 and len(content["cases"]) == 3
    assert "a_package_that_is_not_here" in content["errors"]["tests/test_broken.py"]


def run_tests(tmp_path: Path, *arguments: str) -> tuple[int, Any]:
    """gpu_tests.py on SOME_TESTS."""
    (tmp_path / "tests").mkdir(exist_ok=True)
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
    assert "def test_first" in content["tracebacks"]["tests/test_some.py::test_first[2]"]
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


def test_on_24_gb_every_arm_has_room() -> None:
    """23.5 GiB are free on an RTX 4090. GPTQ weights of Qwen3-8B fit into 12 GB, bf16 weights do not fit into 16."""
    ladder = load_script("gpu_ladder")
    sizes = ladder.SIZES["cuda"]

    def room(entry: Any, free: float) -> int:
        return int(ladder.free_kv_bytes(entry, sizes, int(free * ladder.GIB)))

    entries = ladder.entries(sizes)
    needed = {shape: ladder.batch_kv_bytes(shape, sizes) for shape in (sizes.small, sizes.large)}
    assert all(room(entry, 23.5) >= needed[entry.shape] for entry in entries)
    gptq = next(entry for entry in entries if entry.arm == ladder.GPTQ)
    assert room(gptq, 11.5) >= needed[gptq.shape] == 32 * 256 * 36 * 2 * 8 * 128 * 2
    with pytest.raises(MemoryError, match=r"15\.3 GiB of weights, 2\.0 for activations and 1\.1 for K and V"):
        room(ladder.Entry(sizes.large, ladder.TOP, "single"), 15.5)


def test_later_parts_read_the_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From summary.json, unless another machine wrote it."""
    machine, options = load_script("gpu_machine"), options_of(tmp_path)
    monkeypatch.setattr(machine, "matmul_rate", lambda device: 2e12)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: 3e9)
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 4e9)
    assert machine.measured_hardware(options).source == "measured by this part"
    ceilings = (machine.COPY, machine.READ, machine.PRODUCT)
    cases = [case for case in machine.cases(options) if case.name in ceilings]
    result = machine.Result("machine", "", options, ())

    def run(cases: list[Any]) -> None:
        """And move the result, as gpu_all.py does."""
        result.run(cases)
        (tmp_path / "summary.json").write_text(json.dumps({"part_machine": read(tmp_path, "machine")}))

    run(cases[:2])
    assert machine.measured_hardware(options).source == "measured by this part"  # one is missing
    run(cases)
    monkeypatch.setattr(machine, "matmul_rate", fail)
    hardware = machine.measured_hardware(options)
    assert (hardware.flops, hardware.bandwidth, hardware.source) == (2e12, 4e9, "summary.json")
    monkeypatch.setattr(machine, "describe_device", lambda device: {"gpu": "another"})
    assert machine.saved_rates(options) == {}


def test_too_many_requests_for_the_cache_are_no_endless_loop() -> None:
    aborted: list[str] = []
    steps = load_script("gpu_steps")
    engine = SimpleNamespace(
        add_request=lambda *args: None,
        step=lambda: None,
        stats=lambda: SimpleNamespace(num_running=2),
        abort_request=aborted.extend,
    )
    with pytest.raises(MemoryError, match="too small for 3"), steps.decoding_requests(engine, 3, 10):
        pass
    assert len(aborted) == 3


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
        {"shape": shape, "arm": arm, "mode": mode, "requests": requests, "output_tok_per_s": speed}
        for shape, arm, mode, requests, speed in (
            ("a", "m7", "single", 1, 10.0),
            ("a", "m7 GPTQ", "single", 1, 25.0),
            ("a", "hf", "single", 1, 5.0),
            ("b", "m7", "nano", 256, 7.0),
            ("b", "hf", "nano", 64, 2.0),
        )
    ]
    ladder.add_ratios(rows)
    assert [(row.get("x_hf"), row.get("x_bf16")) for row in rows] == [
        (2.0, None),
        (5.0, 2.5),
        (1.0, None),
        (None, None),
        (1.0, None),
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
    assert sanitizer.first_problem("qwen3-8b write 1: ours_us 1, error 1e-3") == ""


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
