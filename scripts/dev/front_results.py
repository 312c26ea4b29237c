"""Blocks with measured numbers: proven (docs/project_summary.md), tuning (quick_reference.md), peers (README), paging.

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
# The columns of the table of peers: the condition that a file was measured in, and the file, if it is there already.
CONDITIONS = {
    "idle machine": PEERS,
    "limited to AVX2": "m4/results/compare_peers_avx2_cpu.json",
    "another process busy (8 together)": "m4/results/compare_peers_busy1_cpu.json",
}
LONG_PROMPTS = "m5/results/long_prompts_cpu.json"
CHUNK_SIZES = "m5/results/tune_chunk_size.json"
SHARED_PREFIX = "m6/results/shared_prefix_cpu.json"
GPTQ_SPEED = "m7/results/bench_gptq.json"
GPTQ_LOSS = "m7/results/eval_ppl.json"
OURS = "folovllm"
PEER_NAMES = {
    "hf": "HuggingFace `generate`",
    "llamacpp": "llama.cpp",
    "openvino": "OpenVINO GenAI (4-bit weights)",
    "vllm": "vLLM's CPU build",
}
REQUIREMENT = re.compile(r"^- R\d+\.\d+ ", re.MULTILINE)


# ---- reading the files


@cache
def result(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MILESTONES / file).read_text(encoding="utf-8"))
    return found


def row_of(file: str, **wanted: object) -> dict[str, Any]:
    """The one row of a file's `results` that has these values. Raises ValueError if there is not exactly one."""
    rows: list[dict[str, Any]] = result(file)["results"]
    (row,) = [row for row in rows if all(str(row[key]) == str(value) for key, value in wanted.items())]
    return row


def arm(file: str, name: str) -> dict[str, Any]:
    """What an arm of a ladder file measured with all requests together."""
    found: dict[str, Any] = result(file)["arms"][name]["modes"]["batch"]
    return found


def speed(measured: dict[str, Any]) -> str:
    return f"{measured['output_tok_per_s']:.0f}"


def running(measured: dict[str, Any]) -> str:
    return f"{measured['max_running']:.0f}"


def used(measured: dict[str, Any]) -> str:
    return f"{measured['kv_utilisation']:.0%}"


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
    """What is shown on the reference machine, with the file that shows it."""
    claims = [
        (f"One request alone: {peers_text('single')}", PEERS),
        (f"32 requests together: {peers_text('batch')}", PEERS),
        (batching_text(), LADDER),
        (paging_text(), LADDER),
        (chunks_text(), LONG_PROMPTS),
        (prefix_text(), SHARED_PREFIX),
        (gptq_text(), GPTQ_SPEED),
        (f"{num_requirements()} numbered requirements, each with the test that proves it", "README.md"),
    ]
    return table("shown | where", ((claim, file_link(file, folder)) for claim, file in claims))


def tuning(folder: Path) -> str:
    """If your load is like this, set that, and what it was worth here."""
    budget = "`python scripts/tune_chunk_size.py` finds the budget"
    grows = "nothing: the KV cache is paged; if `num_preemptions` grows, raise `kv_cache_memory`"
    rows = [
        ("many requests at once", "nothing: raise `max_num_seqs` above 64 while memory lasts", batching_text(), LADDER),
        ("more requests than memory", grows, paging_text(), LADDER),
        ("long prompts disturb answers under way", "`max_num_batched_tokens=256`", chunks_text(), LONG_PROMPTS),
        ("a limit for the gap between tokens", budget, budgets_text(), CHUNK_SIZES),
        ("prompts share a beginning", "nothing: put what varies at the end", prefix_text(), SHARED_PREFIX),
        ("one user", 'a GPTQ model, `gptq_runtime="memory"`', gptq_text(), GPTQ_SPEED),
    ]
    cells = ((load, setting, worth, file_link(file, folder)) for load, setting, worth, file in rows)
    return table("your load | set | measured here | where", cells)


def file_link(file: str, folder: Path) -> str:
    path = MILESTONES / file
    return link(path.stem if path.suffix == ".json" else "milestones", path, folder)


