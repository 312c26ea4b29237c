"""compare_peers without a peer: pairs, medians, installs that fail, processes that die, and a fake peer all the way."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from folovllm import milestones
from folovllm.benchmarks.arms import ArmTask
from folovllm.benchmarks.runner import run_child
from folovllm.benchmarks.workloads import BenchRequest, Workload
from scripts.peers import catalog, comparison, environment, report, weights
from scripts.peers.bench import Bench
from scripts.peers.catalog import OURS, Environment, Peer, PeerError
from scripts.peers.command import main, measure_all
from scripts.peers.comparison import OursFailedError, PairRuns, plan_pairs, run_pairs
from scripts.peers.options import ours, parse_options
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

ROOT = Path(__file__).parents[2]
FAKE_PEER = """
    import sys
    sys.path.insert(0, {adapters!r})
    from peer_process import Engine, main

    def load(imported, task):
        def generate(requests):
            return [[7] * (count - {short}) for _, count in requests]
        return Engine(generate, "1.2", {{"threads": task["threads"], **task["options"]}})

    sys.exit(main(lambda task: None, load))
"""


def fake_peer(folder: Path, name: str = "fake", short: int = 0, **changes) -> Peer:
    """A peer that answers at once: always token 7, and `short` tokens too few."""
    adapter = folder / f"{name}.py"
    adapter.write_text(textwrap.dedent(FAKE_PEER).format(adapters=str(catalog.ADAPTERS), short=short))
    return Peer(name, name.title(), catalog.FOLDER, "answers at once", adapter=adapter, **changes)


def result(single: float, batch: float, token: int = 1) -> dict:
    figures = {"single": single, "batch": batch}
    modes = {mode: {"output_tok_per_s": speed, "tokens": [[token], [5]]} for mode, speed in figures.items()}
    modes["single"]["decode_bytes_per_second"] = 1e9
    return {"load": {"import_seconds": 1.0, "load_seconds": single}, "modes": modes, "version": "1"}


# --- pairs


def test_pairs_swap_their_order_in_every_second_repeat():
    order = [pair.order for pair in plan_pairs(["a", "b"], repeats=3)]
    assert order == [(OURS, "a"), (OURS, "b"), ("a", OURS), ("b", OURS), (OURS, "a"), (OURS, "b")]


def test_a_peer_that_failed_is_not_tried_again_and_keeps_its_complete_pairs():
    calls = []

    def measure(name: str) -> dict:
        calls.append(name)
        if name == "a" and calls.count("a") == 2:
            raise PeerError("fell over")
        return result(1, 1)

    runs: dict[str, PairRuns] = {}
    run_pairs(plan_pairs(["a", "b"], repeats=3), measure, runs)
    assert (len(runs["a"].results), runs["a"].error) == (1, "fell over")
    assert (len(runs["b"].results), runs["b"].error) == (3, None)
    assert calls == [OURS, "a", OURS, "b", "a", "b", OURS, OURS, "b"]


def test_an_interrupt_or_a_failure_of_ours_keeps_the_complete_pairs():
    for error, why in ((PeerError("out of memory"), "our own engine failed"), (KeyboardInterrupt(), "interrupted")):
        runs = {"a": PairRuns(), "b": PairRuns()}
        measure_all(FailingBench(error), runs, repeats=3)
        assert [len(runs[name].results) for name in "ab"] == [1, 0]
        assert all(run.error.startswith(why) for run in runs.values())


class FailingBench:
    """Everybody answers; the third call, which is ours with b, raises."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def measure_bandwidth(self) -> dict:
        return {"bandwidth": {"bytes_per_second": 1e9}}

    def measure(self, name: str) -> dict:
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return result(1, 1)


def test_without_ours_there_is_no_comparison():
    def measure(name: str) -> dict:
        raise PeerError("no engine")

    with pytest.raises(OursFailedError, match="no engine"):
        run_pairs(plan_pairs(["a"], 1), measure, {})


# --- figures


def three_pairs() -> PairRuns:
    """Ratios of the single stream 2, 3 and 1 (median 2), although the medians 40 and 30 would give 1.33."""
    mine, theirs = [(40, 100), (90, 200), (30, 300)], [(20, 50), (30, 50), (30, 200)]
    pairs = zip(mine, theirs, strict=True)
    return PairRuns([{OURS: result(*a), "a": result(*b, token=2)} for a, b in pairs])


