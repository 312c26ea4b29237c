"""The profile of a decode step: what each arm really runs, the arithmetic of the predictions, and the files.

Tiny random weights: what is tested must not depend on how fast this machine is today.
"""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from folovllm.benchmarks.arms import ArmTask
from folovllm.benchmarks.random_model import checkpoint_folder, write_checkpoint
from folovllm.benchmarks.runner import answer
from folovllm.csrc.build import load_ops
from folovllm.model_executor.cpu import huge_pages
from folovllm.model_executor.models.llama import LlamaDecoderLayer
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

step_profile = load_script("profile_step_arm")
FAMILIES, RUNGS, Job, by_family = step_profile.FAMILIES, step_profile.RUNGS, step_profile.Job, step_profile.by_family
PREDICTIONS, Sizes = (getattr(load_script("profile_step_predictions"), name) for name in ("PREDICTIONS", "Sizes"))

LAYERS, BATCH = 2, 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    write_checkpoint("tiny", checkpoint_folder("tiny", root))
    return root


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def job(number: int, weights: Path) -> Job:
    folder = str(checkpoint_folder("tiny", weights))
    sizes = {"max_model_len": 256, "kv_cache_memory": 2**20, "bandwidth_bytes": 2**20}
    task = ArmTask("", folder, 512, "A", None, (), "cpu", "bfloat16", 1, **sizes, shape="tiny")
    return Job(number, task, batches=(BATCH,), context=24, steps=4)


# --- the ladder


needs_fast_linears = pytest.mark.skipif(load_ops() is None, reason="this machine's linears are not ours")


@needs_fast_linears
@pytest.mark.parametrize("number", [rung.number for rung in RUNGS])
def test_an_arm_has_its_change_and_no_later_one(number, weights, monkeypatch):
    engines = []
    make_engine = step_profile.make_engine
    monkeypatch.setattr(step_profile, "make_engine", lambda task: engines.append(make_engine(task)) or engines[-1])
    figures = step_profile.measure_arm(job(number, weights))[str(BATCH)]
    runner = step_profile.runner_of(engines[0])
    layers = [module for module in runner.model.modules() if isinstance(module, LlamaDecoderLayer)]
    method = type(layers[0].mlp.gate_up_proj.quant_method).__name__

    assert runner.backend.name == ("torch_naive" if number < 4 else "cpu_paged")
    names = {1: "UnquantizedLinearMethod", 2: "OneDnnLinearMethod", 3: "CppLinearMethod", 4: "CppLinearMethod"}
    assert method == names.get(number, "CppGatedLinearMethod")
    assert (runner.model.model.decoder_stack is not None) == (number >= 6)
    assert runner.config.kernel_config.huge_pages == (number >= 7)

    families = figures["families"]
    assert families["layer"]["operators"] == (1 if number >= 6 else 0)
    assert families["linear"]["operators"] == (1 if number >= 6 else 1 + 4 * LAYERS), "the head is always one"
    assert (families["silu"]["operators"] > 0) == (number < 5)
    assert (families["attention"]["operators"] > 10 * LAYERS) == (number < 4), "naive goes request by request"
    assert families["sampler"]["calls"] == 1
    assert figures["step_ms"] > 0 and figures["execute_ms"] > 0 and figures["sample_ms"] > 0 and figures["rest_ms"] > 0


def test_every_arm_changes_one_thing_by_switches():
    """No arm needs a patch: what an arm runs is what its engine arguments say."""
    arms = [dict(setting.split("=") for setting in rung.engine.split("+")[1:]) for rung in RUNGS]
    changed = [{name for name in after if after[name] != before[name]} for before, after in pairwise(arms)]
    assert changed == [{"linear_backend"}, {"linear_backend", "fused_ops"}, {"attention_backend"}, {"fused_mlp"},
                       {"decoder_stack"}, {"huge_pages"}, set()]  # fmt: skip


def test_ordinary_pages():
    ordinary = huge_pages.huge_zeros((3, 2), torch.bfloat16, huge_pages=False)
    assert torch.equal(ordinary, torch.zeros(3, 2, dtype=torch.bfloat16))
    assert huge_pages.huge_zeros((0, 2), torch.float32, huge_pages=False).shape == (0, 2)


# --- families


def test_an_operator_belongs_to_the_innermost_span_and_hides_what_it_calls():
    def event(name, parent=None, us=0.0):
        return SimpleNamespace(name=name, cpu_parent=parent, cpu_time_total=us)

    layer = event("family:layer")
    linear = event("family:linear", layer)
    multiply = event("aten::linear", linear, 2000.0)
    events = [
        layer,
        linear,
        multiply,
        event("aten::mm", multiply, 1900.0),  # already in aten::linear
        event("aten::view", layer, 10.0),
        event("aten::embedding", None, 100.0),
        event("[memory]", None, 5.0),
    ]
    figures = by_family(events)
    assert figures["families"]["linear"] == {"ms": 2.0, "operators": 1, "calls": 1}
    assert figures["families"]["other"]["ms"] == pytest.approx(0.11)
    assert figures["families"]["layer"] == {"ms": 0.0, "operators": 0, "calls": 1}
    assert (figures["operators"], figures["operators_in_layers"]) == (3, 2)


# --- predictions, by hand

SIZES = Sizes(weight_bytes=2_000_000, num_weights=1_000_000, kv_bytes_per_token=1000, vocab_size=1000, context=100)


def figures(**families) -> dict:
    """A step of 20 ms, 2 of them Python between 100 operators; memory at 1 GB/s (huge pages: 2), 10 GFLOP/s."""
    nothing = {"ms": 0.0, "operators": 0, "calls": 0}
    return {
        "step_ms": 20.0,
        "python_ms": 2.0,
        "operators": 100,
        "operators_in_layers": 62,
        "families": {name: families.get(name, nothing) for name in FAMILIES},
        "bandwidth": {"ordinary": 1e9, "huge": 2e9},
        "flops": 10e9,
    }


