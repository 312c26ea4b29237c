"""Draws the pictures of docs/learn/04c: speeds by condition and length, registers, a job under four policies, states.

Milestone: M4. vLLM counterpart: none. No weights, a few seconds:

    python scripts/dev/draw_machines_figures.py [--out docs/learn/img]

The speeds come from milestones/m4/results/compare_peers_*.json. The policies are those of the page's simulation, with
its numbers. The states are those of folovllm/csrc/thread_worker.h.
"""

import json
from pathlib import Path
from typing import Any

import figure_files
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

INK, WEIGHTS, SUMS, WAIT, LOST = "#333333", "#CCE3F0", "#F7D9B5", "#DDDDDD", "#B5533C"
LEADER, WORKER = "#0072B2", "#C25A00"

RESULTS = Path(__file__).resolve().parents[2] / "milestones/m4/results"
CONDITIONS = {"A": "idle", "avx2": "AVX2 only", "busy1": "one busy\nprocess", "busy2": "two busy\nprocesses"}
ENGINES = {"folovllm": ("FoloVLLM", LEADER), "llamacpp": ("llama.cpp", "#999999")}
MODES = {"single": "one request", "batch": "32 together (8 if busy)"}
PROMPT_ENGINES = ENGINES | {"vllm": ("vLLM's CPU build", "#C25A00")}


def conditions() -> dict[str, dict[str, dict[str, float]]]:
    """Output tokens per second by condition, mode and engine."""
    files = {label: f"compare_peers_{name}_cpu" for name, label in CONDITIONS.items()}
    return {
        label: {
            mode: {engine: speed_of(file, engine, mode, "output_tok_per_s") for engine in ENGINES} for mode in MODES
        }
        for label, file in files.items()
    }


def prompts() -> dict[str, dict[str, float]]:
    """Prompt tokens per second by engine and length of the prompt."""
    name = "compare_peers_prompts_cpu"
    return {
        engine: {
            mode.removeprefix("prompt"): speed_of(name, engine, mode, "prompt_tok_per_s")
            for mode in arms_of(name)[engine]["modes"]
        }
        for engine in PROMPT_ENGINES
    }


def arms_of(name: str) -> dict[str, Any]:
    arms: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["arms"]
    return arms


def speed_of(name: str, engine: str, mode: str, unit: str) -> float:
    return float(arms_of(name)[engine]["modes"][mode][unit]["median"])


MEASURED = {"04c_conditions": conditions, "04c_prompts": prompts}  # the pictures of measurements, and their numbers


def draw_conditions(path: Path) -> None:
    data = conditions()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for ax, (mode, title) in zip(axes, MODES.items(), strict=True):
        for i, (engine, (name, colour)) in enumerate(ENGINES.items()):
            speeds = [measured[mode][engine] for measured in data.values()]
            bars = ax.bar([x + 0.38 * i for x in range(len(data))], speeds, width=0.36, color=colour, label=name)
            ax.bar_label(bars, [f"{s:.0f}" if s >= 10 else f"{s:.1f}" for s in speeds], fontsize=9)
        ax.set_xticks([x + 0.19 for x in range(len(data))], data)
        ax.set_xlim(-0.5, len(data) - 0.1)
        ax.set_title(f"{title}: output tokens per second", loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=9, frameon=False)
    figure_files.save(figure, path, data)


def draw_prompts(path: Path) -> None:
    data = prompts()
    figure, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for engine, (name, colour) in PROMPT_ENGINES.items():
        speeds = {int(length): speed for length, speed in data[engine].items()}
        ax.plot(list(speeds), list(speeds.values()), marker="o", color=colour, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(speeds), [f"{length:,}" for length in speeds])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set(xlabel="tokens of the prompt")
    ax.set_title("prompt tokens per second, one prompt at a time, bf16", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=9, frameon=False)
    figure_files.save(figure, path, data)


# ---- levels

# Level, fp32 lanes of a register, instructions per register of weights: conversions and products.
LEVELS = (
    ("AVX-512 with bf16", 16, ("vdpbf16ps",)),
    ("AVX2, FMA", 8, ("shift", "mask", "FMA", "FMA")),
    ("SSE2 (portable)", 4, ("shift", "mask", "mul", "add", "mul", "add")),
    ("NEON with bf16", 4, ("bfdot",)),
)


