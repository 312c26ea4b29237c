"""scripts/dev/measure_gptq.py: one command from the model to the tables, on a tiny model (milestone M7)."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from scripts import eval_ppl
from scripts.dev import measure_gptq
from scripts.dev.fill_results import fill
from tests.m7.quant_helpers import make_quantizable

pytestmark = pytest.mark.m7


@pytest.mark.parametrize(
    "perplexity,words",
    [
        ({"gptq4": 11.0, "rtn4": 12.0, "gptq3": 12.0, "rtn3": 14.0}, ["holds", "holds"]),
        ({"gptq4": 11.4, "rtn4": 12.0, "gptq3": 12.1, "rtn3": 14.0}, ["FAILS", "FAILS"]),
        ({"gptq4": 9.9, "rtn4": 12.0}, ["FAILS"]),  # below the plain model: something else was measured
        ({"gptq4": 11.0, "theirs4": 10.9}, ["holds"]),
        ({"gptq4": 11.0, "theirs4": 10.8}, ["FAILS"]),
        ({}, []),
    ],
)
def test_verdict(perplexity: dict[str, float], words: list[str]) -> None:
    lines = measure_gptq.verdict({"plain": 10.0, **perplexity}, "plain")
    assert [line.partition(":")[0] for line in lines] == words


def test_time_line() -> None:
    log = {"seconds": 599.6, "threads": 2, "peak_memory_bytes": 2**30}
    assert measure_gptq.time_line(log) == "holds: GPTQ-4 in 600 s with 2 threads, at most 600; 1024 MiB at most"
    assert measure_gptq.time_line(log | {"seconds": 601.0}).startswith("FAILS")


def test_errors_row() -> None:
    def entry(linear: str, error: float) -> dict[str, Any]:
        return {"linear": linear, "error": error, "rtn_error": 4e-3, "seconds": 1.5}

    linears = [entry("self_attn.o_proj", 1e-3), entry("self_attn.o_proj", 5e-3), entry("mlp.down_proj", 0.0)]
    row = measure_gptq.errors_row("gptq3", "o_proj", linears)
    assert row == {
        "bits": 3, "linear": "o_proj", "number": 2, "GPTQ_error": "3.00e-03", "RTN_error": "4.00e-03",
        "ratio": "0.75", "worse_than_RTN": 1, "seconds": 3.0,
    }  # fmt: skip
    assert measure_gptq.errors_row("gptq3", "all", linears)["number"] == 3


def run_here(command: list[str]) -> None:
    """Instead of a process each, which takes seconds to import torch."""
    if command[0] == "-m":
        result = CliRunner().invoke(app, command[2:])
        assert result.exit_code == 0, result.output
    else:
        assert Path(command[0]).is_file()
        eval_ppl.main(command[1:])


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two checkpoints, three perplexities, three tables and a plot; a second run makes none of it again."""
    # Groups of 64, the default, must divide.
    model = make_quantizable("Llama", tmp_path / "model", hidden_size=128, intermediate_size=128)
    results = tmp_path / "results"
    monkeypatch.setattr(measure_gptq, "run", run_here)
    arguments = [str(tmp_path / "work"), "--model", str(model), "--arms", "gptq4,rtn4", "--results", str(results),
                 "--samples", "4", "--seq-len", "32", "--max-tokens", "60", "--threads", "1"]  # fmt: skip
    assert measure_gptq.main(arguments) == 0
    assert "GPTQ-4 rises by" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    rows = json.loads((results / "eval_ppl.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["model", "model", "gptq4", "gptq4", "rtn4"]
    assert measure_gptq.main(arguments) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert json.loads((results / "eval_ppl.json").read_text())["rows"] == rows
    names = ("quantize.json", "quantize_time.json", "eval_ppl.json")
    assert {path.name for path in results.iterdir()} == {*names, "quantize.png"}
    for name in names:
        assert str(tmp_path) not in (results / name).read_text()
        page = fill(f"<!-- results: {results / name} -->\n<!-- /results -->", results)
        assert page.count("\n| ") > 3, page
    # The time again, without touching what was measured of the first checkpoint.
    assert measure_gptq.main([*arguments, "--time"]) == 0
    assert (
        made.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}.items()
    )
    log = json.loads((tmp_path / "work" / measure_gptq.TIMED / "quantize_log.json").read_text())
    assert json.loads((results / "quantize_time.json").read_text())["seconds"] == log["seconds"]
