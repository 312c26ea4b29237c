"""The benchmark's workloads of M5 and M6, random weights, ablation, and that no child outlives its parent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from folovllm import milestones
from folovllm.benchmarks import random_model
from folovllm.benchmarks.arms import ArmTask, EngineArm, RequestTiming, ablation_arms, default_arms, parse_arm
from folovllm.benchmarks.command import main
from folovllm.benchmarks.metrics import ablation_rows, group_figures
from folovllm.benchmarks.options import parse_options
from folovllm.benchmarks.plot import draw_groups, hit_rate_curves
from folovllm.benchmarks.report import group_rows, make_table, name_arms, page_rows
from folovllm.benchmarks.runner import run_child, run_one_by_one
from folovllm.benchmarks.workloads import WORKLOADS, BenchRequest, Feed, make_workload
from folovllm.hf_config import parse_hf_config
from folovllm.model_shapes import SHAPES, shape_architecture, shape_config
from tests.script_loader import load_script

pytestmark = pytest.mark.m5

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
PUBLIC = {
    "smollm2-135m": "SmolLM2-135M-Instruct",
    "smollm2-360m": "SmolLM2-360M",
    "smollm2-1.7b": "SmolLM2-1.7B",
    "qwen2.5-0.5b": "Qwen2.5-0.5B-Instruct",
    "qwen3-0.6b": "Qwen3-0.6B",
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "mistral-7b-v0.3": "Mistral-7B-v0.3",
}
FACTS = ("dtype", "bos_token_id", "eos_token_ids", "model_type")  # not part of a shape


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A checkpoint of the tiny shape, written once."""
    folder = random_model.checkpoint_folder("tiny", tmp_path_factory.mktemp("cache"))
    random_model.write_checkpoint("tiny", folder)
    return folder


@pytest.fixture
def arm(tiny_folder):
    """An engine on it, whose cache holds a few requests."""
    return EngineArm(task_for(tiny_folder))


def task_for(folder, arm="m5+budget=64", max_model_len=512):
    sizes = {"max_model_len": max_model_len, "kv_cache_memory": 4 * 2**20}
    return ArmTask(arm, str(folder), 512, "smoke", None, ("batch",), "cpu", "float32", threads=1, **sizes)


# ---- requests: when and after whom


def test_a_turn_waits_for_the_answer_before_it():
    feed = Feed([BenchRequest([5, 6], 1), BenchRequest([7], 1, follows=0), BenchRequest([8], 1, follows=1)])
    assert feed.due() == [0] and feed.due() == []
    feed.answered(0, [9])
    assert feed.due() == [1] and feed.complete(1).prompt_token_ids == [5, 6, 9, 7]
    feed.answered(1, [4])
    assert feed.due() == [2] and feed.prompt(2) == [5, 6, 9, 7, 4, 8]


def test_an_arrival_waits_for_its_moment_or_for_nobody():
    feed = Feed([BenchRequest([1], 9), BenchRequest([2], 1, arrival=3), BenchRequest([3], 1, arrival=5)])
    assert feed.due(0, idle=True) == [0], "at the start everybody is idle, and that is not the end of the wait"
    assert feed.waits_for_arrivals and feed.steady() == [0]
    assert feed.due(2.9) == [] and feed.due(3.0) == [1]
    assert feed.due(4, idle=True) == [2], "nobody runs who could bring the moment nearer"
    assert not feed.waits_for_arrivals


def test_arrivals_come_at_the_same_token_for_every_engine(arm):
    requests = [BenchRequest(list(range(100, 110)), 24, "decoding") for _ in range(2)]
    requests.append(BenchRequest(list(range(200, 400)), 2, "long", arrival=10))
    run = arm.run(requests)
    first_wide = next(i for i, sample in enumerate(run.samples) if sample.num_running == 3)
    assert first_wide == 10, "ten steps gave both of them ten tokens; it joins the eleventh"
    assert run.timings[2].time_to_first_token < run.seconds / 2, "its wait counts from its arrival"
    assert [len(tokens) for tokens in run.tokens] == [24, 24, 2]


