"""Choosing a token budget: the SLO's arithmetic, which tasks run, and the files.

The measuring itself is the benchmark's. The figures are invented: what is tested must not depend on how
fast this machine is today.
"""

import json

import pytest

from folovllm.benchmarks.metrics import ArmRuns
from tests.script_loader import load_script

pytestmark = pytest.mark.m5

UNDISTURBED_MS = 10.0
# budget -> (ITL p99 of the decoding requests, TTFT of the long prompts, total tokens per second)
INVENTED = {64: (20.0, 9000.0, 800.0), 256: (70.0, 5000.0, 1000.0), 1024: (300.0, 4000.0, 1050.0)}


@pytest.fixture(scope="module")
def tune():
    return load_script("tune_chunk_size")


@pytest.fixture
def run(tune, tiny_model_dir, tmp_path, monkeypatch, capsys):
    """run(*argv) -> (exit status, result, printed text), with invented figures instead of processes."""
    import dataclasses

    from folovllm import hf_config

    load = hf_config.load_hf_config
    long_enough = lambda folder: dataclasses.replace(load(folder), max_position_embeddings=8192)  # noqa: E731
    monkeypatch.setattr("folovllm.benchmarks.command.load_hf_config", long_enough)
    seen = []

    def invent(tasks, repeats, timeout):
        seen.extend(tasks)
        return {task.name: ArmRuns([answer(task)] * repeats) for task in tasks}

    monkeypatch.setattr(tune, "run_rounds", invent)

    def run_with(*argv):
        model = str(tiny_model_dir("llama"))
        command = ["--model", model, "--output", str(tmp_path), "--budgets", "64,256,1024", *argv]
        status = tune.main(command)
        files = list(tmp_path.glob("*.json"))
        return status, json.loads(files[0].read_text()) if files else None, capsys.readouterr(), seen

    return run_with


def answer(task):
    """What the process of `task` would write."""
    if task.arm == "bandwidth":
        return {"device": {"gpu": "none"}}
    itl, ttft, speed = INVENTED.get(int(task.arm.partition("=")[2] or 0), (12.0, 0.0, 500.0))
    groups = {
        "decoding": {"itl_ms": {"p50": UNDISTURBED_MS, "p99": itl}, "ttft_ms": {"p50": 1.0}},
        "long": {"itl_ms": {"p50": 1.0, "p99": 1.0}, "ttft_ms": {"p50": ttft}},
    }
    mode = {"output_tok_per_s": speed, "total_tok_per_s": speed, "groups": groups, "tokens": [[1]], "kv_series": []}
    empty = {"settings": {}, "kv_cache": {}, "load": {}, "memory": {}, "sweep": []}
    return {**empty, "modes": {"batch": mode}}


def test_of_the_budgets_that_keep_the_slo_the_fastest_for_long_prompts(tune):
    points = [tune.Point(budget, 1.0, *figures) for budget, figures in INVENTED.items()]
    assert tune.pick(points, 100.0).budget == 256
    assert tune.pick(points, 70.0).budget == 256, "at most: the limit itself is kept"
    assert tune.pick(points, 69.9).budget == 64
    assert tune.pick(points, 5.0) is None


def test_slo_in_milliseconds(run):
    status, result, printed, _ = run("--slo-itl-ms", "400")
    assert status == 0 and result["picked_budget"] == 1024
    assert result["slo_times_undisturbed"] == pytest.approx(40.0)
    assert "max_num_batched_tokens=1024" in printed.out


def test_slo_in_multiples_of_the_undisturbed_itl(run, tune, tmp_path):
    status, result, printed, tasks = run("--slo-itl-times", "3")
    assert status == 0 and result["slo_itl_ms"] == 3 * UNDISTURBED_MS and result["picked_budget"] == 64
    picture = next(tmp_path.glob("*.png"))
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    picture.unlink()
    assert tune.main(["--plot-only", str(picture.with_suffix(".json"))]) == 0 and picture.read_bytes() == drawn
    assert result["machine"]["cpu"] and result["machine"]["gpu"] == "none" and result["run"]["workload"]["sha256"]
    assert [point["budget"] for point in result["results"]] == [64, 256, 1024]
    alone = next(task for task in tasks if task.name == "undisturbed")
    assert {request.group for request in alone.make_workload().requests} == {"decoding"}
    assert [task.arm for task in tasks][2:] == ["m5+budget=64", "m5+budget=256", "m5+budget=1024"]
    assert "TTFT long ms" in printed.out


def test_no_budget_keeps_an_impossible_slo(run):
    status, result, printed, _ = run("--slo-itl-ms", "1")
    assert status == 0 and result["picked_budget"] is None
    assert "no budget keeps" in printed.out and "20.0 ms at 64" in printed.out


def test_a_budget_that_the_decoding_requests_use_up_is_refused(tune, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--budgets", "8,64"])
    assert "more than 8" in capsys.readouterr().err


def test_an_unknown_option_is_refused_by_the_benchmark(tune, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--budget", "64"])
    assert "--budget" in capsys.readouterr().err