def paging(folder: Path) -> str:
    """The sentences of the README on M3 beside M2."""
    two, three = (arm(LADDER, name) for name in ("m2", "m3"))
    many, paged = (arm(EQUAL_BATCH, name) for name in ("m2", "m3"))
    return (
        f"HuggingFace is about as fast as M2: it runs all {running(arm(LADDER, 'hf'))} requests in one padded batch, "
        f"while M2's memory holds {running(two)} at once.\n\n"
        "**Why M3 gains so little here.** Paging saves memory, not arithmetic: in the same memory M3 runs "
        f"{running(three)} requests at once and M2 {running(two)}, because {used(three)} of its KV slots are in use "
        f"instead of {used(two)}.\nTextbook attention dominates the steps of both, and its speed varies from run to "
        f"run. With {running(many)} requests in both, M3 makes {speed(paged)} and M2 {speed(many)} tokens per\n"
        f"second ({link('all figures', MILESTONES / EQUAL_BATCH, folder)}).\n"
    )


def peers(folder: Path) -> str:
    """Ours and each peer in every measured condition: one request, then 32 together. A missing peer is a dash."""
    columns = {name: result(file)["arms"] for name, file in CONDITIONS.items() if (MILESTONES / file).exists()}
    heads = [link(name, MILESTONES / CONDITIONS[name], folder) for name in columns]
    names = {OURS: "FoloVLLM", **PEER_NAMES}
    rows = [(label, *(speeds_cell(arms.get(name)) for arms in columns.values())) for name, label in names.items()]
    where = "output tok/s: one request, 32 together"
    return table(" | ".join([where, *heads]), rows, right="1 2 3")


def speeds_cell(measured: dict[str, Any] | None) -> str:
    """E.g. "73.0, 147 (1.39x, 3.00x)": the speeds of an arm, and how many times faster ours was in the same pairs."""
    if measured is None or "modes" not in measured:
        return "-"
    modes = [measured["modes"][mode] for mode in ("single", "batch")]
    speeds = ", ".join(three_digits(figures["output_tok_per_s"]["median"]) for figures in modes)
    ratios = ", ".join(f"{three_digits(figures['ratio']['median'])}x" for figures in modes if "ratio" in figures)
    return f"{speeds} ({ratios})" if ratios else speeds


def three_digits(value: float) -> str:
    """E.g. 0.401 -> "0.40", 6.48 -> "6.48", 27.9 -> "27.9", 140.9 -> "141"."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


# ---- the sentences


def num_requirements() -> int:
    return sum(len(REQUIREMENT.findall(spec.read_text(encoding="utf-8"))) for spec in MILESTONES.glob("m*/SPEC.md"))


def peers_text(mode: str) -> str:
    return ", ".join(f"{ratio(peer, mode)} {name}" for peer, name in PEER_NAMES.items())


def batching_text() -> str:
    one, together = arm(LADDER, "m1"), arm(LADDER, "m2")
    return f"32 requests make {speed(together)} tok/s with continuous batching and {speed(one)} one at a time"


def paging_text() -> str:
    whole, paged = arm(LADDER, "m2"), arm(LADDER, "m3")
    return (
        f"In the same memory, blocks of 16 tokens run {running(paged)} requests at once ({used(paged)} of the KV slots "
        f"in use), blocks for whole requests {running(whole)} ({used(whole)})"
    )


def chunks_text() -> str:
    whole, chunks = (row_of(LONG_PROMPTS, arm=name, group="decoding")["ITL p99"] for name in ("m4", "m5+budget=256"))
    return (
        f"While prompts of 4,000 tokens arrive, the ITL p99 of decoding requests is {ms(chunks)} with chunks of 256 "
        f"tokens and {ms(whole)} without chunks"
    )


def budgets_text() -> str:
    low, high = (row_of(CHUNK_SIZES, budget=budget)["itl_p99_ms"] for budget in (128, 1024))
    return (
        f"ITL p99 is {low:,.0f} ms with a budget of 128 tokens and {high:,.0f} ms with 1024, at about the same total "
        "throughput"
    )


def prefix_text() -> str:
    before, after = (row_of(SHARED_PREFIX, arm=name, group="95% warm")["TTFT p50"] for name in ("m5", "m6"))
    return f"If 95 % of a prompt of 1,500 tokens are cached, the first token takes {ms(after)} instead of {ms(before)}"


def gptq_text() -> str:
    fast = row_of(GPTQ_SPEED, arm="memory")
    loss, rounding = (row_of(GPTQ_LOSS, model=name, engine="folovllm")["rise_%"] for name in ("gptq4", "rtn4"))
    return (
        f"4-bit weights: one request {fast['single']} as fast as bf16, 32 together {fast['batch']}, with "
        f"{fast['of bf16']} of the bytes; perplexity {loss} with GPTQ and {rounding} rounded to nearest"
    )
