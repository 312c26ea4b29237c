"""Blocks with measured numbers: what is proven (docs/project_summary.md), tuning (docs/quick_reference.md), paging (README).

Milestone: M0. vLLM counterpart: none. Every number is read from a committed result file, and its row links that file.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from front_index import link, table

MILESTONES = Path(__file__).resolve().parents[2] / "milestones"
LADDER = "m4/results/compare_perf_A_cpu.json"
EQUAL_BATCH = "m3/results/equal_batch_A_cpu.json"
PEERS = "m4/results/compare_peers_A_cpu.json"
LONG_PROMPTS = "m5/results/long_prompts_cpu.json"
CHUNK_SIZES = "m5/results/tune_chunk_size.json"
SHARED_PREFIX = "m6/results/shared_prefix_cpu.json"
GPTQ_SPEED = "m7/results/bench_gptq.json"
GPTQ_LOSS = "m7/results/eval_ppl.json"
REQUIREMENT = re.compile(r"^- R\d+\.\d+ ", re.MULTILINE)


@cache
def result(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MILESTONES / file).read_text(encoding="utf-8"))
    return found


def row_of(file: str, **wanted: object) -> dict[str, Any]:
    """The one row of a file's `results` that has these values. Raises ValueError if there is not exactly one."""
    rows: list[dict[str, Any]] = result(file)["results"]
    (row,) = [row for row in rows if all(str(row[key.replace("_", " ")]) == str(v) for key, v in wanted.items())]
    return row


def arm(file: str, name: str) -> dict[str, Any]:
    """What an arm of a ladder file measured with all requests together."""
    found: dict[str, Any] = result(file)["arms"][name]["modes"]["batch"]
    return found


def ms(text: str) -> str:
    """E.g. "3,672.9" -> "3,673 ms"."""
    return f"{float(text.replace(',', '')):,.0f} ms"


def ratio(peer: str, mode: str) -> str:
    """Our speed over that of a peer, e.g. "1.39x". A range that includes 1 is a tie and raises ValueError."""
    measured = result(PEERS)["arms"][peer]["modes"][mode]["ratio"]
    if measured["min"] <= 1 <= measured["max"]:
        raise ValueError(f"{PEERS}: {peer} and FoloVLLM tie in mode {mode}; reword the claim")
    return f"{measured['median']:.2f}x"


# ---- blocks


def proven(folder: Path) -> str:
    """Claim, number and file, for what is shown on the reference machine."""
    claims = [
        (f"{num_requirements()} numbered requirements, each with the test that proves it", "`pytest`", MILESTONES / "README.md"),
        (f"One request alone: {peers_text('single')}", "tokens per second", MILESTONES / PEERS),
        (f"32 requests together: {peers_text('batch')}", "tokens per second", MILESTONES / PEERS),
        (batching_text(), "tokens per second", MILESTONES / LADDER),
        (paging_text(), "KV slots, requests at once", MILESTONES / LADDER),
        (chunks_text(), "longest gap between tokens", MILESTONES / LONG_PROMPTS),
        (prefix_text(), "time to the first token", MILESTONES / SHARED_PREFIX),
        (gptq_text(), "speed, bytes, perplexity", MILESTONES / GPTQ_SPEED),
    ]  # fmt: skip
    rows = ((claim, kind, link(file.stem if file.suffix == ".json" else "milestones", file, folder)) for claim, kind, file in claims)
    return table("shown | measure | where", rows)


def tuning(folder: Path) -> str:
    """If your load is like this, set that, and what it was worth here."""
    rows = [
        ("many requests at once", "nothing: `max_num_seqs` is 64 on a CPU; raise it while memory lasts", batching_text(), LADDER),
        ("long prompts disturb answers under way", "`max_num_batched_tokens=256`", chunks_text(), LONG_PROMPTS),
        ("the latency of a token must stay below a limit", "`python scripts/tune_chunk_size.py` finds the budget", budgets_text(), CHUNK_SIZES),
        ("prompts share a beginning", "nothing: the prefix cache is on; put what varies at the end", prefix_text(), SHARED_PREFIX),
        ("one user, as fast as possible", 'a GPTQ model and `gptq_runtime="memory"`', gptq_text(), GPTQ_SPEED),
        ("requests are preempted (`LLM.stats()`)", "`kv_cache_memory` up, or `max_num_seqs` down", paging_text(), LADDER),
    ]  # fmt: skip
    cells = ((when, set_, worth, link("file", MILESTONES / file, folder)) for when, set_, worth, file in rows)
    return table("your load | set | measured here | where", cells)


