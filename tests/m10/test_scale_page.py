"""docs/scale.md, docs/scale_replicas.md and docs/learn/10 say what scale_sim.json shows, in directions and factors.

Each test names the sentences that it proves. If a table changes, the sentence must follow.
"""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from folovllm.model_shapes import shape_architecture
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.links import LINKS, START
from folovllm.sim.metrics import SLO
from folovllm.sim.simulate import make_simulation, simulate
from folovllm.sim.sizing import Sizing
from folovllm.sim.workloads import make_sim_workload
from tests.script_loader import load_script

pytestmark = pytest.mark.m10

ROOT = Path(__file__).parents[2]
TABLES = json.loads((ROOT / "milestones/m10/results/scale_sim.json").read_text(encoding="utf-8"))["tables"]
PLAN, REPLICAS = "scale.md", "scale_replicas.md"
PAGE_9, PAGE_10 = "learn/09_tensor_parallel.md", "learn/10_scale_out.md"
PAGES = {name: ROOT / "docs" / name for name in (PLAN, REPLICAS, PAGE_9, PAGE_10)}
SMALL, LARGE = "qwen3-8b", "llama-3.1-70b"
NVLINK, PCIE, ETHERNET = "NVLink 4", "PCIe 5 x16", "100 GbE"
TOK_S, TTFT, ITL = "busy: tok/s", "quiet: TTFT p50, ms", "quiet: ITL p50, ms"


def says(words: str, page: str = PLAN) -> None:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", PAGES[page].read_text(encoding="utf-8"))  # without links
    assert words in text, f"docs/{page} does not say {words!r} any more"


def rows(table: str, **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in TABLES[table] if all(row[key] == value for key, value in wanted.items())]


def step_ms(kind: str, model: str, link: str) -> list[float]:
    """On 1, 2, 4 and 8 GPUs."""
    return [row[f"{kind}, ms: {link}"] for row in rows("tp_step", model=model)]


def split(model: str, link: str) -> dict[int, dict[str, Any]]:
    """The rows of table `splits` by GPUs per engine."""
    return {int(row["engines x GPUs"].split(" x ")[1]): row for row in rows("splits", model=model, link=link)}


# ---- one step


def first_size_with_more_talk_than_work(kind: str, model: str, link: str) -> int | None:
    """The number of GPUs from which on the all-reduces take longer than the rest of the step."""
    alone, *several = step_ms(kind, model, link)
    for size, took in zip((2, 4, 8), several, strict=True):
        rest = (alone - 2) / size + 2  # 2 ms of each step are not divided
        if took - rest > rest:
            return size
    return None


def test_where_ranks_stop_to_pay() -> None:
    says("On NVLink that is so for nothing on this page, up to eight GPUs")
    says("On PCIe it is so for prompts, from four GPUs on")
    says("On Ethernet it is so for prompts from the second GPU on, and for decodes from four or eight")
    found = {
        (kind, link): {first_size_with_more_talk_than_work(kind, model, link) for model in (SMALL, LARGE)}
        for kind in ("decode", "chunk")
        for link in (NVLINK, PCIE, ETHERNET)
    }
    assert found["decode", NVLINK] == found["chunk", NVLINK] == found["decode", PCIE] == {None}
    assert found["chunk", PCIE] == {4} and found["chunk", ETHERNET] == {2} and found["decode", ETHERNET] == {4, 8}


def test_what_an_all_reduce_of_a_decode_is_made_of() -> None:
    """The page once said that 16 requests send "a few kilobytes", and that their number hardly matters on any link."""
    says("hands 131 KB (Qwen3-8B) or 262 KB (Llama) to each all-reduce")
    shares: dict[str, list[float]] = {name: [] for name in LINKS}
    for model, kb in ((SMALL, 131), (LARGE, 262)):
        payload = 16 * shape_architecture(model).hidden_size * 2
        assert round(payload / 1e3) == kb
        for name, link in LINKS.items():
            for n in (2, 4, 8):
                for_bytes = 2 * (n - 1) / n * payload / link.bandwidth
                shares[name].append(for_bytes / (for_bytes + START + 2 * (n - 1) * link.hop))
    says("On NVLink the latency is nearly all of its time")
    assert max(shares["nvlink4"]) < 0.1
    says("On PCIe up to a third of it is for the bytes, and on Ethernet a fifth to a little over a half")
    assert 0.3 < max(shares["pcie5"]) < 0.36
    assert 0.17 < min(shares["100gbe"]) < 0.23 and 0.5 < max(shares["100gbe"]) < 0.6