def test_a_conversation_goes_on_with_the_engines_own_answers(arm):
    first, later = BenchRequest(list(range(100, 120)), 4), BenchRequest([300, 301], 4, follows=0)
    together = arm.run([first, later])
    whole = BenchRequest([*first.prompt_token_ids, *together.tokens[0], 300, 301], 4)
    assert arm.run([whole]).tokens[0] == together.tokens[1]
    assert together.timings[1].prompt_len == 26
    assert run_one_by_one(arm, [first, later]).tokens == together.tokens


def test_huggingface_takes_turns_but_no_arrivals(tiny_folder, arm):
    from folovllm.benchmarks.hf_arm import HFArm

    hf = HFArm(task_for(tiny_folder, "hf"))
    firsts = [BenchRequest(list(range(100 + i, 110 + 3 * i)), 5) for i in range(2)]
    requests = [*firsts, *(BenchRequest([400 + i], 6, follows=i) for i in range(2))]
    assert hf.run(requests).tokens == arm.run(requests).tokens, "the same random weights in both"
    with pytest.raises(ValueError, match="--baseline none"):
        hf.run([BenchRequest([100], 2), BenchRequest([101], 2, arrival=1)])


def test_a_checkpoints_own_generation_settings_do_not_reach_the_baseline(tiny_folder, arm, tmp_path):
    """Qwen2.5's generation_config.json asks for a repetition penalty, which would change greedy tokens."""
    from folovllm.benchmarks.hf_arm import HFArm

    folder = shutil.copytree(tiny_folder, tmp_path / "penalised")
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 10.0}))
    requests = [BenchRequest(list(range(100, 110)), 8)]
    assert HFArm(task_for(folder, "hf")).run(requests).tokens == arm.run(requests).tokens


# ---- the workloads


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_the_same_every_time(name):
    one, two = (make_workload(name, vocab_size=49_152) for _ in range(2))
    assert one.digest() == two.digest()
    assert make_workload(name, 49_152, count=9).requests[:9] == make_workload(name, 49_152, count=10).requests[:9]


def test_long_prompts_arrive_while_the_others_decode():
    workload = make_workload("long-prompts", 49_152)
    steady, late = workload.requests[:8], workload.requests[8:]
    assert {r.group for r in steady} == {"decoding"} and [len(r.prompt_token_ids) for r in late] == [4000] * 4
    assert [r.arrival for r in late] == [32, 96, 160, 224]
    assert max(r.arrival + r.output_len for r in late) < min(r.output_len for r in steady)
    more = make_workload("long-prompts", 49_152, count=20).requests
    assert more[-1].arrival + more[-1].output_len < more[0].output_len, "they outlast more arrivals too"


def test_shared_prefixes_are_shared_by_that_share():
    workload = make_workload("shared-prefix", 49_152, count=3, hit_rates=(0, 95))
    assert [r.group for r in workload.requests] == ["0% cold", *["0% warm"] * 2, "95% cold", *["95% warm"] * 2]
    assert {len(r.prompt_token_ids) for r in workload.requests} == {1500}
    none, most = workload.requests[:3], workload.requests[3:]
    assert len(common([r.prompt_token_ids for r in most])) == 1425 and not common([r.prompt_token_ids for r in none])
    assert len(workload.for_mode("single")) == 6, "all of them, one by one"


def test_few_shot_and_multi_turn():
    few = make_workload("few-shot", 49_152)
    assert len(common([r.prompt_token_ids for r in few.requests])) == 1024
    talk = make_workload("multi-turn", 49_152)
    assert [r.follows for r in talk.requests[7:10]] == [None, 0, 1] and talk.requests[-1].group == "turn 4"
    first, second = talk.requests[0], talk.requests[8]
    assert talk.prompt_lens[8] == len(first.prompt_token_ids) + first.output_len + len(second.prompt_token_ids)


def common(lists):
    """What all of them begin with."""
    same = [len(set(tokens)) == 1 for tokens in zip(*lists, strict=False)]
    return lists[0][: same.index(False)]


