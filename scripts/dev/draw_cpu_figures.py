"""Draws the pictures of docs/learn/04b: a decode step's parts, memory, packed weights, the thread team, the shortlist.

Milestone: M4. vLLM counterpart: none. No weights, a few seconds:

    python scripts/dev/draw_cpu_figures.py [--out docs/learn/img]

The parts of a step come from milestones/m4/results/profile_step.json, the floor beside them from the model's
configuration and the bandwidth measured beside the step, and the shortlist from the sampler's own code. The thread team
is drawn out of scale. The wait for a line and the number of lines
that a core waits for are those of folovllm/csrc/prefetch.h.
"""

import json
from pathlib import Path
from typing import Any

import figure_files
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from folovllm.hf_config import parse_hf_config
from folovllm.sample.ops.shortlist import SHORTLIST_SIZE
from folovllm.sim.hardware import HARDWARE

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json"
PROFILE = ROOT / "milestones/m4/results/profile_step.json"
INK, GREY = "#333333", "#BBBBBB"
PARTS = {  # part of a step in profile_step.json -> what the picture calls it, and its colour
    "linear": ("linear layers", "#0072B2"),
    "logits": ("logits (a linear layer)", "#56B4E9"),
    "whole_layers": ("all layers, one call", "#332288"),
    "attention": ("attention", "#D55E00"),
    "norm,_rotary,_SiLU": ("norm, rotary, SiLU", "#E69F00"),
    "Python": ("Python", "#F0E442"),
    "the rest": ("other operators", GREY),
}
LANES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # of four outputs


# ---- a decode step, change by change


def draw_step(path: Path) -> None:
    profile = json.loads(PROFILE.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(2, 1, figsize=(9, 6.9), layout="constrained")
    for ax, requests in zip(axes, (1, 32), strict=True):
        rows = [row for row in profile["results"] if row["requests"] == requests and row["arm"][0] != "8"]
        for y, row in enumerate(rows):
            draw_bar(ax, y, row)
            floor = floor_ms(requests, profile["run"]["context"], 1e9 * float(row["memory_GB/s"]))
            ax.plot([floor, floor], [y - 0.45, y + 0.45], color=INK, lw=2)
        name = "1 request of 200 tokens" if requests == 1 else f"{requests} requests of 200 tokens each"
        ax.set_title(f"{name}; black mark: the floor", loc="left", fontsize=10)
        ax.set_yticks(range(len(rows)), [row["arm"] for row in rows], fontsize=9)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.16 * max(row["step"] for row in rows) / 1e3)
        ax.spines[["top", "right"]].set_visible(False)
    note = "* Under the profiler the parts took longer than the step. They are drawn shorter, and Python is unknown."
    axes[1].set_xlabel("milliseconds of one decode step")
    figure.supxlabel(note, fontsize=9, style="italic")
    handles = [Rectangle((0, 0), 1, 1, fc=colour) for _, colour in PARTS.values()]
    axes[0].legend(handles, [name for name, _ in PARTS.values()], fontsize=9, loc="lower right", frameon=False)
    figure_files.save(figure, path)


def parts_of(row: dict[str, Any]) -> dict[str, float]:
    """The parts of a step in us. If all layers are one call, the only linear layer outside it makes the logits."""
    parts = {part: row.get(part, 0.0) for part in PARTS}
    if row["whole_layers"] > 0:
        parts["logits"], parts["linear"] = parts["linear"], 0.0
    return parts


def draw_bar(ax: Any, y: int, row: dict[str, Any]) -> None:
    """One arm's step and its parts. If the profiler made the parts longer than the step, they are scaled to fit it."""
    parts = parts_of(row)
    everything = sum(parts.values()) + row["KV_write"] + row["sampler"] + row["other_operators"]
    scale = min(1.0, row["step"] / everything)
    left = 0.0
    for part, (_, colour) in PARTS.items():
        width = (row["step"] - scale * sum(parts.values()) if part == "the rest" else scale * parts[part]) / 1e3
        ax.barh(y, width, left=left, color=colour, height=0.68)
        left += width
    mark = " *" if row["Python"] == 0.0 else ""
    ax.text(left, y, f"  {row['step'] / 1e3:.1f}{mark}", va="center", fontsize=9)


