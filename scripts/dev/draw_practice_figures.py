"""Draws the pictures of docs/learn/exercises.md and simulator.md: grading, all exercises, a long prompt, a step's time.

Milestone: M5. vLLM counterpart: none. No torch, no weights, a few seconds. What is drawn comes from the exercises and
from the simulator:

    python scripts/dev/draw_practice_figures.py [--out docs/learn/img]
"""

import tempfile
from pathlib import Path
from typing import Any

import figure_files
from figure_shapes import CORE, INK, LINE, TEXT, WORKER, arrow, canvas, note, panel, save
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

from folovllm import viz
from folovllm.learn.exercise import find_exercises
from folovllm.milestones import LADDER
from folovllm.model_shapes import shape_architecture
from folovllm.sim.cost import GPU_CALIBRATION, CostModel
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.simulate import simulate
from folovllm.sim.workloads import make_sim_workload
from folovllm.trace.record import read_trace

BLUE, ORANGE, GREEN = viz.PALETTE[:3]
DIFFICULTIES = {1: ("easy", GREEN), 2: ("medium", BLUE), 3: ("hard", ORANGE)}
SPACE = 0.25  # seconds that a picture of the simulator shows on either side of a long prompt
MODEL, GPU = "qwen3-8b", "h100"


def grading(path: Path) -> None:
    """From the learner's file through the stages of a check to the engine."""
    axes = canvas(9, 3.0)
    stages = (
        ("your file", "work/m0/\nrequest_states.py:\na class, your methods", TEXT),
        ("cases", "contract, unit,\nproperty: functions\ncall your methods", "white"),
        ("toy engine", "trace: the real\nscheduler and KV\ncache, no weights", CORE),
        ("real engine", "engine: a tiny model\nof random weights\ngives tokens", WORKER),
    )
    width, gap = 1.8, 0.43
    for i, (title, does, fill) in enumerate(stages):
        x = 0.25 + i * (width + gap)
        panel(axes, x, 1.35, width, 1.35, fill, LINE)
        note(axes, x + width / 2, 2.45, title, size=11, ha="center", weight="bold")
        note(axes, x + width / 2, 1.85, does, size=9.5, ha="center")
        if i:
            arrow(axes, (x - gap + 0.03, 2.05), (x - 0.03, 2.05))
            arrow(axes, (x + width / 2, 1.32), (x + width / 2, 0.83), colour="#cf222e")
    axes.plot([1.15, 0.25 + 3 * (width + gap) + width / 2], [0.8, 0.8], color="#cf222e", lw=1.4)
    arrow(axes, (1.15, 0.8), (1.15, 1.32), colour="#cf222e")
    note(
        axes, 4.6, 0.42, "if a check fails: the rule, what came out and what was expected, your line, a hint",
        size=10, ha="center", color="#cf222e",
    )  # fmt: skip
    save(axes, path)


def all_exercises(path: Path) -> None:
    """A row per milestone, a box per exercise that is as wide as its minutes; the fast track is framed."""
    exercises = find_exercises()
    figure, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    longest = 0
    for row, rung in enumerate(LADDER):
        start = 0
        for exercise in (e for e in exercises if e.milestone == rung.id):
            _, colour = DIFFICULTIES[exercise.level]
            look: dict[str, Any] = {"ec": INK, "lw": 2.2, "zorder": 3} if exercise.fast else {"ec": "white", "lw": 1}
            ax.add_patch(Rectangle((start + 0.5, row - 0.4), exercise.minutes - 1, 0.8, fc=colour, **look))
            name = exercise.name.replace("_", "_\n" if exercise.minutes < 40 else "_")
            colour = "white" if exercise.level < 3 else INK
            ax.text(
                start + exercise.minutes / 2,
                row,
                name,
                ha="center",
                va="center",
                size=9 if exercise.minutes > 20 else 8,
                color=colour,
                zorder=4,
            )
            start += exercise.minutes
        longest = max(longest, start)
    ax.set(xlim=(0, longest + 2), ylim=(len(LADDER) - 0.5, -0.5), xlabel="minutes (estimates)")
    ax.set_yticks(range(len(LADDER)), [f"{rung.id.upper()} {rung.title}" for rung in LADDER])
    ax.spines[["top", "right"]].set_visible(False)
    handles = [Patch(fc=colour, label=label) for label, colour in DIFFICULTIES.values()]
    framed = Patch(fc="white", ec=INK, lw=2.2, label="in the fast track")
    figure.legend(handles=[*handles, framed], loc="outside upper center", ncols=4, frameon=False)
    figure_files.save(figure, path)


# ---- the simulator


