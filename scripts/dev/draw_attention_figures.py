"""Draws the pictures of docs/learn/04: memory, the online softmax, tiles, the flat batch, the roofline, rounding.

Milestone: M4. vLLM counterpart: none. No weights, a few seconds:

    python scripts/dev/draw_attention_figures.py [--out docs/learn/img]
    python scripts/dev/draw_attention_figures.py --measure     first measure this machine's two roofs again, alone on it

The tiles are written down while the backend runs, and the flat batch is step 2 of the three requests of
folovllm/learn/three_requests.py. The roofs come from milestones/m4/results/roofline_cpu.json, the measured points from
the result files beside it, and operations and bytes are counted from the default model's configuration.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figure_files
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, Rectangle

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends.torch_flash import TorchFlashBackend
from folovllm.benchmarks.machine import machine_header, measure_bandwidth
from folovllm.benchmarks.report import write_json
from folovllm.hf_config import ModelArchitecture, parse_hf_config
from folovllm.learn.three_requests import EXAMPLES, example_core, run_example
from folovllm.sim.hardware import HARDWARE
from folovllm.viz import PALETTE

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json"
RESULTS = ROOT / "milestones/m4/results"
ROOFS = RESULTS / "roofline_cpu.json"
BF16 = 2  # bytes
ALL, DIAGONAL, NEVER, INK = "#56B4E9", "#CC79A7", "#DDDDDD", "#333333"
COLOURS = dict(zip("abc", PALETTE, strict=False))
PALE = {"a": "#CCE3F0", "b": "#FAECCC", "c": "#CCECE3"}


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def architecture() -> ModelArchitecture:
    return parse_hf_config(json.loads(SMOLLM2.read_text(encoding="utf-8")))


# ---- 04: the memory hierarchy


@dataclass(frozen=True)
class Level:
    name: str
    size: str
    speed: str
    holds: str
    width: float  # of its box, in inches


def levels(arch: ModelArchitecture) -> list[Level]:
    """From the arithmetic units outwards.

    Sizes are those that lscpu names on the reference machine. The waits in cycles are AMD's for this kind of core
    (publication 57647), the wait for memory is that of folovllm/csrc/prefetch.h, and the rate that of ROOFS.
    """
    head = arch.vocab_size * arch.hidden_size
    layer = BF16 * (arch.num_parameters() - head) / arch.num_hidden_layers / 1e6
    kv = 2 * BF16 * arch.kv_size * 8192 / 1e6
    scores = 4 * arch.num_attention_heads * 8192**2 / 1e9
    tile = BF16 * 512 * arch.head_dim // 1024
    bandwidth = read("roofline_cpu.json")["bandwidth"]["bytes_per_second"] / 1e9
    weights = BF16 * arch.num_parameters() / 1e6
    return [
        Level("vector registers", "32 of 64 bytes per core", "no wait", "running sums, 16 in a register", 4.0),
        Level(
            "L1 cache",
            "32 KiB per core",
            "from 4 cycles",
            f"K of a tile streams through:\n512 keys of one head, {tile} KiB",
            4.7,
        ),
        Level("L2 cache", "1 MiB per core", "from 14 cycles", "Q, scores, K and V of a tile", 5.4),
        Level(
            "L3 cache",
            "32 MiB, shared",
            "about 50 cycles",
            f"K and V of a layer, 8,192 tokens: {kv:.1f} MB;\nthe weights of a layer: {layer:.1f} MB",
            6.1,
        ),
        Level(
            "main memory",
            "25 GB",
            f"110 ns (330 cycles at 3 GHz), {bandwidth:.1f} GB/s",
            f"all weights: {weights:.0f} MB;\nnaive scores: {scores:.1f} GB",
            6.8,
        ),
    ]


def draw_memory(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(9, 4.3), layout="constrained")
    machine, middle = HARDWARE["cpu"], 3.45
    box(ax, middle, 5.1, 4.0, 0.62, "#FFE3CC")
    ax.text(middle, 5.1, f"arithmetic units: {machine.flops / 1e9:.0f} GFLOP/s", ha="center", va="center", fontsize=10)
    for i, level in enumerate(levels(architecture())):
        y = 4.1 - i
        shade = ("#FFF1E0", "#FFF1E0", "#FFF1E0", "#EAF2FB", "#D3E3F5")[i]
        box(ax, middle, y, level.width, 0.72, shade)
        ax.text(middle, y + 0.14, f"{level.name}: {level.size}", ha="center", va="center", fontsize=10)
        ax.text(middle, y - 0.17, level.speed, ha="center", va="center", fontsize=9, color="#555555")
        ax.text(7.05, y, level.holds, va="center", fontsize=9)
        ax.annotate("", (middle, y + 0.36), (middle, y + 0.64), arrowprops={"arrowstyle": "<->", "color": INK})
    ax.text(7.05, 5.1, "what the kernel keeps there:", va="center", fontsize=9, style="italic")
    ax.set(xlim=(-0.05, 10.4), ylim=(-0.5, 5.5))
    ax.axis("off")
    figure_files.save(figure, path)


def box(ax: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=colour, ec=INK, lw=1))


# ---- 04: the online softmax


TILES = (((1, 3), (8, 4)), ((4, 2), (2, 6)))  # scores and values of the page's example


def draw_online_softmax(path: Path) -> None:
    """The weights 2^(score - m) after each tile: a larger maximum shrinks all earlier bars by one factor."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    scores: list[int] = []
    values: list[int] = []
    before: list[float] = []
    for number, (ax, (tile_scores, tile_values)) in enumerate(zip(axes, TILES, strict=True)):
        scores, values = scores + list(tile_scores), values + list(tile_values)
        m = max(scores)
        weights = [2.0 ** (score - m) for score in scores]
        ax.bar(range(len(before)), before, width=0.7, fc="none", ec="#888888", ls="--")
        ax.bar(
            range(len(weights)), weights, width=0.7, color=[(ALL, "#332288")[key // 2] for key in range(len(weights))]
        )
        for key, weight in enumerate(weights):
            ax.text(key, max(weight, *before[key : key + 1], 0) + 0.03, f"{weight:g}", ha="center", fontsize=10)
        total, out = sum(weights), sum(w * v for w, v in zip(weights, values, strict=True))
        ax.set_title(
            f"after tile {number}: m = {m}, l = {total:g}, O = {out:g}, O / l = {out / total:.5g}", fontsize=10
        )
        names = [f"key {key}\nscore {scores[key]}\nvalue {values[key]}" for key in range(len(scores))]
        ax.set_xticks(range(len(scores)), names, fontsize=9)
        ax.set(xlim=(-0.6, 3.6), ylim=(0, 1.15))
        ax.spines[["top", "right"]].set_visible(False)
        before = weights
    axes[0].set_ylabel("weight: 2^(score - m)")
    note: dict[str, Any] = {"ha": "center", "fontsize": 9, "color": "#555555", "va": "center"}
    axes[0].text(2.5, 0.5, "keys 2 and 3: not read yet", **note)
    axes[1].text(0, 0.62, "dashed: before.\nThe factor is\n2^(3 - 4) = 0.5", **note)
    figure_files.save(figure, path)


# ---- 04: which tiles are computed


@dataclass(frozen=True)
class Tile:
    position: int  # of its first query
    num_queries: int
    first_key: int
    num_keys: int
    masked: bool


def visited(seq_len: int, q_len: int, size: int) -> list[Tile]:
    """The tiles, of `size` x `size`, that torch_flash computes for the last q_len tokens of a sequence."""
    tiles: list[Tile] = []

    class Noting(TorchFlashBackend):
        BLOCK_Q = BLOCK_KV = size

        def mask_future(self, scores: torch.Tensor, first_key: int, position: int, num_rows: int) -> None:
            masked = first_key + scores.shape[-1] - 1 > position
            tiles.append(Tile(position, num_rows, first_key, scores.shape[-1], masked))
            super().mask_future(scores, first_key, position, num_rows)

    spec = AttentionSpec(1, 1, 4, torch.float32, torch.device("cpu"), block_size=1)
    run_one_head(Noting(spec), seq_len, q_len)
    return tiles


def run_one_head(backend: TorchFlashBackend, seq_len: int, q_len: int) -> None:
    """What TorchFlashBackend.forward does for one sequence of one head."""
    by_slot = torch.randn(2, seq_len, 1, 4)  # [2, num_slots, num_kv_heads, head_size]
    for first in range(seq_len - q_len, seq_len, backend.BLOCK_Q):
        num_rows = min(backend.BLOCK_Q, seq_len - first)
        q = torch.randn(1, num_rows, 4)  # [num_kv_heads, num_rows, head_size]
        backend.attend_tiles(q, by_slot, torch.arange(first + num_rows), first, num_rows)


CUT_LABEL: dict[str, Any] = {
    "ha": "center",
    "va": "bottom",
    "fontsize": 9,
    "arrowprops": {"arrowstyle": "->", "color": INK},
}


def draw_tiles(path: Path) -> None:
    cases = {"a prompt of 24 tokens": (24, 24), "10 new tokens after 14": (24, 10), "one new token after 23": (24, 1)}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.9), layout="constrained")
    counts = []
    for ax, (name, (seq_len, q_len)) in zip(axes, cases.items(), strict=True):
        tiles = visited(seq_len, q_len, 4)
        counts.append(len(tiles))
        ax.add_patch(Rectangle((0, seq_len - q_len), seq_len, q_len, fc=NEVER, ec="none"))
        for tile in tiles:
            colour = DIAGONAL if tile.masked else ALL
            corner = (tile.first_key, tile.position)
            ax.add_patch(Rectangle(corner, tile.num_keys, tile.num_queries, fc=colour, ec="white", lw=1.5))
        ax.plot([seq_len - q_len, seq_len], [seq_len - q_len, seq_len], color=INK, lw=1)
        if q_len < seq_len:
            text = "no queries here:\nthese tokens were computed\nin earlier steps"
            ax.text(12, (seq_len - q_len) / 3, text, ha="center", va="center", fontsize=9, color="#555555")
        ax.set(xlim=(0, seq_len), ylim=(seq_len, 0), xlabel="position of the key", title=name)
        ax.set_aspect("equal")
    axes[0].set_ylabel("position of the query")
    axes[0].text(16.5, 6, "never read", ha="center", fontsize=9, color="#555555")
    axes[1].annotate("cut at the last key that\nits queries may see", (17.2, 15), (12, 12.4), **CUT_LABEL)
    assert counts == [21, 17, 6]  # 21 = 6 * 7 / 2 of 36
    figure.suptitle(
        "Tiles of 4 x 4. Blue: every query of the tile sees every key. Pink: the tile needs a mask", fontsize=11
    )
    figure_files.save(figure, path)


