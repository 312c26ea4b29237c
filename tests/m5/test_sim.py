"""The simulator: its arithmetic by hand, the ladder's effects, its error against the measured CPU, and its command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from folovllm.model_shapes import shape_architecture
from folovllm.sim.cost import CALIBRATIONS, Calibration, CostModel, StepCost
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.metrics import SLO, Served, make_metrics
from folovllm.sim.simulate import simulate
from folovllm.sim.workloads import SIM_WORKLOADS, SimRequest, SimWorkload, make_sim_workload
from folovllm.trace.lint import lint
from folovllm.trace.record import read_trace
from tests.script_loader import load_script

pytestmark = pytest.mark.m5

PAGE = Path(__file__).parents[2] / "docs/learn/simulator.md"
IDEAL = Calibration(1.0, 0.0, "by hand")


def one_by_one(*lengths: tuple[int, int]) -> SimWorkload:
    return SimWorkload("test", [SimRequest(0.0, list(range(100, 100 + n)), out) for n, out in lengths])


# ---- the cost of a step


def test_a_decode_reads_the_weights_and_the_cache() -> None:
    arch, h100 = shape_architecture("qwen3-8b"), HARDWARE["h100"]
    cost = CostModel(arch, h100, IDEAL).step([(1_000, 1)], 1)
    assert cost.bytes == 2 * arch.num_parameters() + 1_001 * 2 * 36 * 8 * 128 * 2
    assert (cost.seconds, cost.bound) == (cost.bytes / h100.bandwidth, "memory")


def test_a_prompt_is_computed() -> None:
    """Two FLOPs per weight and token, the head once, and 4 per pair of query and key."""
    arch, h100 = shape_architecture("qwen3-8b"), HARDWARE["h100"]
    cost = CostModel(arch, h100, IDEAL).step([(0, 2_000)], 1)
    head = 151_936 * 4_096
    weights = arch.num_parameters() - 2 * head  # not tied: embeddings and head
    assert cost.flops == 2 * weights * 2_000 + 2 * head + 4 * 36 * 32 * 128 * (2_000 * 2_001 // 2)
    assert (cost.seconds, cost.bound) == (cost.flops / h100.flops, "compute")


def test_chunks_of_a_prompt_are_the_same_work() -> None:
    model = CostModel(shape_architecture("qwen3-0.6b"), HARDWARE["l4"], IDEAL)
    whole = model.step([(0, 1_000)], 0)
    parts = [model.step([(start, 250)], 0) for start in range(0, 1_000, 250)]
    assert sum(part.flops for part in parts) == whole.flops and sum(part.bytes for part in parts) > whole.bytes


def test_calibration_bits_and_gpus() -> None:
    arch, gpu = shape_architecture("qwen3-8b"), HARDWARE["a100"]
    work = [(0, 500)]
    ideal = CostModel(arch, gpu, IDEAL).step(work, 1)
    slow = CostModel(arch, gpu, Calibration(0.5, 0.003, "by hand")).step(work, 1)
    assert slow.seconds == pytest.approx(2 * ideal.compute + 0.003)
    assert CostModel(arch, gpu, IDEAL, num_gpus=2).step(work, 1).compute == ideal.compute / 2
    assert CostModel(arch, gpu, IDEAL, weight_bits=4).weight_bytes == CostModel(arch, gpu, IDEAL).weight_bytes / 4


# ---- a whole run


def test_a_single_request_takes_the_sum_of_its_steps() -> None:
    metrics = simulate(one_by_one((100, 3)), "qwen3-0.6b", "h100")
    model = CostModel(shape_architecture("qwen3-0.6b"), HARDWARE["h100"], Calibration(0.7, 0.002, ""))
    costs = [model.step([(0, 100)], 1), model.step([(100, 1)], 1), model.step([(101, 1)], 1)]
    assert metrics["seconds"] == pytest.approx(sum(cost.seconds for cost in costs))
    assert metrics["ttft_ms"]["p50"] == pytest.approx(1e3 * costs[0].seconds)
    assert metrics["num_steps"] == 3 and metrics["output_tokens"] == 3


def test_the_same_seed_is_the_same_run_and_another_one_is_not() -> None:
    runs = [simulate(make_sim_workload("chat", 12, seed=seed), "qwen3-0.6b") for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_figures_by_hand() -> None:
    served = [Served(0.0, 10, [0.5, 0.6, 0.7]), Served(1.0, 10, [3.0, 3.5])]
    costs = [
        StepCost(0, 0, compute=0.3, memory=0.1, overhead=0.1),
        StepCost(0, 0, compute=0.0, memory=0.5, overhead=0.1),
    ]
    metrics = make_metrics(served, costs, [(0.5, 1.0), (1.0, 0.5)], SLO(ttft=1.0, itl=0.2), preemptions=4)
    assert (metrics["seconds"], metrics["output_tok_per_s"], metrics["total_tok_per_s"]) == (3.5, 5 / 3.5, 25 / 3.5)
    assert metrics["ttft_ms"]["p50"] == 1250.0 and metrics["e2e_ms"]["p50"] == 1600.0
    assert metrics["good_share"] == 0.5 and metrics["goodput"] == 1 / 3.5, "the second one came after 2 s"
    assert served[1].is_good(SLO(2.0, 0.5)) and not served[1].is_good(SLO(2.0, 0.4))
    assert (metrics["kv_held_mean"], metrics["kv_held_peak"], metrics["kv_filled"]) == (0.75, 1.0, 0.75)
    assert metrics["bound_share"] == pytest.approx(
        {"compute": 0.4, "memory": 0.6, "communication": 0.0, "overhead": 0.0}
    )
    assert metrics["preemptions"] == 4


def test_turns_follow_each_other_and_hit_what_was_said() -> None:
    workload = make_sim_workload("chat", 8, seed=3)
    metrics = simulate(workload, "qwen3-0.6b", preset="m6")
    assert metrics["num_requests"] == 8 and metrics["prefix_hit_share"] > 0.5
    assert simulate(workload, "qwen3-0.6b", preset="m5")["prefix_hit_share"] == 0.0


def test_each_rung_does_what_it_is_for() -> None:
    """Directions only: batching for throughput, pages for memory, chunks for stalls, the prefix cache for TTFT."""
    offline = make_sim_workload("offline", 24)
    assert simulate(offline, preset="m2")["output_tok_per_s"] > 5 * simulate(offline, preset="m1")["output_tok_per_s"]
    pressure = make_sim_workload("memory-pressure", 24)
    assert simulate(pressure, preset="m3")["ttft_ms"]["p99"] < simulate(pressure, preset="m2")["ttft_ms"]["p99"] / 2
    documents = make_sim_workload("long-prompts", 48)
    assert simulate(documents, preset="m5")["goodput"] > 2 * simulate(documents, preset="m4")["goodput"]
    shared = make_sim_workload("shared-prefix", 24)
    assert simulate(shared, preset="m6")["ttft_ms"]["p50"] < simulate(shared, preset="m5")["ttft_ms"]["p50"] / 2


@pytest.mark.parametrize("name", SIM_WORKLOADS)
def test_the_trace_of_a_simulation_keeps_the_rules(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    metrics = simulate(make_sim_workload(name, 16), "qwen3-0.6b", preset="m6", trace=path)
    trace = read_trace(path)
    assert lint(trace) == [] and len(trace.steps) == metrics["num_steps"]
    last = trace.steps[-1]
    assert last["t0"] + last["dur"] == pytest.approx(max(record["t0"] + record["dur"] for record in trace.steps))
    assert last["spans"]["schedule"] == 0.0, "only the model takes time"


# ---- parts


LIFO = """
from folovllm.core.sched.request_queue import FCFSRequestQueue