def test_more_ranks_can_make_a_step_slower() -> None:
    says(
        "On Ethernet a decode of the small model is slower on four GPUs than on two, and that of the large one on eight"
    )
    small, large = step_ms("decode", SMALL, ETHERNET), step_ms("decode", LARGE, ETHERNET)
    assert small[2] > small[1] and large[3] > large[2] < large[1]
    says("On PCIe the chunk of the small model takes as long on eight GPUs as on two")
    chunk = step_ms("chunk", SMALL, PCIE)
    assert chunk[3] == pytest.approx(chunk[1], rel=0.05)
    says("On 100 GbE a chunk takes two to four times as long on eight GPUs as on one")
    assert all(1.9 < took[3] / took[0] < 4.3 for took in (step_ms("chunk", m, ETHERNET) for m in (SMALL, LARGE)))
    says("two cards with NVLink decode 1.4 times as fast", PAGE_9)
    decode = step_ms("decode", SMALL, NVLINK)
    assert round(decode[0] / decode[1], 1) == 1.4


def test_the_links_are_as_described() -> None:
    says("Its bandwidth is here seven times that of the PCI bus, and its latency from one GPU to the next 0.6 instead")
    assert round(LINKS["nvlink4"].bandwidth / LINKS["pcie5"].bandwidth) == 7
    assert (LINKS["nvlink4"].hop, LINKS["pcie5"].hop) == (0.6e-6, 1e-6)


# ---- eight GPUs


def test_what_a_single_user_gets_from_ranks() -> None:
    says("gets tokens faster with every doubling of TP, though hardly so at the end with the small model on PCIe")
    for model in (SMALL, LARGE):
        for link in (NVLINK, PCIE):
            gaps = [row[ITL] for row in split(model, link).values()]
            assert all(later < before for before, later in pairwise(gaps))
    says("The first token comes sooner on NVLink")
    for model in (SMALL, LARGE):
        assert all(later[TTFT] < before[TTFT] for before, later in pairwise(split(model, NVLINK).values()))
    says("On PCIe it comes a little sooner with the large model, and not at all with the small one")
    small, large = ([row[TTFT] for row in split(model, PCIE).values()] for model in (SMALL, LARGE))
    assert min(small[1:]) > 0.98 * small[0] and 0.7 < large[-1] / large[0] < 0.9


def test_what_all_users_get_from_ranks() -> None:
    says("hardly gain from TP if the model is small")
    small, bus = split(SMALL, NVLINK), split(SMALL, PCIE)
    assert 1.0 < small[2][TOK_S] / small[1][TOK_S] < 1.15 and small[8][TOK_S] < small[1][TOK_S]
    says("On PCIe every doubling loses")
    assert all(later[TOK_S] < before[TOK_S] for before, later in pairwise(bus.values()))
    says("With four, all users together get three times as many tokens per second on NVLink, and twice as many on PCIe")
    large = {link: split(LARGE, link) for link in (NVLINK, PCIE)}
    assert {link: round(way[4][TOK_S] / way[2][TOK_S]) for link, way in large.items()} == {NVLINK: 3, PCIE: 2}
    says("Eight are worse than two engines of four on both links")
    assert all(way[8][TOK_S] < way[4][TOK_S] and way[2]["busy: preemptions"] > 0 for way in large.values())


def test_whole_engines_are_better_than_a_model_in_two_machines() -> None:
    says("whole engines are better still: for all users four of TP 4, for one two of TP 8")
    wide, staged, two, four = (row[TOK_S] for row in TABLES["stages"])
    assert wide < staged < two < four
    assert min(TABLES["stages"], key=lambda row: row[ITL]) is TABLES["stages"][2]
    says("Two engines of TP 8 do not generate twice as much as the one of the table before")
    assert two < 2 * split(LARGE, NVLINK)[8][TOK_S]


# ---- replicas


def test_gaps_end_at_reading_the_weights_and_the_overhead() -> None:
    """The page once named the weights alone: they are 4.9 ms of the 6.9."""
    says("The gaps end at the 4.9 ms in which one GPU reads all weights and the 2 ms that every step costs", REPLICAS)
    reading = 1e3 * shape_architecture(SMALL).num_parameters() * 2 / HARDWARE["h100"].bandwidth
    assert round(reading, 1) == 4.9
    assert TABLES["fixed_load"][-1]["ITL p50, ms"] == pytest.approx(reading + 2, rel=0.02)
    says("One replica is too few", REPLICAS)
    kept = [row["promise kept, %"] for row in TABLES["fixed_load"]]
    assert kept[0] < 50 and all(share == 100 for share in kept[1:])
    says("A further engine shortens the gaps less and less, never below one GPU's step")
    says("a further replica shortens the gaps less and less, and never below the step", REPLICAS)
    gaps = [row["ITL p50, ms"] for row in TABLES["fixed_load"]]
    gains = [before - later for before, later in pairwise(gaps)]
    assert min(gains) > 0 and gains == sorted(gains, reverse=True) and gaps[-1] > reading + 2


def test_a_prefix_router_scales_and_a_random_one_does_not() -> None:
    says("a router that follows prefixes keeps its median time to the first token from 1 to 64 replicas", REPLICAS)
    says("With the prefix router, the p50 of 64 replicas is that of one", REPLICAS)
    first, last = rows("replicas", replicas=1)[0], rows("replicas", replicas=64, router="prefix")[0]
    assert last["TTFT p50, ms"] < 1.1 * first["TTFT p50, ms"]
    says("A random one finds less in the caches", REPLICAS)
    hits = [row["cache hits, %"] for row in rows("replicas", router="random")]
    assert all(later < before for before, later in pairwise([first["cache hits, %"], *hits]))
    assert rows("replicas", replicas=64, router="random")[0]["TTFT p50, ms"] > 2 * first["TTFT p50, ms"]