# ---- 04: the flat batch of step 2


def flat_batch() -> tuple[list[tuple[str, int, int]], dict[str, list[int]]]:
    """Step 2 of the three requests: (request, first position, number of new tokens), and the block tables."""
    step = list(run_example(example_core(num_kv_blocks=10)))[2]
    return [(name, step.start[name], count) for name, count in step.scheduled.items()], step.blocks


ROW_X, TOKEN_X, POSITION_X = -6.3, -2.3, -0.4  # where the columns of labels end


def draw_flat_batch(path: Path) -> None:
    batch, blocks = flat_batch()
    assert batch == [("a", 6, 1), ("b", 5, 1), ("c", 0, 12)]
    figure, ax = plt.subplots(figsize=(9, 5.6), layout="constrained")
    top = row = 0.0
    for name, start, count in batch:
        tiles = visited(start + count, count, 4)
        draw_blocks(ax, blocks[name], top, name)
        top += 1.0
        for tile in tiles:
            y = top + tile.position - start
            corner = (tile.first_key + 0.04, y + 0.04)
            size = (tile.num_keys - 0.08, tile.num_queries - 0.08)
            ax.add_patch(Rectangle(corner, *size, fc="none", ec=INK, lw=1.6, zorder=3))
        for i in range(count):
            draw_query(ax, name, start + i, top + i, int(row) + i)
        row, top = row + count, top + count + 0.55
    for x, name in ((ROW_X, "row of\nthe batch"), (TOKEN_X, "request, token"), (POSITION_X, "position")):
        ax.text(x, -0.6, name, ha="right", va="center", fontsize=9, style="italic")
    ax.text(
        0.3, -0.6, "keys, by position in their own request,\nin blocks of 4", va="center", fontsize=9, style="italic"
    )
    ax.text(12.35, 8.6, "frame: a tile that is computed\nfilled: the query sees the key\npale: masked, the key is later"
            "\nno frame: never read", fontsize=9, va="top", linespacing=1.5)  # fmt: skip
    ax.set(xlim=(-8.2, 17.4), ylim=(top, -1.3))
    ax.axis("off")
    figure_files.save(figure, path)


