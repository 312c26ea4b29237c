"""The simulator with ranks, stages and replicas: its arithmetic by hand, and what the pages say, in directions.

The pages are docs/scale.md and docs/scale_replicas.md.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.communication_plan import ALL_GATHER, ALL_REDUCE, SEND
from folovllm.engine.router import PrefixRouter
from folovllm.entrypoints.cli import app
from folovllm.model_shapes import shape_architecture
from folovllm.parallel import ParallelConfig
from folovllm.sim.cost import Calibration, CostModel
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.links import LINKS, NCCL, START, operation_seconds
from folovllm.sim.metrics import SLO
from folovllm.sim.routing import ROUTERS
from folovllm.sim.simulate import make_simulation, simulate
from folovllm.sim.sizing import Sizing
from folovllm.sim.workloads import Recipe, SimRequest, SimWorkload, follow_recipe, make_sim_workload
from tests.script_loader import load_script

pytestmark = pytest.mark.m10

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "milestones/m10/results/scale_sim.json"
IDEAL = Calibration(1.0, 0.0, "by hand")
QUESTIONS = Recipe("questions", 24.0, prompt=(100, 400), output=(20, 60))
AGENTS = Recipe("agents", 12.0, prompt=(50, 150), output=(10, 30), turns=4, system_prompt=2_000, services=24)


def model_of(name: str, tp: int = 1, pp: int = 1, link: str = "nvlink4") -> CostModel:
    parallel = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    links: dict[str, Any] = {"link": LINKS[link], "stage_link": LINKS["100gbe"]}
    return CostModel(shape_architecture(name), HARDWARE["h100"], IDEAL, parallel=parallel, **links)


def at(*arrivals: float, prompt: int = 100, output: int = 3) -> SimWorkload:
    """Requests that share nothing, at these times."""
    requests = [SimRequest(when, list(range(i, 30_000))[:prompt], output) for i, when in enumerate(arrivals)]
    return SimWorkload("test", requests)


# ---- links


def test_the_operations_of_a_ring() -> None:
    """Eight ranks: 14 hops and 14 / 8 of the bytes for an all-reduce, 7 hops and 7 parts for an all-gather."""
    link = LINKS["nvlink4"]
    got = operation_seconds(link, ALL_REDUCE, 8, 1, 8e6)
    assert got == pytest.approx(START + 14 * link.hop + 14 / 8 * 8e6 / link.bandwidth)
    assert operation_seconds(link, ALL_GATHER, 8, 1, 1e6) == pytest.approx(START + 7 * link.hop + 7e6 / link.bandwidth)
    assert operation_seconds(link, SEND, 8, 2, 1e6) == pytest.approx(2 * (START + link.hop) + 1e6 / link.bandwidth)


def test_every_link_and_machine_says_where_its_numbers_are_from() -> None:
    assert all(link.source.startswith("https://") for link in LINKS.values()) and "NVIDIA/nccl/blob/" in NCCL
    assert {machine.link for machine in HARDWARE.values()} <= set(LINKS)
    bandwidths = [LINKS[name].bandwidth for name in ("nvlink4", "nvlink3", "pcie5", "pcie4", "100gbe")]
    assert bandwidths == sorted(bandwidths, reverse=True)


# ---- a step on several ranks


def test_ranks_divide_arithmetic_and_reading_and_pay_for_what_they_say() -> None:
    work = [(500, 1), (0, 300)]
    one, four = model_of("qwen3-8b").step(work, 2), model_of("qwen3-8b", tp=4).step(work, 2)
    assert (four.flops, four.bytes) == (one.flops, one.bytes)
    assert four.compute == pytest.approx(one.compute / 4) and four.memory == pytest.approx(one.memory / 4)
    assert one.communication == 0.0 < four.communication
    assert four.seconds == max(four.compute, four.memory) + four.communication


def test_communication_is_two_all_reduces_per_layer_one_more_and_the_logits() -> None:
    """301 tokens of 4,096 numbers in 2 bytes; 36 layers; 2 rows of 151,936 logits, in 4 parts."""
    link = LINKS["pcie5"]
    got = model_of("qwen3-8b", tp=4, link="pcie5").communication(301, 2)
    all_reduce = START + 6 * link.hop + 6 / 4 * 301 * 4_096 * 2 / link.bandwidth
    all_gather = START + 3 * link.hop + 3 * 2 * 151_936 / 4 * 2 / link.bandwidth
    assert got == pytest.approx(73 * all_reduce + all_gather)


def test_a_kv_head_is_not_divided() -> None:
    """Llama-3.1-70B has 8 KV heads: with 16 ranks, each reads as much of the cache as with 8."""
    cache = [(1_000_000, 1)]
    empty, full = [model_of("llama-3.1-70b", tp=8).step(work, 0).memory for work in ([(0, 1)], cache)]
    empty16, full16 = [model_of("llama-3.1-70b", tp=16).step(work, 0).memory for work in ([(0, 1)], cache)]
    assert full16 - empty16 == pytest.approx(full - empty) and empty16 == pytest.approx(empty / 2, rel=0.01)


def test_stages_take_the_work_in_turn() -> None:
    """A step takes as long as before and two messages more, but a stage is free again after half of it."""
    one, two = model_of("qwen3-8b").step([(0, 500)], 1), model_of("qwen3-8b", pp=2).step([(0, 500)], 1)
    assert two.communication == pytest.approx(operation_seconds(LINKS["100gbe"], SEND, 1, 2, 2 * 500 * 4_096 * 2))
    assert two.seconds == pytest.approx(one.seconds + two.communication)
    assert two.stage_seconds == pytest.approx(two.seconds / 2)


def test_more_ranks_shorten_a_decode_until_the_link_takes_more_than_they_save() -> None:
    def decode(tp: int, link: str) -> float:
        return model_of("llama-3.1-70b", tp, link=link).step([(1_000, 1)] * 16, 16).seconds

    assert decode(8, "nvlink4") < decode(2, "nvlink4") / 2
    assert decode(8, "pcie5") < decode(4, "pcie5") < decode(2, "pcie5")
    assert decode(8, "100gbe") > decode(4, "100gbe")


def test_a_prompt_on_a_slow_link_gains_nothing_from_ranks() -> None:
    def prompt(tp: int, link: str) -> float:
        return model_of("qwen3-8b", tp, link=link).step([(0, 2_048)], 1).seconds

    assert prompt(8, "nvlink4") < prompt(1, "nvlink4") / 2
    assert prompt(8, "100gbe") > 3 * prompt(1, "100gbe"), "each layer waits for 32 MB to go around"


# ---- engines


def test_an_engine_of_several_ranks_holds_what_the_sizing_says() -> None:
    for model, tp in (("qwen3-8b", 1), ("llama-3.1-70b", 2), ("llama-3.1-70b", 4), ("llama-3.1-70b", 8)):
        engine = make_simulation(at(0.0), model, tensor_parallel_size=tp, max_num_seqs=65_536)
        held = engine.core.kv_cache_config.num_blocks * engine.config.block_size
        assert held == pytest.approx(Sizing(shape_architecture(model), HARDWARE["h100"]).kv_tokens(tp), abs=16)


def test_weights_that_do_not_fit_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"weights take 141 GB.*tensor_parallel_size"):
        simulate(at(0.0), "llama-3.1-70b")
    assert simulate(at(0.0), "llama-3.1-70b", tensor_parallel_size=4)["num_steps"] == 3


def test_two_stages_serve_more_requests_and_no_request_faster() -> None:
    """With many requests both stages work; a single one waits for each of them."""
    args: dict[str, Any] = {"model": "qwen3-8b", "stage_link": "100gbe"}
    one, two = ({**args, "pipeline_parallel_size": stages} for stages in (1, 2))
    alone = [simulate(at(0.0, output=20), **way)["itl_ms"]["p50"] for way in (one, two)]
    assert alone[1] > alone[0]
    load = follow_recipe(Recipe("prompts", 0.0, prompt=(400, 600), output=(8, 16)), "prompts", 64)
    speed = [simulate(load, **way)["output_tok_per_s"] for way in (one, two)]
    assert 1.3 < speed[1] / speed[0] < 2.0


# ---- several engines


def test_each_engine_has_a_clock_of_its_own() -> None:
    """Two requests at once on two engines take as long as one on one engine; the third waits for a step to end."""
    single = simulate(at(0.0))
    both = simulate(at(0.0, 0.0), data_parallel_size=2, router="round-robin")
    assert both["seconds"] == single["seconds"] and both["num_steps"] == 2 * single["num_steps"]
    first_step = single["ttft_ms"]["p50"] / 1e3
    late = make_simulation(at(0.0, 0.0, first_step / 2), data_parallel_size=2, router="round-robin")
    late.run(SLO())
    times = [served.token_times[0] for served in late.served.values()]
    assert times[0] == times[1] == first_step and 1.9 * first_step < times[2] < 2.1 * first_step


@pytest.mark.parametrize("router", ROUTERS)
def test_one_engine_behind_a_router_is_that_engine(router: str) -> None:
    load = make_sim_workload("chat", 16)
    assert simulate(load, "qwen3-0.6b", router=router) == simulate(load, "qwen3-0.6b")


def test_four_engines_serve_four_times_the_load() -> None:
    one = simulate(follow_recipe(QUESTIONS, "questions", 60))
    four = simulate(
        follow_recipe(Recipe(**vars(QUESTIONS) | {"rate": 96.0}), "questions", 240), data_parallel_size=4,
        router="least-loaded",
    )  # fmt: skip
    assert 3 < four["output_tok_per_s"] / one["output_tok_per_s"] < 5
    assert four["itl_ms"]["p50"] == pytest.approx(one["itl_ms"]["p50"], rel=0.2), "an engine more makes no step shorter"


def test_conversations_hit_more_where_they_have_been() -> None:
    load = follow_recipe(AGENTS, "agents", 192)
    prefix, random_ = (simulate(load, data_parallel_size=8, router=name) for name in ("prefix", "random"))
    assert prefix["prefix_hit_share"] > random_["prefix_hit_share"] + 0.15
    assert prefix["ttft_ms"]["p50"] < random_["ttft_ms"]["p50"] / 2


def test_a_prefix_that_everybody_has_makes_a_router_without_a_limit_lose() -> None:
    """R10.2. https://github.com/vllm-project/production-stack/pull/1035 tells of such a router."""
    load = follow_recipe(Recipe(**vars(AGENTS) | {"rate": 120.0, "turns": 1, "services": 1}), "hot", 240)
    args: dict[str, Any] = {"data_parallel_size": 8, "max_num_seqs": 8}
    only, limited = (simulate(load, router=name, **args) for name in ("prefix-only", "prefix"))
    assert only["busiest_share"] > 4 and limited["busiest_share"] < 1.5
    assert only["ttft_ms"]["p99"] > 3 * limited["ttft_ms"]["p99"]