def floor_ms(requests: int, context: int, bandwidth: float) -> float:
    """The longer of reading all weights, K and V, and of all multiplications at the reference machine's peak."""
    arch = parse_hf_config(json.loads(SMOLLM2.read_text(encoding="utf-8")))
    num_bytes = 2 * arch.num_parameters() + requests * context * arch.kv_bytes_per_token(2)
    operations = 2.0 * requests * (arch.num_parameters() + 2 * context * arch.num_hidden_layers * arch.q_size)
    return 1e3 * max(num_bytes / bandwidth, operations / HARDWARE["cpu"].flops)


# ---- packed weights


def draw_packing(path: Path) -> None:
    """Four outputs of eight inputs, registers of four lanes: small enough to see every number."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    draw_weights(left, [(output, pair) for output in range(4) for pair in range(4)], "as PyTorch stores it: row by row")
    draw_weights(right, [(output, pair) for pair in range(4) for output in range(4)], "packed: pair by pair")
    left.text(
        2, 4.25, "Each register belongs to ONE output.\nIts 4 lanes must still be added up.", ha="center", va="top"
    )
    right.text(
        2,
        4.25,
        "Each lane belongs to its own output.\nAfter the last pair, 4 sums are finished.",
        ha="center",
        va="top",
    )
    figure_files.save(figure, path)


def draw_weights(ax: Any, order: list[tuple[int, int]], title: str) -> None:
    for i, (output, pair) in enumerate(order):
        x, y = i % 4, i // 4
        ax.add_patch(Rectangle((x + 0.03, y + 0.12), 0.94, 0.76, fc=LANES[output], ec="none", alpha=0.85))
        text = f"w[{output}][{2 * pair}]\nw[{output}][{2 * pair + 1}]"
        colour = "black" if output in (1, 3) else "white"
        ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color=colour, family="DejaVu Sans Mono")
    for y in range(4):
        ax.text(-0.12, y + 0.5, f"register {y}", ha="right", va="center", fontsize=9)
        pairs = {pair for output, pair in order[4 * y : 4 * y + 4]}
        inputs = "x[0] .. x[7]" if len(pairs) > 1 else f"x[{2 * min(pairs)}], x[{2 * min(pairs) + 1}]"
        ax.text(4.12, y + 0.5, f"times\n{inputs}", va="center", fontsize=9)
    for x in range(4):
        ax.text(x + 0.5, -0.05, f"lane {x}", ha="center", va="bottom", fontsize=9, color="#555555")
    ax.set_title(title, fontsize=10)
    ax.set(xlim=(-1.25, 5.45), ylim=(5.3, -0.4))
    ax.axis("off")


# ---- lines on their way


def draw_lines(path: Path) -> None:
    """Lines of memory on their way to a core: one after the other, and as many at once as a core can wait for."""
    line, wait_ns, in_flight, total = 64, 110, 24, 72
    one, many = line / wait_ns, in_flight * line / wait_ns  # bytes per ns, which is GB/s
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for number in range(3):
        left.barh(number, wait_ns, left=wait_ns * number, color="#D55E00", height=1.0)
    for number in range(total):
        right.barh(
            number, wait_ns, left=wait_ns * (number // in_flight), color="#0072B2", height=1.0, ec="white", lw=0.5
        )
    left.set_title(f"the core asks when it needs a line:\n3 lines in 330 ns, {one:.1f} GB/s", loc="left", fontsize=10)
    right.set_title(
        f"{in_flight} lines on their way at once:\n72 lines in 330 ns, {many:.0f} GB/s", loc="left", fontsize=10
    )
    for ax in (left, right):
        ax.set(xlim=(0, 340), ylim=(-1, total), xlabel="ns", xticks=(0, 110, 220, 330))
        ax.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("line of 64 bytes")
    figure_files.save(figure, path)


# ---- the thread team


WORKS = (("qkv", 1.45, 1.65), ("o", 1.6, 1.4), ("gate_up", 1.5, 1.7), ("down", 1.65, 1.45))  # lengths in the threads


def draw_team(path: Path) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.2), layout="constrained")
    draw_threads(axes[0], start=0.75, label="start")
    axes[0].set_title(
        "a parallel region for each layer: both threads are started, and both must arrive at its end",
        loc="left",
        fontsize=10,
    )
    draw_threads(axes[1], start=0.2, label="")
    axes[1].set_title(
        "a team: thread 0 offers a job through a word that thread 1 reads in a loop", loc="left", fontsize=10
    )
    note = (
        "The four linear layers of one decoder layer. Orange: the message to thread 1. Grey: a thread waits.\n"
        "Not to scale: for one token the layers take 20 to 100 us each at 34.6 GB/s."
    )
    axes[1].text(0, -0.12, note, fontsize=9, style="italic", va="top")
    figure_files.save(figure, path)


def draw_threads(ax: Any, start: float, label: str) -> None:
    """Two threads from left to right: thread 0 starts each job, and the job ends when both threads are done."""
    x = 0.0
    for name, leader, follower in WORKS:
        end = x + start + max(leader, follower)
        piece(ax, 1, x, start, label, "#F2B28C")
        piece(ax, 1, x + start, leader, name, "#CCE3F0")
        piece(ax, 1, x + start + leader, end - x - start - leader, "", "#DDDDDD")
        piece(ax, 0, x, start, "wait" if label else "", "#DDDDDD")
        piece(ax, 0, x + start, follower, name, "#CCE3F0")
        piece(ax, 0, x + start + follower, end - x - start - follower, "", "#DDDDDD")
        x = end
    for y, name in ((1, "thread 0"), (0, "thread 1")):
        ax.text(-0.1, y + 0.45, name, ha="right", va="center", fontsize=9)
    ax.text(x + 0.1, 0.95, "done", va="center", fontsize=9)
    ax.set(xlim=(-1.1, 10.4), ylim=(-0.7, 1.9))
    ax.axis("off")


def piece(ax: Any, y: float, x: float, width: float, text: str, colour: str) -> None:
    """What a thread does for a while."""
    if width > 1e-6:
        ax.add_patch(Rectangle((x, y + 0.14), width, 0.62, fc=colour, ec="white", lw=1))
        ax.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=9)


# ---- sampling


def draw_shortlist(path: Path) -> None:
    """The same rows as the page's example: three peaked ones and a flat one, of 5,000 tokens."""
    torch.manual_seed(0)
    logits = torch.randn(4, 5000) * torch.tensor([[6.0], [6.0], [6.0], [0.01]])  # [R, V]
    mass = logits.softmax(dim=-1).sort(dim=-1, descending=True).values.cumsum(dim=-1)  # [R, V]
    figure, ax = plt.subplots(figsize=(9, 3.5), layout="constrained")
    ranks = range(1, 5001)
    for row in range(3):
        ax.plot(ranks, mass[row], color="#0072B2", lw=1.6)
    ax.plot(ranks, mass[3], color="#D55E00", lw=1.6)
    ax.axvline(SHORTLIST_SIZE, color=INK, lw=1, ls="--")
    ax.axhline(0.9, color=GREY, lw=1)
    ax.text(1.05, 0.915, "top_p = 0.9", fontsize=9, color="#666666")
    ax.text(SHORTLIST_SIZE * 1.06, 0.52, f"end of the list:\n{SHORTLIST_SIZE} tokens", fontsize=9)
    ax.text(5.5, 0.5, "three peaked rows: 0.9 is reached\nwith a few tokens, on the list", fontsize=9, color="#0072B2")
    ax.text(900, 0.08, "a flat row: the list holds\n5 % of the probability", fontsize=9, color="#D55E00")
    ax.set(xscale="log", xlim=(1, 5000), ylim=(0, 1.03))
    ax.set(xlabel="tokens, the likeliest first", ylabel="their probability together")
    ax.grid(alpha=0.25)
    assert bool((mass[:3, SHORTLIST_SIZE - 1] > 0.9).all()) and round(float(mass[3, SHORTLIST_SIZE - 1]), 2) == 0.05
    figure_files.save(figure, path)


def main() -> None:
    args = figure_files.parser(__doc__).parse_args()
    figures = {
        "04b_step": draw_step,
        "04b_lines": draw_lines,
        "04b_packing": draw_packing,
        "04b_team": draw_team,
        "04b_shortlist": draw_shortlist,
    }
    figure_files.draw_all(figures, args.out)


if __name__ == "__main__":
    main()