def test_the_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians():
    single = comparison.summarise_peer(three_pairs(), "a", ["single", "batch"])["modes"]["single"]
    assert single["output_tok_per_s"] == {"median": 30, "min": 20, "max": 30, "repeats": [20, 30, 30]}
    assert single["ratio"] == {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": [2.0, 3.0, 1.0]}
    assert single["same_first_token"] == "1/2"


def test_ours_is_the_median_over_the_pairs_with_everybody():
    runs = {"a": three_pairs(), "b": PairRuns([{OURS: result(50, 1), "b": result(1, 1)}]), "c": PairRuns(error="no")}
    found = comparison.summarise_ours(runs, ["single"])
    assert found["modes"]["single"]["output_tok_per_s"]["repeats"] == [40, 90, 30, 50]
    assert found["num_pairs"] == 4 and found["load"]["load_seconds"] == 45
    assert not comparison.summarise_ours({"c": PairRuns(error="no")}, ["single"])["ok"]


def test_share_of_the_floor_by_hand():
    # 10 GB/s over 100 MB per token: 100 tokens a second. Ours reaches 45 of them, and reads 1 GB/s when it decodes.
    ours_arm = comparison.summarise_ours({"a": PairRuns([{OURS: result(45, 1), "a": result(1, 1)}])}, ["single"])
    arms = {OURS: ours_arm | {"fewer_bits": False}, "q4": result(1, 1) | {"fewer_bits": True}}
    floor = comparison.add_floor(arms, {"bytes_per_second": 10e9}, weight_bytes=100_000_000)
    assert floor["floor_tok_per_s"] == 100
    assert arms[OURS]["modes"]["single"]["floor_share"] == 0.45
    assert arms[OURS]["modes"]["single"]["bandwidth_share"] == pytest.approx(0.1)
    assert "floor_share" not in arms["q4"]["modes"]["single"], "4-bit weights have another floor"


# --- command line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "lama.cpp"], "did you mean 'llamacpp'?"),
        (["--peers", "hf,hf"], "twice"),
        (["--repeats", "0"], "at least 1"),
        (["--modes", "both"], "unknown mode 'both'"),
        (["--preset", "m99"], "m99"),
        (["--gguf", "nowhere.gguf"], "no such file"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_model_without_gguf_is_refused_for_peers_that_read_gguf(tmp_path):
    model, peer = weights.Model("org/name", tmp_path, "bfloat16"), catalog.PEERS["llamacpp"]
    with pytest.raises(PeerError, match="pass --gguf FILE"):
        weights.find_weights(catalog.Q4_1, model, peer, tmp_path, print)
    assert weights.find_weights(catalog.FOLDER, model, peer, tmp_path, print) == tmp_path


@pytest.mark.parametrize("rung", [r.id for r in milestones.engine_rungs()])
def test_ours_never_caches_prefixes(rung):
    """The batch repeats the prompts of the single stream; the peers do not cache either."""
    preset, *without = ours(rung).split("-")
    assert preset == rung and not milestones.fold(preset, without)["enable_prefix_caching"]


def test_the_list_shows_every_peer(tmp_path, capsys):
    assert main(["--list", "--peers-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in catalog.PEERS) and "not installed" in out


# --- environments


def broken(**changes) -> Environment:
    """An environment whose one requirement is no package: pip fails at once, without a network."""
    return Environment("broken", ("./no-such-package",), probe="import json", about="fails", **changes)


def test_without_a_compiler_nothing_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PeerError, match="no C\\+\\+ compiler"):
        environment.ensure_environment(broken(needs_compiler=True), tmp_path, lambda text: None)
    assert not (tmp_path / "broken").exists()


def hand_made(root: Path, works: bool) -> Path:
    """A folder that looks like an environment; its python is a script that logs its calls."""
    python = root / "broken" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {0 if works else 1}\n")
    python.chmod(0o755)
    return python


def test_an_environment_that_works_is_taken_over(tmp_path):
    python, said = hand_made(tmp_path, works=True), []
    environment.ensure_environment(broken(), tmp_path, said.append)
    assert python.exists() and "taking over" in said[0]
    environment.ensure_environment(broken(), tmp_path, said.append)
    assert len(said) == 1, "marked now: nothing to say or do"


def test_an_interrupted_install_is_done_again_and_a_failing_one_shows_the_end_of_pips_log(tmp_path):
    python = hand_made(tmp_path, works=False)
    with pytest.raises(PeerError, match=r"(?s)pip install ./no-such-package failed.*no-such-package"):
        environment.ensure_environment(broken(), tmp_path, lambda text: None)
    assert not python.read_bytes().startswith(b"#!/bin/sh"), "it got as far as pip, in a new environment"
    assert environment.state_of(broken(), tmp_path) == "not marked as complete"


def test_other_requirements_than_the_marked_ones_mean_a_new_install(tmp_path, monkeypatch):
    hand_made(tmp_path, works=True)
    environment.ensure_environment(broken(), tmp_path, lambda text: None)
    installed = []
    monkeypatch.setattr(environment, "_install", lambda env, *rest: installed.append(env.requirements))
    environment.ensure_environment(broken(), tmp_path, lambda text: None)
    assert installed == []
    changed = Environment("broken", ("./another",), probe="import json", about="fails")
    environment.ensure_environment(changed, tmp_path, lambda text: None)
    assert installed == [("./another",)]


def test_an_environment_gets_only_the_requirements_that_are_new(tmp_path, monkeypatch):
    """llama.cpp got the packages of its server. To compile it again for them would take 6 minutes."""
    hand_made(tmp_path, works=True)
    environment.ensure_environment(broken(), tmp_path, lambda text: None)
    commands: list[list[str]] = []
    monkeypatch.setattr(environment, "_run", lambda command, *rest: commands.append(command))
    extended = Environment("broken", (*broken().requirements, "./another"), probe="import json", about="fails")
    assert environment.state_of(extended, tmp_path) == "not marked as complete"
    environment.ensure_environment(extended, tmp_path, lambda text: None)
    assert [command[-2:] for command in commands] == [["install", "./another"]]
    assert environment.state_of(extended, tmp_path) == "ready"


def test_what_breaks_the_import_is_removed_before_the_probe(tmp_path, monkeypatch):
    """PyPI's torchvision does not load beside torch's CPU build ("operator torchvision::nms does not exist")."""
    commands: list[str] = []
    monkeypatch.setattr(environment, "_run", lambda command, env, log, what: commands.append(what))
    monkeypatch.setattr(environment, "_works", lambda *_: "pip uninstall" in commands)
    (tmp_path / "broken").mkdir()
    monkeypatch.setattr(environment.shutil, "rmtree", lambda *_, **__: None)
    environment.ensure_environment(broken(unwanted=("torchvision",)), tmp_path, lambda text: None)
    assert commands == ["python -m venv", "pip install ./no-such-package", "pip uninstall"]


# --- processes

SLEEPERS = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', {mark!r}])"


def with_mark(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if mark in " ".join(process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_timeout_ends_the_whole_group(tmp_path):
    mark = f"peers-timeout-{os.getpid()}"
    with pytest.raises(TimeoutError, match="longer than 1 s"):
        run_child([sys.executable, "-c", SLEEPERS.format(mark=mark)], 1, tmp_path / "log")
    assert wait_until(lambda: not with_mark(mark))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_parent_leaves_no_child(tmp_path, number):
    mark = f"peers-kill-{number}-{os.getpid()}"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps([sys.executable, "-c", SLEEPERS.format(mark=mark)]), tmp_path / "log"]
    )
    assert wait_until(lambda: len(with_mark(mark)) >= 4), "parent, guard, child and its child"
    parent.send_signal(number)
    assert parent.wait(20) != 0
    assert wait_until(lambda: not with_mark(mark))


PARENT = """
import json, sys
from pathlib import Path
from folovllm.benchmarks.runner import run_child
run_child(json.loads(sys.argv[1]), 600, Path(sys.argv[2]))
"""


def test_status_and_log_of_a_command(tmp_path):
    log = tmp_path / "log"
    assert run_child([sys.executable, "-c", "print('said'); raise SystemExit(3)"], 60, log) == 3
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], 60, log) == 137
    assert log.read_text() == "said\n"


# --- all of it


def small(model: Path, folder: Path, *more: str) -> list[str]:
    argv = ["--model", str(model), "--workload", "smoke", "--num-requests", "2", "--repeats", "1", "--threads", "1"]
    argv += ["--dtype", "float32", "--max-model-len", "64", "--kv-cache-memory", "1MiB", "--bandwidth-memory", "1MiB"]
    return [*argv, "--peers-dir", str(folder / "peers"), "--output", str(folder / "out"), *more]


def test_from_arguments_to_files(tiny_model_dir, tmp_path, monkeypatch, capsys):
    """Ours beside a fake peer and one that cannot be installed: one run, the other one not lost."""
    model = tiny_model_dir("llama")
    with_absent(monkeypatch, fake_peer(tmp_path, options={"speed": "infinite"}), tmp_path)
    assert main(small(model, tmp_path, "--peers", "fake,absent")) == 1

    json_path = next((tmp_path / "out").glob("compare_peers_smoke_cpu_*.json"))
    found = json.loads(json_path.read_text())
    assert str(model) not in json_path.read_text(), "no folder of this machine in the evidence"
    assert found["schema"] == "folovllm.compare_peers/1" and not found["ok"]
    assert list(found["arms"]) == [OURS, "fake", "absent"]
    assert "no C++ compiler" in found["arms"]["absent"]["error"]
    fake = found["arms"]["fake"]
    assert fake["ok"] and fake["version"] == "1.2" and fake["settings"] == {"threads": 1, "speed": "infinite"}
    for mode in ("single", "batch"):
        mine, theirs = (found["arms"][name]["modes"][mode]["output_tok_per_s"]["repeats"] for name in (OURS, "fake"))
        assert fake["modes"][mode]["ratio"]["median"] == pytest.approx(mine[0] / theirs[0])
    assert found["bandwidth"]["floor_tok_per_s"] > 0 and found["machine"]["cpu"] and found["run"]["workload"]["sha256"]
    assert found["arms"][OURS]["modes"]["single"]["floor_share"] > 0

    picture = json_path.with_suffix(".png")
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    picture.unlink()
    assert main(["--peers", "fake", "--plot-only", str(json_path)]) == 0
    assert picture.read_bytes() == drawn, "drawn again without measuring"
    markdown = next((tmp_path / "out").glob("*.md")).read_text()
    assert "| Fake | float32 |" in markdown and "absent failed" in markdown
    captured = capsys.readouterr()
    assert "Fake" in captured.out and "[2/2] fake: single" in captured.err and "absent FAILED" in captured.err
    check_page(json_path, tmp_path)


def with_absent(monkeypatch, peer: Peer, folder: Path) -> None:
    """The catalogue is `peer` and one that cannot be installed."""
    absent = fake_peer(folder, "absent", environment=broken(needs_compiler=True))
    monkeypatch.setattr(catalog, "PEERS", {peer.name: peer, "absent": absent})
    monkeypatch.setattr(environment, "COMPILERS", ("no-such-compiler",))


def check_page(json_path: Path, folder: Path) -> None:
    """fill_results puts the same table into a page."""
    fill_results = load_script("fill_results")
    page = f"<!-- results: {json_path} -->\nold\n<!-- /results -->\n"
    filled = fill_results.fill(page, folder)
    assert "| Fake | float32 |" in filled and "old" not in filled and fill_results.fill(filled, folder) == filled


def test_setup_only_measures_nothing(tiny_model_dir, tmp_path, monkeypatch, capsys):
    with_absent(monkeypatch, fake_peer(tmp_path), tmp_path)
    argv = small(tiny_model_dir("llama"), tmp_path, "--setup-only", "--peers")
    assert main([*argv, "fake"]) == 0 and main([*argv, "fake,absent"]) == 1
    assert not (tmp_path / "out").exists() and "failed: absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("short=1", r"single: 3 tokens in 1 requests instead of 4"),
        ("lost", r"NameError: name(?s:.*)Traceback"),
        ("died", r"ended with status 3 and left no result(?s:.*)last words"),
    ],
)
def test_what_a_peer_can_do_wrong(tmp_path, change, message):
    peer = fake_peer(tmp_path, short=int(change == "short=1"))
    if change == "lost":
        peer.adapter.write_text(peer.adapter.read_text().replace("Engine(generate", "lost(generate"))
    if change == "died":
        peer.adapter.write_text("print('last words'); raise SystemExit(3)")
    workload = Workload("test", [BenchRequest([1, 2], 4)])
    task = ArmTask("m1", "", 100, "A", 1, ("single", "batch"), "cpu", "float32", 1, 64, 2**30)
    bench = Bench(task, workload, {"fake": peer}, {"fake": tmp_path}, tmp_path, timeout=60)
    with pytest.raises(PeerError, match=message):
        bench.measure("fake")


def test_spread_is_shown_only_where_there_is_one():
    assert report._spread(comparison.spread([1.0]), "{:.2f}", "x") == "1.00x"
    assert report._spread(comparison.spread([1.0, 3.0, 2.0]), "{:.0f}") == "2 (1-3)"