def test_group_figures_by_hand():
    timings = [
        RequestTiming(10, 3, 0.5, [0.1, 0.3], num_cached_tokens=8),
        RequestTiming(30, 1, 1.0, []),
        RequestTiming(5, 1, 1.0, []),
    ]
    groups = group_figures(["a", "a", ""], timings)
    assert list(groups) == ["a"] and groups["a"]["cached_share"] == pytest.approx(0.2)
    assert groups["a"]["ttft_ms"]["p50"] == pytest.approx(750) and groups["a"]["itl_ms"]["p50"] == pytest.approx(200)
    assert groups["a"]["gaps"] == [[0.6, 100.0], [0.9, 300.0]]


def test_hit_rate_curves():
    ttft = {"25% warm": 7.0, "0% cold": 9.0, "0% warm": 8.0}
    groups = {name: {"ttft_ms": {"p50": value}} for name, value in ttft.items()}
    assert hit_rate_curves(groups) == {"cold": [(0, 9.0)], "warm": [(0, 8.0), (25, 7.0)]}


# ---- shapes and random weights


@pytest.mark.parametrize("name", PUBLIC)
def test_shapes_are_those_of_the_public_configs(name):
    ours = vars(shape_architecture(name))
    theirs = vars(parse_hf_config(json.loads((CONFIGS / f"{PUBLIC[name]}.json").read_text())))
    assert {k: v for k, v in ours.items() if k not in FACTS} == {k: v for k, v in theirs.items() if k not in FACTS}


def test_parameters_of_shapes_without_a_config_here():
    billions = {name: round(shape_architecture(name).num_parameters() / 1e9, 2) for name in SHAPES}
    assert billions["qwen3-8b"] == 8.19 and billions["qwen3-4b"] == 4.02 and billions["qwen3-1.7b"] == 1.72
    assert billions["llama-3.2-3b"] == 3.21 and billions["llama-3.1-70b"] == 70.55


def test_an_unknown_shape_names_the_nearest(capsys):
    with pytest.raises(ValueError, match="did you mean 'qwen3-8b'"):
        shape_config("Qwen/Qwen3-8B-Base")
    with pytest.raises(SystemExit):
        parse_options(["--random-weights", "qwen3-0.6"])
    assert "did you mean 'qwen3-0.6b'" in capsys.readouterr().err


def test_random_tensors_depend_on_name_and_nothing_else():
    one, two = (random_model.random_tensor("model.layers.0.mlp.up_proj.weight", (64, 256)) for _ in range(2))
    assert one.equal(two) and not one.equal(random_model.random_tensor("x.weight", (64, 256)))
    assert one.float().std() == pytest.approx(1 / 16, rel=0.05)
    assert random_model.random_tensor("model.norm.weight", (8,)).tolist() == [1.0] * 8


@pytest.mark.parametrize("family", ["qwen3-0.6b", "qwen2.5-0.5b", "mistral-7b-v0.3"])
def test_checkpoints_have_every_tensor(family, tmp_path, monkeypatch):
    import torch

    from folovllm.model_executor.model_loader import load_model

    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 128, "head_dim": 8}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setitem(SHAPES, "small", SHAPES[family] | small)
    folder = random_model.checkpoint_folder("small", tmp_path)
    random_model.write_checkpoint("small", folder)
    model = load_model(folder, shape_architecture("small"), torch.float32, torch.device("cpu"))  # refuses any gap
    assert model.compute_logits(torch.ones(1, 32)).isfinite().all()


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    folder = random_model.checkpoint_folder("qwen3-8b", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**30})())
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 2**40})())
    with pytest.raises(ValueError, match=r"15\.3 GiB in bfloat16, 1\.0 GiB"):
        random_model.check_room("qwen3-8b", folder, "cpu", "bfloat16")
    random_model.check_room("qwen3-8b", folder, "cuda", "bfloat16")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 2**20})())
    with pytest.raises(ValueError, match="the disk"):
        random_model.check_room("qwen3-8b", folder, "cuda", "bfloat16")


# ---- arms and options


def test_arms_with_rungs_off_and_arguments():
    assert parse_arm("m3-m2") == ("m3", ("m2",), {})
    assert parse_arm("m5+budget=256+attention_backend=torch_flash")[2] == {
        "max_num_batched_tokens": 256,
        "attention_backend": "torch_flash",
    }
    with pytest.raises(ValueError, match="max_num_seqs"):
        parse_arm("m5+max_num_seq=3")
    with pytest.raises(ValueError, match="name=value"):
        parse_arm("m5+256")