MINE = """
from folovllm.engine.router import Router

class Mine(Router):
    def route(self, request, loads):
        return {choice}
"""


def part(folder: Path, choice: str) -> dict[str, str]:
    path = folder / "mine.py"
    path.write_text(MINE.format(choice=choice), encoding="utf-8")
    return {"serve.router": f"{path}:Mine"}


def test_a_router_of_ones_own_decides(tmp_path: Path) -> None:
    load = follow_recipe(QUESTIONS, "questions", 24)
    last = simulate(load, data_parallel_size=3, parts=part(tmp_path, "2"))
    assert last["busiest_share"] == pytest.approx(3.0)
    assert last["num_steps"] == simulate(load)["num_steps"], "the other two engines never compute"
    with pytest.raises(ValueError, match="chose replica 7, and there are 3, counted from 0"):
        simulate(load, data_parallel_size=3, parts=part(tmp_path, "7"))
    with pytest.raises(ValueError, match=r"with the parts serve\.router replaced, the run ended in .*mine\.py, line 6"):
        simulate(load, data_parallel_size=3, parts=part(tmp_path, "loads[9].replica"))
    with pytest.raises(ValueError, match="both choose the replica: keep one"):
        simulate(load, data_parallel_size=3, router="random", parts=part(tmp_path, "0"))


