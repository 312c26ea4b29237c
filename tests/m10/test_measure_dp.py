"""scripts/dev/measure_dp.py: what it sends, what it counts, and the table that it writes."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from folovllm.engine.async_llm import AsyncLLM
from tests.m8.serving_helpers import VOCAB_SIZE, run_async
from tests.m10.replica_helpers import Replicas, make_replicas
from tests.script_loader import load_script

pytestmark = pytest.mark.m10

PAGE = Path(__file__).parents[2] / "docs/learn/10_scale_out.md"
measure_dp: Any = load_script("measure_dp")


def test_a_run_counts_what_the_engines_did() -> None:
    """Multi-turn requests wait for the answers that they follow, and find them in the cache."""

    async def test() -> None:
        async with make_replicas(Replicas(), max_model_len=1024, num_kv_blocks=400) as engine:
            requests = measure_dp.requests_of("multi-turn", VOCAB_SIZE, 16)
            figures = await measure_dp.run(engine, requests, "x")
            assert sum(figures["output_tokens_by_engine"]) == 16 * 32
            assert all(figures["output_tokens_by_engine"]) and 0.3 < figures["hit_share"] < 0.6
            again = await measure_dp.run(engine, requests, "y")
            assert again["hit_share"] == pytest.approx(figures["hit_share"], abs=0.05), (
                "each run begins with an empty cache"
            )
            assert again["ttft_ms"]["p50"] <= again["ttft_ms"]["p90"] and again["output_tok_per_s"] > 0

    run_async(test)


def test_the_two_system_prompts_come_in_turns() -> None:
    requests = measure_dp.requests_of("shared-prefix", 1000, 3)
    assert [request.group[:3] for request in requests] == ["50%", "90%"] * 3


def test_the_result_has_a_row_per_workload_and_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start_arm(name: str, args: Any) -> Any:
        return make_replicas(Replicas(), num_replicas=1 if name == measure_dp.ONE_ENGINE else 2, max_model_len=1024)

    monkeypatch.setattr(measure_dp, "start_arm", start_arm)
    output = tmp_path / "dp_cpu.json"
    assert (
        measure_dp.main(
            ["--rounds", "2", "--workloads", "A", "--num-requests", "4", "--output", str(output), "--allow-busy"]
        )
        == 0
    )
    result = json.loads(output.read_text())
    assert [(row["workload"], row["arm"]) for row in result["results"]] == [("A", arm) for arm in measure_dp.ARMS]
    assert result["results"][0]["times_one_engine"] == "1.00"
    assert all(len(runs) == 2 for runs in result["runs"]["A"].values())


def test_both_forms_have_the_same_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    async def start(model: str, **args: Any) -> AsyncLLM | None:
        started.append(args)
        return None

    monkeypatch.setattr(measure_dp, "start_async_llm", start)
    monkeypatch.setattr(measure_dp, "usable_cores", lambda: 2)
    for name in measure_dp.ARMS:
        run_async(lambda name=name: measure_dp.start_arm(name, measure_dp.parse_args([])))
    one, *several = started
    for arm in several:
        assert arm["data_parallel_size"] * arm["cpu_threads"] == one["cpu_threads"] == 2
        assert arm["data_parallel_size"] * arm["kv_cache_memory"] == one["kv_cache_memory"]
    assert [arm["parts"]["serve.router"].rpartition(":")[2] for arm in several] == ["PrefixRouter", "RandomRouter"]


# ---- what docs/learn/10 says of the table


def test_a_ratio_is_the_range_of_the_rounds() -> None:
    """A quotient of medians and a median of quotients differed in sign, side by side on the page."""
    runs = [{"output_tok_per_s": speed, "ttft_ms": {"p50": 1.0}, "hit_share": 0.0} for speed in (50.0, 80.0)]
    base = [run | {"output_tok_per_s": 100.0} for run in runs]
    assert measure_dp.summary(runs, base)["times_one_engine"] == "0.50 to 0.80"


def says(words: str) -> None:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", PAGE.read_text(encoding="utf-8"))  # without links
    assert words in text, f"docs/learn/10 does not say {words!r} any more"


def test_the_page_says_what_the_table_shows() -> None:
    rows = json.loads(measure_dp.OUTPUT.read_text(encoding="utf-8"))["results"]
    figures = {(row["workload"], row["arm"]): row for row in rows}
    one, prefix, at_random = measure_dp.ARMS
    says("so two engines do not generate more")
    for workload in measure_dp.WORKLOADS:
        alone = figures[workload, one]["output_tok_per_s"]
        assert all(figures[workload, arm]["output_tok_per_s"] < 1.1 * alone for arm in (prefix, at_random))
    says(
        "In `multi-turn` the prefix router finds more in the caches, generates far more tokens per second, and answers"
    )
    ours, theirs = figures["multi-turn", prefix], figures["multi-turn", at_random]
    assert ours["hit_share"] > theirs["hit_share"] + 0.1 and ours["ttft_p50_ms"] < theirs["ttft_p50_ms"]
    assert ours["output_tok_per_s"] > 1.3 * theirs["output_tok_per_s"]
    says("In `A`, where nothing is shared, it costs nothing that one could see")
    assert figures["A", prefix]["output_tok_per_s"] > 0.9 * figures["A", at_random]["output_tok_per_s"]


def test_the_page_describes_the_workloads() -> None:
    loads = {name: measure_dp.requests_of(name, 49_152, None) for name in measure_dp.WORKLOADS}
    lengths = {name: [len(request.prompt_token_ids) for request in load] for name, load in loads.items()}
    says(f"`A` are {len(loads['A'])} prompts of {min(lengths['A'])} to {max(lengths['A'])} tokens")
    (shared,), (answer,) = set(lengths["shared-prefix"]), {one.output_len for one in loads["shared-prefix"]}
    says(f"`shared-prefix` are {len(loads['shared-prefix'])} prompts of {shared:,} tokens")
    says(f"answers of {answer} tokens")
    turns = Counter(request.group for request in loads["multi-turn"])
    assert set(turns.values()) == {8} and len(turns) == 4
    says("`multi-turn` are 8 conversations of four turns")