def draw_levels(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for row, (name, lanes, steps) in enumerate(LEVELS):
        y, registers = -row, 16 // lanes
        ax.text(-0.3, y, name, ha="right", va="center", fontsize=10)
        for i in range(registers):
            ax.add_patch(Rectangle((i * lanes + 0.1, y - 0.32), lanes - 0.2, 0.64, fc=WEIGHTS, ec=INK, lw=0.8))
            ax.text((i + 0.5) * lanes, y, f"{lanes} pairs", ha="center", va="center", fontsize=9)
        total = registers * len(steps)
        ax.text(16.5, y + 0.12, ", ".join(steps), va="center", fontsize=9)
        one = "" if registers == 1 else f", {registers} times"
        ax.text(
            16.5, y - 0.2, f"{len(steps)} for each register{one}: {total}", va="center", fontsize=9, color="#666666"
        )
    title = "16 outputs, one pair of inputs, one row of x: registers of weights, and instructions"
    ax.set_title(title, loc="left", fontsize=10)
    ax.set(xlim=(-5, 26), ylim=(-len(LEVELS) + 0.4, 0.6))
    ax.axis("off")
    figure_files.save(figure, path)


# ---- policies

PIECE, LOST_US, CUT = 16, 3000, 150  # microseconds; what is left of the lost time on the axis


def draw_policies(path: Path) -> None:
    """The third column of the page's table: thread 1 loses its core in the middle of its second piece."""
    figure, ax = plt.subplots(figsize=(9, 4.4), layout="constrained")
    begin, back = 1.5 * PIECE, 1.5 * PIECE + CUT  # of the lost time, as drawn
    policies = {  # pieces of the leader; those of thread 1 before and after the one that is interrupted
        "fixed halves": (4, 1, 2),
        "taking over": (6, 1, 0),
        "taking back": (6, 1, 0),
        "sits out": (8, 0, 0),
    }
    for row, (name, (leader, before, after)) in enumerate(policies.items()):
        y = -2.6 * row
        is_out = name == "sits out"
        end = leader * PIECE if is_out else back + PIECE / 2 + after * PIECE
        bar(
            ax,
            y,
            [(0, leader * PIECE, WEIGHTS, f"{leader} pieces"), (leader * PIECE, end, WAIT, "" if is_out else "waits")],
        )
        if is_out:
            bar(ax, y - 1, [(0, end, WAIT, "gets no offer")])
        else:
            bar(
                ax,
                y - 1,
                [(0, begin, WEIGHTS, f"{before} ½"), (back, end, WEIGHTS, "½" if not after else f"½ + {after}")],
            )
            ax.add_patch(Rectangle((begin, y - 1.38), back - begin, 0.76, fc="white", ec=LOST, hatch="///", lw=0.8))
            ax.text((begin + back) / 2, y - 1, "another program, 3 ms", ha="center", va="center", fontsize=9,
                    bbox={"fc": "white", "ec": "none", "pad": 1.5})  # fmt: skip
        real = end if is_out else end - CUT + LOST_US
        ax.text(end + 4, y - 0.5, f"done after {real / 1000:.2f} ms", va="center", fontsize=10)
        ax.text(-4, y + 0.75, name, ha="left", va="center", fontsize=10, weight="bold")
        for thread in (0, 1):
            ax.text(
                -4, y - thread, "thread 0 (leads)" if thread == 0 else "thread 1", ha="right", va="center", fontsize=9
            )
    ax.set(xlim=(-50, 290), ylim=(-9.6, 1.2))
    ax.axis("off")
    figure_files.save(figure, path)


def bar(ax: Any, y: float, parts: list[tuple[float, float, str, str]]) -> None:
    """What a thread does: (begin, end, colour, text)."""
    for begin, end, colour, text in parts:
        if end > begin:
            ax.add_patch(Rectangle((begin, y - 0.38), end - begin, 0.76, fc=colour, ec="white", lw=1))
            ax.text((begin + end) / 2, y, text, ha="center", va="center", fontsize=9)


# ---- states

STATES = {"asleep": (0, 1.9), "ready": (3.4, 1.9), "offered": (6.8, 1.9), "awaited": (3.4, 0.3), "begun": (6.8, 0.3)}
CHANGES = (  # from, to, who, label, bend, where the label stands
    ("asleep", "offered", LEADER, "offers a part, and wakes the worker", -0.34, (0.75, 3.05)),
    ("ready", "offered", LEADER, "offers a part", -0.3, (5.1, 2.58)),
    ("offered", "ready", LEADER, "takes it back", 0.0, (5.1, 2.03)),
    ("ready", "asleep", WORKER, "no offer for 200 us", 0.0, (1.7, 2.03)),
    ("offered", "begun", WORKER, "takes it", 0.0, (7.2, 1.1)),
    ("begun", "awaited", LEADER, "sleeps after 50 us", 0.0, (5.1, 0.15)),
    ("begun", "ready", WORKER, "is done", 0.0, (5.0, 0.85)),
    ("awaited", "ready", WORKER, "is done, wakes the leader", 0.0, (2.3, 1.1)),
)


def draw_states(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    boxes = {}
    for name, (x, y) in STATES.items():
        fill = {"begun": WEIGHTS, "awaited": WEIGHTS, "asleep": WAIT}.get(name, "white")
        boxes[name] = FancyBboxPatch((x - 0.6, y - 0.25), 1.2, 0.5, boxstyle="round,pad=0.06", fc=fill, ec=INK)
        ax.add_patch(boxes[name])
        ax.text(x, y, name, ha="center", va="center", fontsize=11)
    for begin, end, colour, label, bend, (x, y) in CHANGES:
        arrow(ax, boxes, begin, end, colour, bend)
        ax.text(x, y, label, ha="center", va="center", fontsize=9, color=colour)
    note = (
        "Blue: the leader makes the change. Orange: the worker does. A worker that sits out gets no offers, and sleeps."
    )
    ax.text(-0.7, -0.4, note, fontsize=9, style="italic")
    ax.set(xlim=(-0.8, 7.7), ylim=(-0.5, 3.3))
    ax.axis("off")
    figure_files.save(figure, path)


def arrow(ax: Any, boxes: dict[str, Any], begin: str, end: str, colour: str, bend: float) -> None:
    ax.add_patch(
        FancyArrowPatch(
            STATES[begin], STATES[end], patchA=boxes[begin], patchB=boxes[end], arrowstyle="-|>", mutation_scale=13,
            color=colour, lw=1.4, connectionstyle=f"arc3,rad={bend}", shrinkA=2, shrinkB=2,
        )
    )  # fmt: skip


def main() -> None:
    args = figure_files.parser(__doc__).parse_args()
    figures = {
        "04c_conditions": draw_conditions,
        "04c_prompts": draw_prompts,
        "04c_levels": draw_levels,
        "04c_policies": draw_policies,
        "04c_states": draw_states,
    }
    figure_files.draw_all(figures, args.out)


if __name__ == "__main__":
    main()