def test_the_default_is_the_router_of_the_server() -> None:
    simulation = make_simulation(at(0.0), data_parallel_size=2)
    router = simulation.routing.router
    assert type(router) is PrefixRouter and router.num_blocks == simulation.core.kv_cache_config.num_usable_blocks
    assert make_simulation(at(0.0), data_parallel_size=2, without=["m6"]).routing.router.num_blocks == 0


def test_the_router_is_told_of_loads_as_a_front_end_counts_them() -> None:
    simulation = make_simulation(at(0.0, 0.0, 0.0, prompt=40, output=2), data_parallel_size=2, router="round-robin")
    seen = []
    route = simulation.routing.router.route
    simulation.routing.router.route = lambda request, loads: seen.append(list(loads)) or route(request, loads)  # type: ignore
    simulation.run(SLO())
    counts = [[(load.num_requests, load.num_prompt_tokens) for load in loads] for loads in seen]
    assert counts == [[(0, 0), (0, 0)], [(1, 40), (0, 0)], [(1, 40), (1, 40)]]
    assert simulation.routing.num_requests == [0, 0] and simulation.routing.prompts == [{}, {}]


# ---- the command


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["sim", "--workload", "agents", "--num-requests", "12", "-m", "qwen3-0.6b", *args])


def test_the_command_has_a_column_for_each_router() -> None:
    result = run("--replicas", "2", "--router", "prefix,random")
    assert result.exit_code == 0, result.output
    assert "qwen3-0.6b on 2 x H100 SXM (2 engines of 1); agents: 12 requests" in result.output
    assert result.output.splitlines()[3].split() == ["prefix", "random"]
    assert "busiest engine, times the mean" in result.output and "communication" not in result.output