BEFORE = figures(
    linear={"ms": 8.0, "operators": 9, "calls": 9},
    attention={"ms": 4.0, "operators": 40, "calls": 3},
    kv_write={"ms": 0.5, "operators": 4, "calls": 2},
    norm={"ms": 1.0, "operators": 20, "calls": 5},
    silu={"ms": 0.5, "operators": 5, "calls": 5},
    layer={"ms": 0.0, "operators": 0, "calls": 2},
)


@pytest.mark.parametrize(
    ("number", "batch", "expected"),
    [
        (2, 1, 20 - 8 + 2),  # 2 MB at 1 GB/s
        (2, 100, 20 - 8 + 20),  # 200 million operations at 10 GFLOP/s take longer than reading
        (3, 1, 20 - 8 + 2 - 0.75 - 2 * 15 / 100),  # norm: 5 operators of 20 stay
        (4, 10, 20 - 4 + 1 - 2 * (37 + 2) / 100),  # 10 x 100 x 1000 bytes are 1 MB
        (5, 1, 20 - 0.5 - 2 * 5 / 100),
        (6, 1, 20 - 2 * 61 / 100),
        (7, 1, 20 - (8 + 4) / 2),
        (8, 100, 20 + 3 * 0.4),  # 100 x 1000 logits are 0.4 MB
    ],
)
def test_predictions_by_hand(number, batch, expected):
    assert PREDICTIONS[number][0](BEFORE, figures(), SIZES, batch) == pytest.approx(expected)


# --- the whole run


def test_an_arm_in_a_process_of_its_own(weights):
    answer = load_script("profile_step").run_job(job(1, weights), timeout=100)
    assert answer["ok"], answer
    assert answer["batches"][str(BATCH)]["families"]["linear"]["ms"] > 0


def test_an_arm_that_fails_there_says_why(weights, tmp_path):
    (tmp_path / "job").write_text(replace(job(1, weights), context=10_000).to_json())
    assert answer(tmp_path / "job", tmp_path / "result", step_profile.do_job) == 1
    result = json.loads((tmp_path / "result").read_text())
    assert not result["ok"] and "ValueError" in result["error"]


def test_a_run_of_two_arms(weights, tmp_path, monkeypatch, capsys):
    profile = load_script("profile_step")
    monkeypatch.setattr(profile, "run_job", lambda job, timeout: {"ok": True, "batches": step_profile.measure_arm(job)})
    in_cache = lambda shape: checkpoint_folder(shape, weights)  # noqa: E731
    monkeypatch.setattr("folovllm.benchmarks.command.checkpoint_folder", in_cache)
    files = ["--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    small = ["--random-weights", "tiny", "--threads", "1", "--kv-cache-memory", "4MiB", "--bandwidth-memory", "1MiB"]
    which = ["--arms", "1,2", "--batches", "1,2", "--steps", "2", "--context", "16", "--repeats", "1"]
    assert profile.main([*small, *which, *files]) == 0
    result = json.loads((tmp_path / "p.json").read_text())
    assert [(row["arm"][0], row["requests"]) for row in result["results"]] == [("1", 1), ("2", 1), ("1", 2), ("2", 2)]
    assert [row["predicted_gain"] == "-" for row in result["results"]] == [True, False, True, False]
    assert str(tmp_path) not in result["command"] and (tmp_path / "p.png").stat().st_size > 0
    assert "One decode step of 2" in capsys.readouterr().out
    table = load_script("fill_results").plain_table(result, "p.json", {"requests": "2"})
    assert "times in microseconds" in table and table.count("\n| 2 +") == 1, "a page can show it"


def test_a_failed_arm_is_told(weights, monkeypatch, capsys):
    profile = load_script("profile_step")
    monkeypatch.setattr("folovllm.benchmarks.command.checkpoint_folder", lambda s: checkpoint_folder(s, weights))
    monkeypatch.setattr(profile, "run_job", lambda job, timeout: {"ok": False, "error": "it rained"})
    assert profile.main(["--random-weights", "tiny", "--arms", "1"]) == 1
    assert "it rained" in capsys.readouterr().out


@pytest.mark.parametrize("arms", ["9", "2,1", "1,1"])
def test_arms_that_are_none(arms):
    with pytest.raises(SystemExit):
        load_script("profile_step").main(["--arms", arms])


def test_a_page_chooses_rows_and_columns_of_a_result() -> None:
    result = {
        "command": "scripts/dev/profile_step.py",
        "unit": "microseconds",
        "machine": {"cpu": "CPU", "cores": 2, "git": {"sha": "0123456789ab"}},
        "results": [
            {"arm": "1", "requests": 1, "step": 30.5, "read_GB/s": None},
            {"arm": "2", "requests": 1, "step": 24.25, "read_GB/s": 9.0},
            {"arm": "3", "requests": 1, "step": 16.0, "read_GB/s": 11.0},
        ],
    }
    fill_results = load_script("fill_results")
    table = fill_results.plain_table(result, "p.json", {"arm": "1,3", "columns": "read_GB/s,arm"})
    assert table.splitlines()[2:] == ["| read GB/s | arm |", "|--:|--:|", "| - | 1 |", "| 11 | 3 |"]
    five = fill_results.plain_table(result | {"digits": 4, "unit": "logits"}, "p.json", {"arm": "2", "columns": "step"})
    assert five.splitlines()[-1] == "| 24.25 |" and "times in" not in five
