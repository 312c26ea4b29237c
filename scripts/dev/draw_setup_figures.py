"""Draw the pictures of docs/learn/00_project_setup: the rows of the package, the config, the states of a request.

Milestone: M0. vLLM counterpart: none. No torch, no weights, a second:

    python scripts/dev/draw_setup_figures.py [--out docs/learn/img]
"""

import dataclasses
from pathlib import Path

import figure_files
from figure_shapes import CORE, INK, LINE, TEXT, WORKER, arrow, box, canvas, note, panel, save
from matplotlib.axes import Axes

from folovllm.config import EngineConfig
from folovllm.learn.toy_engine import tiny_arch
from folovllm.request import RequestStatus


def main() -> None:
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)


# ---- 00_project_setup


def draw_rows(path: Path) -> None:
    """The rows of the package: a module imports from its own row or the rows above it."""
    rows = (
        ("0", "config  hf_config  milestones  request  outputs  ...", "plain data, no torch", CORE),
        ("1", "core/  trace/  sim/  executor/base, fake  engine/core", "the core, no torch", CORE),
        ("2", "attention/  sample/  model_executor/  csrc/", "model and kernels", WORKER),
        ("3", "worker/  executor/uniproc     engine/llm_engine, detokenizer, ...", "worker; text", WORKER),
        ("4", "hub/", "finds models", TEXT),
        ("5", "entrypoints/  benchmarks/  learn/", "what you call", TEXT),
    )
    axes = canvas(9, 3.9)
    for index, (number, modules, does, fill) in enumerate(rows):
        y = 3.25 - 0.62 * index
        panel(axes, 0.75, y, 6.35, 0.52, fill)
        if number == "3":  # its right half makes text
            panel(axes, 3.75, y, 3.35, 0.52, TEXT)
        note(axes, 0.85, y + 0.26, f"row {number}", 10, weight="bold")
        note(axes, 1.5, y + 0.26, modules, 9, family="monospace")
        note(axes, 7.2, y + 0.26, does, 9.5, color=LINE)
    arrow(axes, (0.4, 0.2), (0.4, 3.75), width=2)
    axes.text(0.2, 1.95, "imports go up only", rotation=90, ha="center", va="center", size=9.5, color=INK)
    save(axes, path)


def draw_config(path: Path) -> None:
    """From what a user typed to what the engine runs with: three objects, each frozen."""
    typed = EngineConfig.preset("m3", max_model_len=2048)
    resolved = typed.resolve(dataclasses.replace(tiny_arch(8192), dtype="bfloat16"), "cpu")
    axes = canvas(9, 2.5)
    for x, width, title, lines in (
        (0.1, 2.1, "what you typed", ['preset="m3"', "max_model_len=2048"]),
        (2.85, 2.55, "EngineConfig", config_lines(typed)),
        (6.05, 2.85, "EngineConfig, resolved", config_lines(resolved)),
    ):
        panel(axes, x, 0.75, width, 1.45, TEXT if x < 1 else CORE, LINE)
        note(axes, x + width / 2, 1.98, title, 10, weight="bold", ha="center")
        for row, text in enumerate(lines):
            note(axes, x + 0.12, 1.62 - 0.28 * row, text, 9, family="monospace")
    arrow(axes, (2.2, 1.45), (2.85, 1.45))
    arrow(axes, (5.4, 1.45), (6.05, 1.45))
    note(axes, 2.52, 0.5, "from_args: are names, types\nand ranges right?", 9, ha="center", color=LINE)
    note(axes, 5.72, 0.5, "resolve: reads the model's config.json\nand the device", 9, ha="center", color=LINE)
    save(axes, path)


def config_lines(config: EngineConfig) -> list[str]:
    values = {
        "block_size": config.cache_config.block_size,
        "dtype": config.model_config.dtype,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
    }
    return [f"{name}={value!r}".replace("'", '"') for name, value in values.items()]


def draw_states(path: Path) -> None:
    """The states of a request, and what moves it from one to the next."""
    axes = canvas(9, 3.5)
    for x, y, status in (
        (0.2, 2.45, RequestStatus.WAITING),
        (2.9, 2.45, RequestStatus.RUNNING),
        (2.9, 1.15, RequestStatus.PREEMPTED),
    ):
        box(axes, x, y, 1.6, status.name, height=0.5)
    arrow(axes, (1.8, 2.7), (2.9, 2.7))
    note(axes, 2.35, 2.88, "scheduled", 9, ha="center", color=LINE)
    arrow(axes, (3.5, 2.45), (3.5, 1.65))
    note(axes, 3.42, 2.05, "no blocks left", 9, ha="right", color=LINE)
    arrow(axes, (3.9, 1.65), (3.9, 2.45))
    note(axes, 3.98, 2.05, "scheduled\nagain", 9, color=LINE)
    whys = {
        RequestStatus.FINISHED_STOPPED: "end of text, or stop",
        RequestStatus.FINISHED_LENGTH_CAPPED: "limit of length",
        RequestStatus.FINISHED_ABORTED: "aborted by the user",
        RequestStatus.FINISHED_ERROR: "an exception",
    }
    assert list(whys) == [status for status in RequestStatus if RequestStatus.is_finished(status)]
    middles = [3.05 - 0.7 * row for row in range(len(whys))]
    for middle, (status, why) in zip(middles, whys.items(), strict=True):
        box(axes, 6.35, middle - 0.27, 2.5, status.name, why, height=0.54)
    draw_ends(axes, middles)
    save(axes, path)


def draw_ends(axes: Axes, middles: list[float]) -> None:
    """The arrows into the finished states: from RUNNING into all of them, from the other two into the last two."""
    trunk = 5.7
    axes.plot([4.5, trunk], [2.7, 2.7], color=LINE, lw=1.4)
    axes.plot([trunk, trunk], [middles[0], middles[-1]], color=LINE, lw=1.4)
    for middle in middles:
        arrow(axes, (trunk, middle), (6.35, middle))
    for start in ([1.0, 2.45], [3.7, 1.15]):
        axes.plot([start[0], start[0]], [start[1], 0.4], color=LINE, lw=1.2, ls="--")
    axes.plot([1.0, 6.0], [0.4, 0.4], color=LINE, lw=1.2, ls="--")
    axes.plot([6.0, 6.0], [0.4, middles[2] - 0.12], color=LINE, lw=1.2, ls="--")
    for middle in middles[2:]:
        arrow(axes, (6.0, middle - 0.12), (6.35, middle - 0.12))
    note(axes, 2.35, 0.57, "ended while it waits", 9, ha="center", color=LINE)


FIGURES = {
    "00_rows": draw_rows,
    "00_config": draw_config,
    "00_states": draw_states,
}


if __name__ == "__main__":
    main()