def paging(folder: Path) -> str:
    """The sentence of the README on m3 beside m2."""
    (two, three), (many, paged) = [[arm(file, name) for name in ("m2", "m3")] for file in (LADDER, EQUAL_BATCH)]
    return (
        f"**Why m3 gains so little here.** Paging saves memory and not arithmetic. In the same memory m3 runs {three['max_running']:.0f} "
        f"requests at once and m2 {two['max_running']:.0f}, because m3 fills {three['kv_utilisation']:.0%} of its KV slots and m2 "
        f"{two['kv_utilisation']:.0%}. Both still run textbook attention, whose speed varies from run to run and which dominates these long steps. "
        f"With memory for {many['max_running']:.0f} requests in both, m3 makes {speed(paged)} and m2 {speed(many)} "
        f"tokens per second ({link('all figures', MILESTONES / EQUAL_BATCH, folder)}).\n"
    )


# ---- the sentences


def num_requirements() -> int:
    return sum(len(REQUIREMENT.findall(spec.read_text(encoding="utf-8"))) for spec in MILESTONES.glob("m*/SPEC.md"))


def speed(measured: dict[str, Any]) -> str:
    return f"{measured['output_tok_per_s']:.0f}"


def peers_text(mode: str) -> str:
    names = {"hf": "HuggingFace `generate`", "llamacpp": "llama.cpp", "openvino": "OpenVINO GenAI (4-bit weights)", "vllm": "vLLM's CPU build"}
    return ", ".join(f"{ratio(peer, mode)} {name}" for peer, name in names.items())


def batching_text() -> str:
    one, together = arm(LADDER, "m1"), arm(LADDER, "m2")
    return f"32 requests make {speed(together)} tok/s with continuous batching and {speed(one)} one at a time"


def paging_text() -> str:
    whole, paged = arm(LADDER, "m2"), arm(LADDER, "m3")
    return (
        f"In the same memory, blocks of 16 tokens run {paged['max_running']:.0f} requests at once ({paged['kv_utilisation']:.0%} of "
        f"KV slots used), whole-request blocks {whole['max_running']:.0f} ({whole['kv_utilisation']:.0%})"
    )


def chunks_text() -> str:
    before, after = [row_of(LONG_PROMPTS, arm=name, group="decoding")["ITL p99"] for name in ("m4", "m5+budget=256")]
    return f"While prompts of 4,000 tokens arrive, the ITL p99 of decoding requests is {ms(after)} with chunks and {ms(before)} without"


def budgets_text() -> str:
    low, high = [row_of(CHUNK_SIZES, budget=budget)["itl_p99_ms"] for budget in (128, 1024)]
    return f"ITL p99 is {low:,.0f} ms with a budget of 128 tokens and {high:,.0f} ms with 1024, at about the same total throughput"


def prefix_text() -> str:
    before, after = [row_of(SHARED_PREFIX, arm=name, group="95% warm")["TTFT p50"] for name in ("m5", "m6")]
    return f"A prompt of 1,500 tokens of which 95 % are cached has its first token after {ms(after)} instead of {ms(before)}"


def gptq_text() -> str:
    fast = row_of(GPTQ_SPEED, arm="memory")
    loss, rounding = [row_of(GPTQ_LOSS, model=name, engine="folovllm")["rise_%"] for name in ("gptq4", "rtn4")]
    return (
        f"4-bit weights: one request {fast['single']} as fast as bf16 and 32 together {fast['batch']}, {fast['of bf16']} of the bytes; "
        f"perplexity {loss} with GPTQ and {rounding} rounded to nearest"
    )