def test_the_command_tells_of_ranks_and_their_link() -> None:
    result = run("--tp", "4", "--link", "pcie5")
    assert result.exit_code == 0 and "on 4 x H100 SXM; agents" in result.output
    assert "time spent in communication" in result.output and "busiest" not in result.output
    stages = run("--tp", "4", "--replicas", "2", "--engine-arg", "pipeline_parallel_size=2")
    assert "on 16 x H100 SXM (2 engines of 8); agents" in stages.output
    slow = run("--tp", "4", "--link", "100gbe", "--json")
    fast = run("--tp", "4", "--json")
    shares = [json.loads(result.output)["communication_share"] for result in (slow, fast)]
    assert shares[0] > 2 * shares[1] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--link", "pcie5"], "--link pcie5 connects ranks, and there is one: add e.g. --tp 4"),
        (["--router", "random"], "--router random chooses among engines, and there is one: add e.g. --replicas 4"),
        (
            ["--part", "serve.router=mine.py:Mine"],
            "serve.router chooses among engines, and there is one: add e.g. --re",
        ),
        (["--tp", "2", "--link", "nvlink9"], "unknown link 'nvlink9'; did you mean 'nvlink"),
        (["--replicas", "2", "--router", "prefixx"], "unknown router 'prefixx'; did you mean 'prefix'"),
        (["--router", "prefix,random", "--compare", "m1,m6"], "keep one of them to one name"),
        (["--replicas", "2", "--trace", "x.jsonl"], "a trace holds the steps of one engine, and there are 2"),
        (["--replicas", "0"], "data_parallel_size must be between 1 and"),
        (["--tp", "3"], "3"),  # 16 query heads
    ],
)
def test_mistakes_end_as_one_line(args: list[str], message: str) -> None:
    result = run(*args)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


# ---- the committed figures


def test_the_committed_figures_are_those_of_today() -> None:
    """The whole file takes minutes: python scripts/dev/sim_scale.py. Two of its tables take none."""
    script, tables = load_script("sim_scale"), json.loads(RESULTS.read_text(encoding="utf-8"))["tables"]
    assert list(tables) == list(script.TABLES) and all(tables.values())
    assert script.what_fits() == tables["what_fits"]
    for row, now in zip(tables["tp_step"], script.tp_step(), strict=True):
        assert row == pytest.approx(now)