class LIFO(FCFSRequestQueue):
    def peek_request(self): return self._requests[-1]
    def pop_request(self): return self._requests.pop()
"""
STUCK = """
from folovllm.core.sched.scheduler import Scheduler

class Stuck(Scheduler):
    def schedule_waiting(self, step): pass
"""
FORGETFUL = """
from folovllm.core.sched.scheduler import Scheduler

class Forgetful(Scheduler):
    def add_request(self, request):
        if request.request_id != "3":
            super().add_request(request)
"""


def part(folder: Path, text: str, name: str, place: str) -> dict[str, str]:
    path = folder / f"{name.lower()}.py"
    path.write_text(text)
    return {place: f"{path}:{name}"}


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    workload = make_sim_workload("offline", 24)
    args: dict[str, Any] = {"model": "qwen3-0.6b", "max_num_seqs": 4}
    fcfs = simulate(workload, **args)
    lifo = simulate(workload, parts=part(tmp_path, LIFO, "LIFO", "core.request_queue.fcfs"), **args)
    assert fcfs["output_tokens"] == lifo["output_tokens"] and fcfs["ttft_ms"] != lifo["ttft_ms"]


def test_a_scheduler_that_stalls_or_loses_requests_gets_no_figures(tmp_path: Path) -> None:
    workload = make_sim_workload("offline", 5)
    with pytest.raises(ValueError, match="computed nothing in 1000 steps"):
        simulate(workload, parts=part(tmp_path, STUCK, "Stuck", "core.scheduler"))
    with pytest.raises(ValueError, match=r"request 3 got 0 of \d+ tokens: the scheduler lost it"):
        simulate(workload, parts=part(tmp_path, FORGETFUL, "Forgetful", "core.scheduler"))


# ---- against what was measured


def test_the_constants_are_those_of_the_measured_runs() -> None:
    script = load_script("compare_sim")
    for engine in ("plain", "fast"):
        fitted, used = script.calibration(script.measured(), engine), CALIBRATIONS["cpu", engine]
        assert used.compute == pytest.approx(fitted.compute, rel=0.01)
        assert used.overhead == pytest.approx(fitted.overhead, rel=0.01)


def test_the_page_states_the_error_of_today() -> None:
    """Its table is computed from the measured file and the simulator; the steps of every run are equal."""
    script = load_script("compare_sim")
    shown = script.BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert shown and shown[2] == script.table() + "\n", "run: python scripts/dev/compare_sim.py --write"


def test_the_error_is_small_where_the_page_says_so() -> None:
    for rung, mode, speed, predicted, itl, predicted_itl in load_script("compare_sim").rows():
        if rung in ("m4", "m5", "m6"):
            assert 0 < predicted / speed - 1 < 0.11 and abs(predicted_itl / itl - 1) < 0.165, (rung, mode)
        elif mode == "batch" and rung != "m1":
            assert 1.7 < predicted / speed < 2.0, (rung, mode)


def test_the_page_shows_what_its_command_prints() -> None:
    blocks = re.findall(
        r"^```console\n\$ folovllm sim (.+)\n((?:.*\n)*?)```", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert blocks
    for command, output in blocks:
        assert run(*command.split()).stdout == output


# ---- the command


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["sim", *args])


def test_the_command_prints_a_column_for_each_preset() -> None:
    result = run("--workload", "offline", "-m", "qwen3-0.6b", "--num-requests", "6", "--compare", "m1,m6")
    assert result.exit_code == 0 and re.search(r"^ +m1 +m6$", result.stdout, re.MULTILINE)
    as_json = run("--workload", "offline", "-m", "qwen3-0.6b", "--num-requests", "6", "--preset", "m1", "--json")
    metrics = json.loads(as_json.stdout)
    assert f"output tokens per second  {metrics['output_tok_per_s']:8,.0f}".split() == next(
        line.split()[:5] for line in result.stdout.splitlines() if line.startswith("output tokens")
    )


def test_the_command_names_the_parts_that_it_runs(tmp_path: Path) -> None:
    named = f"core.request_queue.fcfs={part(tmp_path, LIFO, 'LIFO', '')['']}"
    result = run("--workload", "offline", "-m", "qwen3-0.6b", "--num-requests", "6", "--part", named)
    assert result.exit_code == 0 and f"\nwith {named}\n" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workload", "chatt"], "did you mean 'chat'"),
        (["--gpu", "h1000"], "did you mean 'h100'"),
        (["--model", "qwen3-8"], "did you mean 'qwen3-8b'"),
        (["--model", "llama-3.1-70b"], "take more GPUs"),
        (["--compare", "m1,m2", "--trace", "x.jsonl"], "leave out --compare"),
        (["--compare", "m1", "--preset", "m1"], "keep one"),
        (["--num-requests", "0"], "num_requests must be at least 1; got 0"),
        (["--rate", "-1"], "rate must be at least 0 (0: all at once); got -1"),
        (
            ["--workload", "long-prompts", "--gpu", "cpu", "-m", "smollm2-135m", "--engine-arg", "max_model_len=100"],
            "leave it out",
        ),
    ],
)
def test_mistakes_end_as_one_line(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0])
def test_a_rate_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        make_sim_workload("chat", 4, rate)


@pytest.mark.parametrize("milliseconds", ["-1", "0", "nan"])
def test_an_slo_that_nothing_can_meet_is_refused(milliseconds: str) -> None:
    result = CliRunner().invoke(app, ["sim", "--num-requests", "1", "--slo-ttft", milliseconds])
    assert result.exit_code == 2 and "both must be above 0" in result.output


def test_a_comparison_of_nothing_is_refused() -> None:
    result = CliRunner().invoke(app, ["sim", "--compare", ","])
    assert result.exit_code == 2 and "names no milestone" in result.output


def test_a_part_that_raises_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from folovllm.core.sched.scheduler import Scheduler\n\n\nclass Mine(Scheduler):\n"
        "    def schedule(self):\n        raise KeyError('r7')\n"
    )
    with pytest.raises(
        ValueError, match=r"core.scheduler replaced, the run ended in .*mine.py, line 6: KeyError: 'r7'"
    ):
        simulate(make_sim_workload("chat", 2), "tiny", parts={"core.scheduler": f"{path}:Mine"})
