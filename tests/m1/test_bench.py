"""The benchmark: figures by hand, the requests it promises, and one small run from arguments to files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from folovllm.benchmarks.arms import RequestTiming, StepSample, in_words
from folovllm.benchmarks.command import main
from folovllm.benchmarks.hf_arm import static_batch_samples
from folovllm.benchmarks.metrics import (
    decode_bytes_per_second,
    equality_row,
    first_differences,
    kv_figures,
    kv_series,
    latency_summary,
    median_of,
    percentile,
    speed_figures,
)
from folovllm.benchmarks.options import byte_size, parse_options
from folovllm.benchmarks.workloads import BenchRequest, make_workload

pytestmark = pytest.mark.m1

WORKLOAD_A = "5fd8687aa9ea45578c2157c2524b820ba2c3bc618374ed3b74d607be251095dc"


def test_workload_a_is_always_the_same_32_requests():
    workload = make_workload("A", vocab_size=49_152)
    assert workload.digest() == WORKLOAD_A
    assert len(workload.requests) == 32 and len(workload.for_mode("single")) == 8
    assert sum(len(r.prompt_token_ids) for r in workload.requests) == 4_972
    assert sum(r.output_len for r in workload.requests) == 2_283


def test_a_shorter_workload_is_a_prefix():
    assert make_workload("A", 49_152, count=5).requests == make_workload("A", 49_152).requests[:5]


def test_a_small_vocabulary_is_respected():
    ids = [i for r in make_workload("smoke", vocab_size=120).requests for i in r.prompt_token_ids]
    assert min(ids) >= 100 and max(ids) < 120
    with pytest.raises(ValueError, match="vocabulary has 100 tokens"):
        make_workload("smoke", vocab_size=100)


@pytest.mark.parametrize(("q", "value"), [(0, 1), (50, 2.5), (100, 4), (99, 3.97)])
def test_percentile(q, value):
    assert percentile([4, 1, 3, 2], q) == pytest.approx(value)


def test_nothing_has_no_percentile():
    assert percentile([], 50) is None and latency_summary([]) == {"mean": None, "p50": None, "p99": None}


def test_speed_by_hand():
    timings = [RequestTiming(10, 3, 0.5, [0.1, 0.3]), RequestTiming(20, 1, 1.0, [])]
    figures = speed_figures(timings, seconds=2.0)
    assert figures["output_tok_per_s"] == 2.0 and figures["total_tok_per_s"] == 17.0
    assert figures["ttft_ms"]["mean"] == pytest.approx(750)
    assert figures["tpot_ms"]["p50"] == pytest.approx(200), "a single token has no time per output token"
    assert figures["itl_ms"]["p50"] == pytest.approx(200) and figures["itl_ms"]["p99"] == pytest.approx(298)


def test_bytes_per_second_by_hand():
    # A prompt of 10 and 3 out: two decode steps read the weights, and K/V of 11 and 12 tokens.
    timing = RequestTiming(10, 3, 0.5, [0.2, 0.3])
    assert decode_bytes_per_second([timing], weight_bytes=1000, kv_bytes_per_token=10) == pytest.approx(2230 / 0.5)
    assert decode_bytes_per_second([RequestTiming(10, 1, 0.5, [])], 1000, 10) is None


def test_kv_figures_by_hand():
    samples = [StepSample(0.1, 2, 10, 40), StepSample(0.2, 2, 30, 40), StepSample(0.3, 1, 0, 0)]
    figures = kv_figures(samples, kv_bytes_per_token=8)
    assert figures["kv_utilisation"] == 0.5, "the last step left nobody: it does not count"
    assert figures["max_running"] == 2 and figures["kv_reserved_bytes_peak"] == 320
    assert len(kv_series([StepSample(i, 1, 1, 1) for i in range(1000)])) == 200


def test_a_static_batch_wastes_padding_and_finished_rows():
    requests = [BenchRequest([1, 2], 1), BenchRequest([1, 2, 3], 3)]
    samples = static_batch_samples(requests, [0.1, 0.2, 0.3])
    assert [(s.num_used_slots, s.num_reserved_slots) for s in samples] == [(3, 6), (4, 8), (0, 0)]


def test_medians_leaf_by_leaf():
    runs = [
        {"a": 1, "b": {"c": 9.0, "name": "x"}},
        {"a": 5, "b": {"c": 1.0, "name": "x"}},
        {"a": 2, "b": {"c": 3.0, "name": "x"}},
    ]
    assert median_of(runs) == {"a": 2, "b": {"c": 3.0, "name": "x"}}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m7-m6", "m7 without m6"),
        ("m7-m6-m5+budget=256", "m7 without m6 and m5+budget=256"),
        ("FoloVLLM m7-m6", "FoloVLLM m7 without m6"),
        ("m6-m6 batch", "m6 without m6 batch"),
        ("m5", "m5"),
        ("hf single", "hf single"),
        ("nothing (m5)", "nothing (m5)"),
    ],
)
def test_arms_are_shown_in_words(name, words):
    assert in_words(name) == words


def test_first_differences():
    assert first_differences([[1, 2], [3], [4, 5]], [[1, 5], [3], [4]]) == {0: 1, 2: 1}
    assert equality_row("m1", [[1]], "hf", [[2]], must_be_equal=True)["ok"] is False
    assert equality_row("m1", [[1]], "hf", [[2]], must_be_equal=False)["ok"] is True


@pytest.mark.parametrize(("text", "value"), [("1GiB", 2**30), ("64MiB", 2**26), ("1000", 1000)])
def test_sizes(text, value):
    assert byte_size(text) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--milestones", "m99"], "m99"),
        (["--milestones", "m1,m1"], "m1"),
        (["--workload", "B"], "B"),
        (["--repeats", "0"], "repeats"),
        (["--kv-cache-memory", "much"], "much"),
    ],
)
def test_wrong_arguments_are_named(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_from_arguments_to_files(tiny_model_dir, tmp_path, capsys):
    model = str(tiny_model_dir("llama"))
    argv = ["--model", model, "--milestones", "m1,m3", "--workload", "smoke", "--num-requests", "2", "--repeats", "1"]
    argv += ["--dtype", "float32", "--max-model-len", "64", "--kv-cache-memory", "1MiB", "--threads", "1"]
    assert main([*argv, "--output", str(tmp_path)]) == 0

    result = json.loads(next(tmp_path.glob("compare_perf_smoke_cpu_*.json")).read_text())
    assert result["ok"] and list(result["arms"]) == ["hf", "m1", "m3"] and result["reference"] == "hf"
    assert result["machine"]["cpu"] and result["machine"]["torch"]
    assert model not in json.dumps(result), "no folder of this machine in the evidence"
    for arm in result["arms"].values():
        batch = arm["modes"]["batch"]
        assert batch["output_tok_per_s"] > 0 and batch["ttft_ms"]["p50"] > 0 and batch["kv_utilisation"] > 0
    assert all(row["num_equal"] == row["num_requests"] for row in result["equality"])
    assert {row["tokens_of"] for row in result["equality"]} >= {"m1 single", "m1 batch", "m3 single", "m3 batch"}
    pictures = {path: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(pictures) == 3 and all(content.startswith(b"\x89PNG") for content in pictures.values())
    assert "m3" in capsys.readouterr().out

    for path in pictures:
        path.unlink()
    (json_file,) = tmp_path.glob("*.json")
    assert main(["--plot-only", str(json_file)]) == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("*.png")} == pictures, "drawn again without measuring"


def test_only_a_result_of_this_script_is_drawn_again(tmp_path, capsys):
    for content, words in (('{"schema": "folovllm.compare_peers/1"}', "folovllm.compare_peers/1"), ("[]", "None")):
        (tmp_path / "other.json").write_text(content)
        assert main(["--plot-only", str(tmp_path / "other.json")]) == 2
        assert words in capsys.readouterr().err
    assert main(["--plot-only", str(tmp_path / "absent.json")]) == 2 and "absent.json" in capsys.readouterr().err


def test_a_failing_arm_keeps_the_others(tiny_model_dir, tmp_path, capsys):
    argv = ["--model", str(tiny_model_dir("llama")), "--milestones", "m2", "--baseline", "none", "--workload", "smoke"]
    argv += ["--num-requests", "1", "--repeats", "1", "--dtype", "float32", "--max-model-len", "64"]
    assert main([*argv, "--kv-cache-memory", "100", "--output", str(tmp_path)]) == 1
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert not result["ok"] and "the KV cache is too small" in result["arms"]["m2"]["error"]


def test_figures_in_pages_are_those_of_the_result_files():
    script = Path(__file__).parents[2] / "scripts" / "dev" / "fill_results.py"
    check = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout + check.stderr