def draw_blocks(ax: Any, table: list[int], y: float, name: str) -> None:
    """The request's block table, each block above the four positions whose K and V it holds."""
    for i, block in enumerate(table):
        ax.add_patch(Rectangle((4 * i + 0.04, y + 0.12), 3.92, 0.76, fc=COLOURS[name], ec="none"))
        label: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "fontsize": 9,
            "color": "black" if name == "b" else "white",
        }
        ax.text(4 * i + 2, y + 0.5, f"block {block} ({name})", **label)


def draw_query(ax: Any, name: str, position: int, y: float, row: int) -> None:
    """One row: its label, and a cell for each key of the request that its tile holds."""
    example = EXAMPLES[name]
    pieces = example.pieces + example.answer_pieces
    for x, label in ((ROW_X, f"{row}"), (TOKEN_X, f"{name} {pieces[position]!r:>12}"), (POSITION_X, f"{position}")):
        ax.text(x, y + 0.5, label, ha="right", va="center", fontsize=9, family="DejaVu Sans Mono")
    in_tiles = (position // 4 + 1) * 4 if name == "c" else position + 1
    for key in range(in_tiles):
        colour = COLOURS[name] if key <= position else PALE[name]
        ax.add_patch(Rectangle((key + 0.08, y + 0.1), 0.84, 0.8, fc=colour, ec="none", alpha=0.85))


# ---- 04: the roofline


def step_work(arch: ModelArchitecture, num_seqs: int, q_len: int, seq_len: int) -> tuple[float, float]:
    """Operations and bytes of a step in bf16: q_len new tokens for each sequence, seq_len tokens afterwards.

    Weights once, K and V of every sequence once; activations stay in the caches.
    """
    head = arch.vocab_size * arch.hidden_size
    layers = arch.num_parameters() - head
    pairs = num_seqs * (q_len * seq_len - q_len * (q_len - 1) / 2)  # (query, key), causal
    attention = 4.0 * arch.num_hidden_layers * arch.q_size * pairs
    operations = 2.0 * num_seqs * (q_len * layers + head) + attention
    return operations, BF16 * arch.num_parameters() + num_seqs * seq_len * arch.kv_bytes_per_token(BF16)


@dataclass(frozen=True)
class Measured:
    """A point under the roof: the operations and bytes that an implementation needs, and the time that it took."""

    name: str
    operations: float
    num_bytes: float
    seconds: float
    fast: bool  # the kernels of M4, or plain torch as in M1 to M3
    offset: tuple[int, int]  # of the label, in points
    side: str = "left"  # the edge of the label that the offset is for

    @property
    def intensity(self) -> float:
        return self.operations / self.num_bytes

    @property
    def rate(self) -> float:
        return self.operations / self.seconds


def naive_bytes(arch: ModelArchitecture, n: int) -> float:
    """What the formula moves for one layer and a prompt of n tokens: the fp32 scores four times, Q, output, K and V."""
    return 4.0 * 4 * arch.num_attention_heads * n * n + 2 * BF16 * n * (arch.q_size + arch.kv_size)


def tiled_bytes(arch: ModelArchitecture, n: int, tile: int = 64 // 3) -> float:
    """Q and output once; for each tile of queries, K and V up to its own end. cpu_paged: 64 rows of 3 heads."""
    k_and_v = 2 * BF16 * n * arch.kv_size
    return 2 * BF16 * n * arch.q_size + sum(k_and_v * min(i + tile, n) // n for i in range(0, n, tile))


def attention_points(arch: ModelArchitecture) -> list[Measured]:
    times = {(r["case"], r["backend"]): r["forward_ms"] / 1e3 for r in read("bench_attention.json")["results"]}
    prefill, decode = "prefill 8192", "decode 32x2048"
    pairs = 4.0 * arch.q_size * 8192**2
    decode_work, kv = 4.0 * arch.q_size * 32 * 2048, 32 * 2048 * 2 * BF16 * arch.kv_size
    naive, paged = "torch_naive", "cpu_paged"
    prompt, rows = "attention of a prompt\nof 8,192 tokens", "decode attention of 32\nrequests of 2,048 tokens"
    return [
        Measured(prompt, pairs, naive_bytes(arch, 8192), times[prefill, naive], False, (9, -30)),
        Measured(prompt, pairs / 2, tiled_bytes(arch, 8192), times[prefill, paged], True, (9, -30)),
        Measured(rows, decode_work, 7 * kv, times[decode, naive], False, (-8, -40)),
        Measured(rows, decode_work, kv, times[decode, paged], True, (-10, 20), "right"),
    ]


def step_points(arch: ModelArchitecture) -> list[Measured]:
    """Whole decode steps, with plain torch and with all of M4: the first and the last bars of 04b_step."""
    profile = read("profile_step.json")
    rows = {(row["arm"][0], row["requests"]): row for row in profile["results"]}
    points = []
    labels = {
        ("1", 1): ((9, -20), "left"),
        ("7", 1): ((-16, 14), "right"),
        ("1", 32): ((-9, -14), "right"),
        ("7", 32): ((0, 26), "center"),
    }
    for (arm, requests), (offset, side) in labels.items():
        row = rows[arm, requests]
        operations, num_bytes = step_work(arch, requests, 1, profile["run"]["context"])
        name = "whole step\nof 1 request" if requests == 1 else "whole step\nof 32 requests"
        points.append(Measured(name, operations, num_bytes, row["step"] / 1e6, arm != "1", offset, side))
    return points


def draw_roofline(path: Path) -> None:
    machine, arch = HARDWARE["cpu"], architecture()
    points = attention_points(arch) + step_points(arch)
    figure, ax = plt.subplots(figsize=(9, 5.2), layout="constrained")
    ax.plot([0.25, machine.knee, 1500], [0.25 * machine.bandwidth, machine.flops, machine.flops], color=INK, lw=1.6)
    ax.axvline(machine.knee, color="#AAAAAA", lw=0.8, ls=":")
    ax.text(3.3, 1.3e11, f"memory: {machine.gb_per_s:.1f} GB/s", rotation=36, fontsize=9)
    ax.text(60, machine.flops * 1.1, f"arithmetic: {machine.flops / 1e9:.0f} GFLOP/s", fontsize=9)
    ax.text(machine.knee * 1.05, 1.25e9, f"knee: {machine.knee:.1f}\noperations per byte", fontsize=9, color="#555555")
    for before, after in zip(points[::2], points[1::2], strict=True):
        arrow: dict[str, Any] = {"arrowstyle": "->", "color": "#888888", "shrinkA": 6, "shrinkB": 6}
        ax.annotate("", (after.intensity, after.rate), (before.intensity, before.rate), arrowprops=arrow)
    for point in points:
        colour = COLOURS["a"] if point.fast else "#D55E00"
        ax.plot(
            point.intensity, point.rate, "o", markersize=8, mfc=colour if point.fast else "white", mec=colour, mew=2
        )
        label = f"{point.name}\n{point.rate / 1e9:.0f} GFLOP/s"
        position: dict[str, Any] = {"xytext": point.offset, "textcoords": "offset points", "ha": point.side}
        ax.annotate(label, (point.intensity, point.rate), **position, fontsize=9, color=colour, linespacing=1.1)
    ax.text(150, 3.2e9, "filled: the kernels of M4", fontsize=9, color=COLOURS["a"])
    ax.text(150, 2.3e9, "hollow: plain torch, as M1 to M3", fontsize=9, color="#D55E00")
    ax.set(xscale="log", yscale="log", xlim=(0.25, 1500), ylim=(1e9, 2e12))
    ax.set(xlabel="operations per byte of memory traffic (counted)", ylabel="operations per second (measured)")
    ax.grid(alpha=0.25)
    figure_files.save(figure, path)


# ---- 04: rounding


PLAIN = {"fc": "white", "ec": "none", "pad": 1.5}  # behind text, so that no line crosses it


def draw_rounding(path: Path) -> None:
    """The two candidates of request a's first differing token: before and after rounding, in each engine."""
    result = read("first_difference.json")
    (facts,) = (d for d in result["differences"] if d["request"] == "a")
    rows = [row for row in result["results"] if row["request"] == "a" and row["engine"] != "m4 fp32"]
    step = facts["bf16_step"]
    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for value in (37.25, 37.5, 37.75):
        ax.plot((value, value), (-0.5, 2.42), color="#888888", lw=1)
        ax.text(value, -0.62, f"{value}", ha="center", fontsize=10, bbox=PLAIN)
        if value < 37.75:
            ax.plot((value + step / 2,) * 2, (-0.5, 2.42), color="#BBBBBB", lw=0.8, ls=":")
    for y, row in enumerate(rows):
        names = [key.removeprefix("exact ") for key in row if key.startswith("exact")]
        label: dict[str, Any] = {"m1 fp32": "m1, m4 fp32"}.get(row["engine"], row["engine"])
        ax.text(37.165, y, f"{label}\nchooses {row['chooses']}", va="center", ha="right", fontsize=10)
        for token, colour, lift in zip(names, ("#0072B2", "#D55E00"), (-0.17, 0.17), strict=True):
            exact, logit = row[f"exact {token}"], row[f"logit {token}"]
            ax.plot(exact, y + lift, "o", ms=8, mfc="white", mec=colour, mew=2, zorder=3)
            right = exact > 37.5 and exact < 37.6  # of the line at 37.5
            x, side = (exact + 0.013, "left") if right else (exact - 0.013, "right")
            ax.text(x, y + lift, f"{token} {exact:.3f}", ha=side, va="center", fontsize=9, color=colour, bbox=PLAIN)
            if "bf16" in row["engine"]:
                arrow: dict[str, Any] = {"arrowstyle": "->", "color": colour, "lw": 1.6, "shrinkA": 5, "shrinkB": 0}
                ax.annotate("", (logit, y + lift), (exact, y + lift), arrowprops=arrow)
                ax.plot(logit, y + lift, "s", ms=8, color=colour, zorder=3)
    ax.text(37.735, 2.17, "a tie: the smaller\ntoken id wins", fontsize=9, va="center", ha="right", bbox=PLAIN)
    note = "circle: before the last rounding      square: the logit that the engine compares"
    ax.text(37.39, 2.56, note, fontsize=9, ha="center", style="italic", bbox=PLAIN)
    ax.text(37.165, -0.62, "bf16 numbers here", ha="right", fontsize=10, style="italic")
    ax.text(37.375, -0.62, "limit of rounding", ha="center", fontsize=9, color="#888888", bbox=PLAIN)
    ax.text(37.625, -0.62, "limit of rounding", ha="center", fontsize=9, color="#888888", bbox=PLAIN)
    ax.set(xlim=(36.97, 37.82), ylim=(2.6, -0.8))
    ax.axis("off")
    figure_files.save(figure, path)


def measure(path: Path) -> None:
    """Memory reads as in compare_perf; the best of many bf16 products of a size that fits into the caches."""
    n = 1024
    a, b = torch.randn(2, n, n).bfloat16()
    result: dict[str, Any] = {
        "command": "scripts/dev/draw_attention_figures.py --measure",
        "machine": machine_header(),
        "threads": torch.get_num_threads(),
        "bandwidth": measure_bandwidth("cpu", 2**29),
        "matmul_flop_per_s": 2 * n**3 / best_seconds(lambda: a @ b, 200),
        "matmul": f"best of 200 bf16 products of [{n}, {n}] and [{n}, {n}]",
    }
    write_json(result, path)
    rates = result["bandwidth"]["bytes_per_second"] / 1e9, result["matmul_flop_per_s"] / 1e9
    print("{:.1f} GB/s, {:.0f} Gflop/s, load average {}".format(*rates, result["machine"]["load_average"][0]))


def best_seconds(work: Callable[[], Any], tries: int) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = figure_files.parser(__doc__)
    parser.add_argument("--measure", action="store_true", help="measure this machine's roofs first")
    args = parser.parse_args()
    if args.measure:
        measure(ROOFS)
    figures = {
        "04_memory": draw_memory,
        "04_online_softmax": draw_online_softmax,
        "04_tiles": draw_tiles,
        "04_flat_batch": draw_flat_batch,
        "04_roofline": draw_roofline,
        "04_rounding": draw_rounding,
    }
    figure_files.draw_all(figures, args.out)


if __name__ == "__main__":
    main()