def steps_of(preset: str) -> list[dict[str, Any]]:
    """The steps of the page's run, as a trace has them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        simulate(make_sim_workload("long-prompts", num_requests=64), MODEL, GPU, preset=preset, trace=file)
        return list(read_trace(file).steps)


def long_prompt(path: Path) -> None:
    """The same long prompt in m4 and in m5: when it is computed, and when the others get their tokens."""
    runs = {preset: steps_of(preset) for preset in ("m4", "m5")}
    _, document = max((entry["n"], entry["req"]) for step in runs["m4"] for entry in step["sched"])
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, layout="constrained")
    texts = {"m4": "m4: the whole prompt in one step", "m5": "m5: the prompt in chunks, over several steps"}
    zero, end = _span(runs["m4"], document)
    shown = [step for step in runs["m4"] if zero - SPACE < step["t0"] < end + SPACE]
    names = list(dict.fromkeys(entry["req"] for step in shown for entry in step["sched"]))
    others = [name for name in names if name != document and _decodes_through(runs, name, zero, end)]
    rows = [document, *others[:4]]
    for ax, (preset, steps) in zip(axes, runs.items(), strict=True):
        begun = _span(steps, document)[0]
        for step in (step for step in steps if -SPACE < step["t0"] - begun < end - zero + SPACE):
            for entry in step["sched"]:
                if entry["req"] in rows:
                    _draw_work(ax, step, entry, rows.index(entry["req"]), begun)
        ax.set(ylim=(len(rows) - 0.4, -0.6), xlim=(-1e3 * SPACE / 2, 1e3 * (end - zero + SPACE)))
        ax.set_yticks(range(len(rows)), ["document", *(f"user {i}" for i in range(1, len(rows)))], fontsize=10)
        ax.set_title(texts[preset], loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlabel("milliseconds since the document's prompt was begun")
    figure_files.save(figure, path)


def _span(steps: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """When the prompt of a request is begun, and when it is done."""
    mine = [step for step in steps for entry in step["sched"] if entry["req"] == name and entry["n"] > 1]
    return mine[0]["t0"], mine[-1]["t0"] + mine[-1]["dur"]


def _decodes_through(runs: dict[str, list[dict[str, Any]]], name: str, start: float, end: float) -> bool:
    """Whether the request decodes before `start` and after `end` in every run."""
    times = [[s["t0"] for s in run for e in s["sched"] if e["req"] == name and e["n"] == 1] for run in runs.values()]
    return all(found and min(found) < start - SPACE / 2 and max(found) > end + SPACE / 2 for found in times)


def _draw_work(ax: Any, step: dict[str, Any], entry: dict[str, Any], row: int, zero: float) -> None:
    """A prompt is hatched and has its number of tokens; a decode is a bar as long as its step."""
    start, length = 1e3 * (step["t0"] - zero), 1e3 * step["dur"]
    is_prompt = entry["n"] > 1
    look = {"fc": ORANGE, "hatch": "////"} if is_prompt else {"fc": BLUE}
    ax.add_patch(Rectangle((start, row - 0.38), length, 0.76, ec="white", lw=0.8, **look))
    middle: dict[str, Any] = {"ha": "center", "va": "center", "size": 9, "clip_on": True}
    if is_prompt and length > 20:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        ax.text(start + length / 2, row, f"{entry['n']:,}", bbox=box, **middle)
    elif length > 100 and row == 1:
        ax.text(start + length / 2, row, f"no token for {length:.0f} ms", color="white", **middle)


def step_time(path: Path) -> None:
    """The formula of the page: what a step takes by the number of tokens that it computes."""
    machine = HARDWARE[GPU]
    model = CostModel(shape_architecture(MODEL), machine, GPU_CALIBRATION)
    counts = [2**i for i in range(15)]
    costs = [model.step([(0, count)], 1) for count in counts]
    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    ax.plot(counts, [1e3 * cost.seconds for cost in costs], color=INK, lw=2.5, marker="o", ms=4)
    ax.plot(counts, [1e3 * cost.memory for cost in costs], color=BLUE, ls="--")
    ax.plot(counts, [1e3 * cost.compute for cost in costs], color=ORANGE, ls="--")
    ax.set(xscale="log", yscale="log", xlabel="tokens of one prompt in the step", ylabel="ms (log)", ylim=(1, 2000))
    ax.set_xticks(counts[::2], [f"{count:,}" for count in counts[::2]])
    ax.minorticks_off()
    note(ax, 1.1, 9.2, "the step: the longer of the two, plus the overhead", size=10)
    note(ax, 1.1, 3.6, "reading all weights and the KV cache", size=10, color=BLUE)
    note(ax, 130, 1.4, "computing", size=10, color=ORANGE)
    ax.set_title(f"{MODEL} on {machine.name}", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    figure_files.save(figure, path)


FIGURES = {
    "exercise_grading": grading,
    "exercise_minutes": all_exercises,
    "sim_long_prompt": long_prompt,
    "sim_step_time": step_time,
}


def main() -> None:
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__ or "").parse_args().out)


if __name__ == "__main__":
    main()