def test_a_prompt_stays_in_few_replicas() -> None:
    """The page once said that 16 prompts do not divide among 64 replicas: they do, four to each."""
    says("some of eight replicas get no request at all", REPLICAS)
    script: Any = load_script("sim_scale")
    simulation = make_simulation(
        script.tasks(8, 16, 6.0, services=1), SMALL, "h100", router="prefix", data_parallel_size=8
    )
    unfinished, used = [], set()
    start = simulation.routing.start

    def watched(request: Any) -> int:
        replica = start(request)
        used.add(replica)
        unfinished.append(sum(simulation.routing.num_requests) / 8)
        return replica

    simulation.routing.start = watched  # type: ignore[method-assign]
    simulation.run(SLO())
    assert len(used) < 8
    says("Here a replica has about one unfinished request", REPLICAS)
    half = unfinished[len(unfinished) // 2 :]
    assert 0.5 < sum(half) / len(half) < 2


def test_gaps_without_a_prefix_router_are_longer() -> None:
    says("The two routers that do not look at prefixes have almost its TTFT p50", REPLICAS)
    by_router = {row["router"]: row for row in TABLES["hot_prefix"]}
    prefix = by_router["prefix"]
    for name in ("least-loaded", "random"):
        assert by_router[name]["TTFT p50, ms"] < 1.2 * prefix["TTFT p50, ms"]
        says("But their gaps (ITL p99) are three times as long", REPLICAS)
        assert round(by_router[name]["ITL p99, ms"] / prefix["ITL p99, ms"]) == 3
    says("Without one, a prompt that most users share fills one replica's queue", REPLICAS)
    assert by_router["prefix-only"]["TTFT p99, ms"] > 5 * prefix["TTFT p99, ms"]


def test_half_of_the_tokens_are_computed_again_if_prompts_displace_each_other() -> None:
    says("and fails if the system prompts do not fit into one cache", REPLICAS)
    says("half of the tokens are computed again, and the queue grows", REPLICAS)
    (lost,) = rows("services", router="random", **{"system prompts": 128})
    assert 45 < lost["cache hits, %"] < 55 and lost["TTFT p50, ms"] > 1_000


def test_the_loads_are_as_described() -> None:
    script: Any = load_script("sim_scale")
    asked, tasks = script.QUESTIONS, script.AGENTS
    says("prompts of {:,} to {:,} tokens with answers of {} to {}".format(*asked.prompt, *asked.output))
    says("{} to {} new tokens, and an answer of {} to {}".format(*tasks.prompt, *tasks.output), REPLICAS)
    says(f"one of {tasks.services} system prompts of {tasks.system_prompt:,} tokens", REPLICAS)
    assert tasks.turns == 4 and (script.PROMISE.ttft, script.PROMISE.itl) == (1.0, 0.05)


# ---- docs/learn/10


def test_page_10_counts_as_the_tables_do() -> None:
    says("with NVLink, engines of two GPUs are a little better for all users together than engines of one", PAGE_10)
    assert 1.0 < split(SMALL, NVLINK)[2][TOK_S] / split(SMALL, NVLINK)[1][TOK_S] < 1.15
    tokens = Sizing(shape_architecture(SMALL), HARDWARE["h100"]).kv_tokens(1)
    says(
        f"has room for {tokens:,} tokens beside Qwen3-8B, so one cache holds {tokens // 4_000} system prompts", PAGE_10
    )
    weights = shape_architecture(LARGE).num_parameters() * 2 / 2e9
    says(f"which is {0.9 * HARDWARE['h100'].gb:.0f} GB. With two GPUs, {weights:.1f} GB of them are weights", PAGE_10)


def test_the_output_that_the_page_shows_is_that_of_today() -> None:
    """folovllm sim --model llama-3.1-70b --tp 4 --link pcie5 --rate 4"""
    run = simulate(make_sim_workload("chat", rate=4.0), LARGE, "h100", tensor_parallel_size=4, link="pcie5")
    says(f"TTFT p50, ms{run['ttft_ms']['p50']:>25.1f}")
    says(f"time bound by memory reads{run['bound_share']['memory']:>11.0%}")
    says(f"time spent in communication{run['communication_share']:>10.0%}")


def test_stages_make_no_gap_shorter() -> None:
    says("Its gaps are longer than those of four GPUs without stages, and much longer than those of `--tp 8`")
    ways: list[dict[str, Any]] = [{"tensor_parallel_size": 4, "pipeline_parallel_size": 2}]
    ways += [{"tensor_parallel_size": size} for size in (4, 8)]
    staged, four, eight = (simulate(make_sim_workload("chat"), LARGE, "h100", **way)["itl_ms"]["p50"] for way in ways)
    assert staged > four and staged > 1.4 * eight