def test_ablation_takes_each_rung_off_alone():
    assert ablation_arms("m4") == ["m4", "m4-m2", "m4-m3", "m4-m4"]
    assert ablation_arms()[0] == milestones.top_rung().id
    assert parse_options(["--ablate", "--milestones", "m3"]).arms == ("m3", "m3-m2", "m3-m3")


def test_ablation_worth_by_hand():
    arms = {
        "m3": {"modes": {"batch": speed(300)}},
        "m3-m2": {"modes": {"batch": speed(100)}},
        "m3-m3": {"ok": False},
    }
    rows = ablation_rows(arms, list(arms))
    assert [(row["off"], row["worth"]) for row in rows] == [(None, None), ("m2", 3.0)]


def speed(tokens_per_second):
    latency = {"p50": 1.0, "p99": 2.0}
    return {"output_tok_per_s": tokens_per_second, "ttft_ms": latency, "itl_ms": latency}


def test_defaults_follow_the_workload():
    options = parse_options(["--workload", "long-prompts"])
    assert options.baseline is None and options.max_model_len == 4096 and options.arms == ("m4", "m5")
    assert parse_options([]).baseline == "hf" and parse_options([]).max_model_len == 2048
    assert set(default_arms("shared-prefix")) <= {"m5", "m6"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workload", "long-prompts", "--baseline", "hf"], "takes no arrivals"),
        (["--workload", "long-prompts", "--batch-sizes", "2"], "use A"),
        (["--hit-rates", "50"], "shared-prefix"),
        (["--workload", "shared-prefix", "--hit-rates", "100"], "0 to 99"),
        (["--random-weights", "tiny", "--model", "smollm2-135m"], "one of the two"),
        (["--ablate", "--milestones", "m2,m3"], "one whole milestone"),
        (["--milestones", "m3+block=16"], "block_size"),
    ],
)
def test_wrong_arguments_say_what_to_change(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_options(argv)
    assert message in capsys.readouterr().err


# ---- children


def is_alive(pid):
    """Running, and not a zombie whose parent has not read its exit status."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


GRANDCHILD = """
import subprocess, sys, time
sleeper = subprocess.Popen(["sleep", "60"])
open(sys.argv[1], "w").write(str(sleeper.pid))
time.sleep(60)
"""
PARENT = """
import sys
from folovllm.benchmarks.runner import run_child
run_child([sys.executable, "-c", sys.argv[1], sys.argv[2]], 60)
"""


def test_a_timeout_ends_the_child_and_what_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(TimeoutError):
        run_child([sys.executable, "-c", GRANDCHILD, str(pid_file)], timeout=3)
    wait_until(lambda: not is_alive(int(pid_file.read_text())))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_child_and_what_it_started(number, tmp_path):
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, GRANDCHILD, str(pid_file)], stderr=subprocess.DEVNULL)
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    parent.send_signal(number)
    assert parent.wait(30) != 0
    wait_until(lambda: not is_alive(int(pid_file.read_text())))


def test_even_a_killed_parent_takes_its_child_along(tmp_path):
    """Nothing can be caught there: the child's guard sees its stdin close."""
    script = "import os, sys, time;open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, script, str(pid_file)])
    wait_until(lambda: pid_file.exists() and pid_file.read_text())
    parent.kill()
    parent.wait(30)
    wait_until(lambda: not is_alive(int(pid_file.read_text())))
    assert os.getpid() != int(pid_file.read_text())


# ---- from arguments to files


def test_random_weights_ablated_from_arguments_to_files(tmp_path, monkeypatch, tiny_folder):
    monkeypatch.setattr(random_model, "default_download_dir", lambda: tiny_folder.parents[1])
    argv = ["--random-weights", "tiny", "--workload", "multi-turn", "--num-requests", "9", "--ablate"]
    argv += ["--milestones", "m2", "--baseline", "none", "--repeats", "1", "--dtype", "float32", "--threads", "1"]
    argv += ["--kv-cache-memory", "64MiB", "--bandwidth-memory", "1MiB", "--output", str(tmp_path)]
    assert main(argv) == 0
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert result["run"]["model"] == "tiny (random weights)" and list(result["arms"]) == ["m2", "m2-m2"]
    assert [row["off"] for row in result["ablation"]] == [None, "m2"] * 2, "in each of the two modes"
    assert [row["switched off"] for row in result["results"]][:2] == ["nothing (m2)", "m2 Continuous batching"]
    groups = result["arms"]["m2"]["modes"]["warm"]["groups"]
    assert list(groups) == ["turn 1", "turn 2"] and groups["turn 2"]["num_requests"] == 1
    assert {path.stem.rpartition("_")[2] for path in tmp_path.glob("*.png")} >= {"groups", "ablation"}


@pytest.mark.parametrize("workload", ["long-prompts", "shared-prefix", "few-shot"])
def test_every_workload_has_its_picture(workload, tmp_path):
    """Drawn from invented figures: a picture must not need a measurement to be tested."""
    groups = {request.group for request in make_workload(workload, 512, count=9).requests}
    latency = {"p50": 2.0, "p99": 5.0}
    one = {"num_requests": 1, "prompt_tokens": 9, "cached_share": 0.5, "ttft_ms": latency, "itl_ms": latency}
    figures = {**speed(10.0), "total_tok_per_s": 20.0}
    figures["groups"] = {name: one | {"gaps": [[0.1, 3.0], [0.2, 4.0]]} for name in groups}
    arms = {"m5-m3": {"modes": {"batch": figures}}}
    result = {"run": {"workload": {"name": workload}}, "arms": arms, "fit": {}, "equality": [], "reference": "m5-m3"}
    shown = name_arms(result)
    draw_groups(shown, {"m5 without m3": "red"}).savefig(tmp_path / "picture.png")
    assert make_table("", group_rows(shown)).row_count == len(groups)
    row = page_rows(result)[0]
    assert row["arm"] == "m5 without m3"
    assert row["TTFT p50"] == "2.0" and row["ITL p99"] == "5.0" and row["from cache"] == "50%", "text, for a page"


# ---- the cost of prefix caching


@pytest.mark.m6
def test_prefix_cost_by_hand_and_on_a_small_core(tmp_path, capsys):
    cost = load_script("bench_prefix_cost")
    by_hand = cost.result_of(cost.OFF, 100, on=(3e-6, 5e-6, 1e-6), off=(1e-6, 2e-6, 1e-6))
    assert by_hand.add_ns == pytest.approx(20) and by_hand.schedule_ns == pytest.approx(30)
    assert by_hand.cost_ns == pytest.approx(50) and by_hand.off_ns == pytest.approx(40)
    files = ["--json", str(tmp_path / "cost.json"), "--plot", str(tmp_path / "cost.png")]
    assert cost.main(["--lengths", "40,64", "--prompts", "3", *files]) == 0
    rows = json.loads((tmp_path / "cost.json").read_text())["results"]
    assert {row["prompt_len"] for row in rows} == {40, 64} and {row["variant"] for row in rows} >= {"trie"}
    assert (tmp_path / "cost.png").stat().st_size > 0 and "ns per prompt token" in capsys.readouterr().out
    core = cost.Core(cost.variants()[0], 64)
    core.serve(list(range(64)))
    core.serve(list(range(100, 164)))
    assert core.core.stats().num_steps == 2
    with pytest.raises(AssertionError, match="of its own"):
        core.serve(list(range(64)))  # seen before: a hit, whose cost is not what is measured


# ---- the prefix cache between modes


@pytest.mark.m6
def test_only_warm_finds_what_cold_left(tiny_folder):
    arm = EngineArm(task_for(tiny_folder, "m6"))
    requests = [BenchRequest(list(range(100, 140)), 3), BenchRequest(list(range(200, 240)), 3)]

    def cached():
        return [timing.num_cached_tokens for timing in arm.run(requests).timings]

    assert cached() == [0, 0] and cached() == [32, 32], "two whole blocks of 16; the third is not full"
    arm.forget()
    assert cached() == [0, 0]
