"""Draw the pictures of docs/learn/02_continuous_batching.md.

Milestone: M2. vLLM counterpart: none. No torch, no GPU, a few seconds:

    python scripts/dev/draw_batching_figures.py [--out docs/learn/img]

The pictures of the three requests are runs of the real scheduler (folovllm/learn/three_requests.py). Workload A runs on
the fake executor. Measured points come from committed result files. No number is typed by hand, and the numbers that
the page quotes are asserted here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import figure_files
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from folovllm.benchmarks.workloads import make_workload
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.fake import FakeExecutor
from folovllm.hf_config import ModelArchitecture, parse_hf_config
from folovllm.learn.three_requests import EXAMPLES, PIECES, Step, example_core, example_request, run_example, run_step
from folovllm.learn.toy_engine import make_core, make_request
from folovllm.sim.hardware import HARDWARE
from folovllm.viz import INK, NOBODY, PALETTE

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "milestones/m4/results/profile_step.json"
SMOLLM2 = ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json"
COLOURS = dict(zip("abc", PALETTE, strict=False))
ON = {"a": "white", "b": INK, "c": "white"}  # text on COLOURS
CORE, WORKER, TEXT = "#ddf4ff", "#ffe3cc", "#eeeeee"  # fills of the components, on all pages
LINE = "#57606a"
RUNS: dict[str, dict[str, Any]] = {
    "one at a time (M1)": {"max_num_seqs": 1, "batching": "static"},
    "static batching, two seats": {"max_num_seqs": 2, "batching": "static"},
    "continuous batching, two seats (M2)": {"max_num_seqs": 2},
}


def piece(token_id: int) -> str:
    """A token as it is written into a cell, with \u2423 for a space, as on page 00. Punctuation stands in quotes."""
    text = PIECES[token_id].replace("\n", r"\n").replace(" ", "\u2423")
    return text if text[-1].isalnum() else f'"{text}"'


# ---- who computes when


def timeline(path: Path) -> None:
    """The three requests under three policies, on one axis of steps."""
    runs = {name: list(run_example(example_core(block_size=16, **args))) for name, args in RUNS.items()}
    assert [len(steps) for steps in runs.values()] == [12, 8, 6]
    figure, axes = plt.subplots(3, 1, figsize=(9, 6.6), sharex=True, layout="constrained")
    for ax, (name, steps) in zip(axes, runs.items(), strict=True):
        draw_steps(ax, steps)
        ax.set_title(f"{name}: {len(steps)} steps", fontsize=11, loc="left", weight="bold")
    first_batch = runs["static batching, two seats"]
    empty = [step.number for step in first_batch if step.waiting and len(step.scheduled) == 1]
    for number in empty:
        axes[1].add_patch(Rectangle((number + 0.03, -0.4), 0.94, 0.8, fc="white", ec=INK, lw=1, ls=":"))
        axes[1].text(number + 0.5, 0, "empty\nseat", ha="center", va="center", fontsize=9, color=INK)
    axes[0].text(
        5.2, 0, "number: tokens computed in the step; below it: the token sampled\nblack frame: the prompt is computed",
        ha="left", va="center", fontsize=9.5, color=INK,
    )  # fmt: skip
    axes[2].set_xlabel("step")
    figure_files.save(figure, path)


def draw_steps(ax: Axes, steps: list[Step], num_steps: int = 12, with_blocks: bool = False) -> None:
    """A row per request, a cell per step: how many tokens it computes, below the token that it samples, its blocks."""
    for row, (name, example) in enumerate(EXAMPLES.items()):
        mine = [step.number for step in steps if name in step.scheduled]
        idle = [step.number for step in steps if example.arrival <= step.number < mine[-1] and step.number not in mine]
        for number in idle:
            ax.plot([number, number + 1], [row, row], color="#999999", lw=1.4, zorder=1)
        for start in [n for n in idle if n - 1 not in idle]:
            ax.text(start + 0.12, row - 0.04, "waits", ha="left", va="bottom", fontsize=9, color=LINE)
        for step in steps:
            if name in step.scheduled:
                draw_cell(ax, step, name, row, with_blocks)
    ax.set(xlim=(0, num_steps), ylim=(len(EXAMPLES) - 0.5, -0.55))
    ax.set_xticks([n + 0.5 for n in range(num_steps)], [str(n) for n in range(num_steps)])
    ax.set_yticks(range(len(EXAMPLES)), list(EXAMPLES), fontsize=11, weight="bold")
    for label, colour in zip(ax.get_yticklabels(), COLOURS.values(), strict=True):
        label.set_color(colour)
    ax.tick_params(length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def draw_cell(ax: Axes, step: Step, name: str, row: int, with_blocks: bool) -> None:
    count = step.scheduled[name]
    corner = (step.number + 0.04, row - 0.39)
    width = 2.5 if count > 1 else 0
    ax.add_patch(Rectangle(corner, 0.92, 0.78, fc=COLOURS[name], ec="black", lw=width, zorder=2))
    label = f"{count}" + "".join(f"\n{piece(token_id)}" for token_id in step.sampled[name])
    if with_blocks:
        label += f"\n{step.blocks[name]}"
    ax.text(step.number + 0.5, row, label, ha="center", va="center", fontsize=9.5, color=ON[name], zorder=3)


# ---- one step


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=LINE, lw=1.5, shrinkA=0, shrinkB=0)
    )


def box(ax: Axes, x: float, y: float, width: float, height: float, fill: str, title: str, lines: list[str]) -> None:
    """A rounded box with its lower left corner at (x, y), a bold title and lines of text."""
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=fill, ec=LINE, lw=1)
    )
    ax.text(x + 0.16, y + height - 0.26, title, ha="left", va="center", fontsize=10.5, weight="bold", color=INK)
    for i, text in enumerate(lines):
        ax.text(x + 0.16, y + height - 0.62 - 0.32 * i, text, ha="left", va="center", fontsize=9.5, color=INK)


def run_until(number: int, **engine_args: Any) -> tuple[Any, SchedulerOutput, dict[str, list[str]]]:
    """Steps 0 to `number` - 1 of the three requests, then `schedule` of step `number`: core, message, queues before."""
    core = example_core(block_size=16, **engine_args)
    for i in range(number):
        for name, example in EXAMPLES.items():
            if example.arrival == i:
                core.add_request(example_request(name))
        run_step(core, i)
    scheduler = core.scheduler
    before = {
        "running": [request.request_id for request in scheduler.running],
        "waiting": [request.request_id for request in scheduler.waiting],
    }
    return core, scheduler.schedule(), before


def step_loop(path: Path) -> None:
    """Step 4 of the three requests: schedule, the message down, execute and sample, the message up, update."""
    core, output, before = run_until(4, max_num_seqs=2)
    counts = output.num_scheduled_tokens
    assert (before, counts) == ({"running": ["b"], "waiting": ["c"]}, {"b": 1, "c": 12})
    computed = {name: core.scheduler.requests[name].num_computed_tokens - counts[name] for name in counts}
    known = {name: core.scheduler.requests[name].num_tokens for name in counts}
    result = core.executor.sample(core.executor.execute(output))
    core.scheduler.update_from_output(output, result)
    sampled = {name: PIECES[ids[0]] for name, ids in result.sampled_token_ids.items()}
    after = {name: core.scheduler.requests[name].num_tokens for name in counts}
    (new,) = output.scheduled_new_reqs

    figure, ax = plt.subplots(figsize=(9, 4.9))
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.995)
    ax.set(xlim=(0, 12), ylim=(0, 6.5))
    ax.axis("off")
    ax.text(0.15, 6.25, "core: decides, without tensors", fontsize=10, color=LINE, va="center")
    ax.text(8.05, 6.25, "worker: computes", fontsize=10, color=LINE, va="center")
    box(ax, 0.15, 3.55, 4.05, 2.4, CORE, "1  schedule()", [
        "running: b     waiting: c     (a has ended)",
        *(f"{n}: {known[n]} known - {computed[n]} computed = {counts[n]}" for n in counts),
        "b continues, c is admitted to the free seat",
        f"computed advances to {computed['b'] + counts['b']} and {computed['c'] + counts['c']} at once",
    ])  # fmt: skip
    box(ax, 8.05, 3.55, 3.8, 2.4, WORKER, "2  execute()", [
        f"one forward pass over {output.total_num_scheduled_tokens} tokens:",
        f"{counts['b']} of b and {counts['c']} of c, without padding",
        "their K and V are written to the cache;",
        "each token attends to its own request",
    ])  # fmt: skip
    box(ax, 8.05, 0.2, 3.8, 2.1, WORKER, "3  sample()", [
        "two rows of logits: the last token",
        "of b and the last token of c",
        *(f"{name} -> {sampled[name]!r}" for name in counts),
    ])  # fmt: skip
    box(ax, 0.15, 0.2, 4.05, 2.1, CORE, "4  update_from_output()", [
        *(f"{name}: append {sampled[name]!r}, now {after[name]} known" for name in counts),
        "check_stop: neither has ended",
        "running: b, c     waiting: nothing",
    ])  # fmt: skip
    arrow(ax, (4.25, 4.75), (8.0, 4.75))
    arrow(ax, (9.95, 3.5), (9.95, 2.35))
    arrow(ax, (8.0, 1.25), (4.25, 1.25))
    arrow(ax, (2.15, 2.35), (2.15, 3.5))
    tokens = ", ".join(f"{n}: {count}" for n, count in counts.items())
    ids = ", ".join(f"{n}: {token_ids}" for n, token_ids in result.sampled_token_ids.items())
    finished = ", ".join(sorted(output.finished_req_ids))
    for y, text, style in (
        (5.4, "SchedulerOutput", "italic"),
        (5.02, f"tokens {{{tokens}}}", "normal"),
        (4.45, f"new: c, whole, block {new.block_ids[0]}", "normal"),
        (4.1, "known: b, only what changed", "normal"),
        (3.75, f"finished: {finished}", "normal"),
        (1.9, "ModelRunnerOutput", "italic"),
        (1.52, f"tokens {{{ids}}}", "normal"),
    ):
        ax.text(6.12, y, text, ha="center", va="center", fontsize=9.5, style=style, color=INK)
    ax.text(2.3, 2.92, "next step", ha="left", va="center", fontsize=10, style="italic", color=INK)
    figure_files.save(figure, path)


# ---- the two passes


def two_passes(path: Path) -> None:
    """Step 1 of the page's example of a head of the queue that does not fit: x runs, y and z wait."""
    core = make_core(num_kv_blocks=5, block_size=4)
    for name, length in {"x": 7, "y": 9, "z": 1}.items():
        core.add_request(make_request(name, length, max_tokens=2))
    core.step()
    scheduler = core.scheduler
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    lacks = {name: request.num_tokens - request.num_computed_tokens for name, request in scheduler.requests.items()}
    needs = {name: -(-lacks[name] // 4) for name in "yz"}
    assert ([r.request_id for r in scheduler.running], [r.request_id for r in scheduler.waiting]) == (["x"], ["y", "z"])
    assert (free, lacks, needs) == (2, {"x": 1, "y": 9, "z": 1}, {"y": 3, "z": 1})
    assert scheduler.schedule().num_scheduled_tokens == {"x": 1}

    figure, ax = plt.subplots(figsize=(9, 3.4))
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.995)
    ax.set(xlim=(0, 12), ylim=(-0.1, 4.43))
    ax.axis("off")
    box(ax, 0.15, 1.15, 4.9, 2.2, CORE, "running (first admitted first)", [])
    box(ax, 6.95, 1.15, 4.9, 2.2, CORE, "waiting (head first)", [])
    queue_cell(ax, 0.4, "x", f"lacks {lacks['x']} token,\nfits its 2nd block")
    queue_cell(ax, 7.2, "y", f"lacks {lacks['y']} tokens,\nneeds {needs['y']} blocks")
    queue_cell(ax, 9.5, "z", f"lacks {lacks['z']} token,\nneeds {needs['z']} block")
    arrow(ax, (6.9, 2.1), (5.1, 2.1))
    ax.text(6, 2.25, "admit", ha="center", va="bottom", fontsize=10, color=INK)
    ax.text(
        2.6,
        3.85,
        "Pass 1: each running request gets what it lacks.\nx computes 1 token.",
        ha="center",
        va="center",
        fontsize=10,
        color=INK,
    )
    ax.text(
        9.4,
        3.85,
        f"Pass 2: the head only. {free} blocks are free, so y\ndoes not fit. The pass ends, z is not tried.",
        ha="center",
        va="center",
        fontsize=10,
        color=INK,
    )
    bend = FancyArrowPatch(
        (3.9, 1.1), (8.2, 1.1), arrowstyle="-|>", mutation_scale=14, color=PALETTE[5], lw=1.5, ls="--",
        connectionstyle="arc3,rad=0.2", shrinkA=0, shrinkB=0,
    )  # fmt: skip
    ax.add_patch(bend)
    ax.text(
        6.05,
        0.25,
        "preempt: the last admitted returns to the head",
        ha="center",
        va="center",
        fontsize=10,
        color=PALETTE[5],
    )
    figure_files.save(figure, path)


def queue_cell(ax: Axes, x: float, name: str, text: str) -> None:
    """A request in a queue, 2.1 wide."""
    ax.add_patch(Rectangle((x, 1.4), 2.1, 1.35, fc="white", ec=LINE, lw=1))
    ax.text(x + 1.05, 2.5, name, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    ax.text(x + 1.05, 1.88, text, ha="center", va="center", fontsize=9.5, color=INK)


# ---- the flat batch


def flat_batch(path: Path) -> None:
    """Step 4 as a padded rectangle, and as the one row that the worker computes."""
    core, output, _ = run_until(4, max_num_seqs=2)
    rows = list(flat_rows(core, output))
    assert [(name, position, slot) for name, position, slot, _ in rows][:3] == [
        ("b", 7, 39),
        ("c", 0, 16),
        ("c", 1, 17),
    ]
    counts = output.num_scheduled_tokens
    width = max(counts.values())
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 5), gridspec_kw={"height_ratios": [2, 3.3]}, layout="constrained"
    )
    for line, (name, count) in enumerate(counts.items()):
        mine = [text for owner, _, _, text in rows if owner == name]
        for x in range(width):
            if x < count:
                token_cell(top, x, line, COLOURS[name], mine[x], ON[name])
            else:
                token_cell(top, x, line, NOBODY, "pad")
        top.text(-0.35, line + 0.4, name, ha="right", va="center", fontsize=11, weight="bold", color=COLOURS[name])
    padding = width * len(counts) - len(rows)
    top.set_title(
        f"A rectangle: {width * len(counts)} positions, of which {padding} are padding", fontsize=11, loc="left",
        weight="bold",
    )  # fmt: skip
    for x, (name, position, slot, text) in enumerate(rows):
        token_cell(bottom, x, 0, COLOURS[name], text, ON[name])
        bottom.text(x + 0.48, 1.12, str(position), ha="center", va="center", fontsize=9.5, color=INK)
        bottom.text(x + 0.48, 1.62, str(slot), ha="center", va="center", fontsize=9.5, color=INK)
    for y, label in ((0.4, "token"), (1.12, "position"), (1.62, "KV slot")):
        bottom.text(-0.35, y, label, ha="right", va="center", fontsize=9.5, color=INK)
    starts = [0]
    for count in counts.values():
        starts.append(starts[-1] + count)
    for (name, count), start in zip(counts.items(), starts, strict=False):
        ends = (start + 0.04, 2.1), (start + count - 0.06, 2.1)
        bottom.annotate("", *ends, arrowprops={"arrowstyle": "<->", "color": COLOURS[name]})
    for x in starts:
        bottom.text(x, 2.5, str(x), ha="center", va="center", fontsize=9.5, weight="bold", color=INK)
    bottom.text(-0.35, 2.5, "query_start_loc", ha="right", va="center", fontsize=9.5, color=INK)
    said = [f"{name}: {slot // 16} * 16 + {position} = {slot}" for name, position, slot, _ in (rows[0], rows[-1])]
    bottom.text(
        6.2,
        3.15,
        "slot = block * 16 + position % 16.     " + "     ".join(said),
        ha="center",
        va="center",
        fontsize=9.5,
        color=LINE,
    )
    bottom.set_title(f"The flat batch: {len(rows)} rows, no padding", fontsize=11, loc="left", weight="bold")
    for ax, height in ((top, 2), (bottom, 3.4)):
        ax.set(xlim=(-2.1, 13.2), ylim=(height, -0.1))
        ax.axis("off")
    figure_files.save(figure, path)


def flat_rows(core: Any, output: SchedulerOutput) -> Iterator[tuple[str, int, int, str]]:
    """Request, position, KV slot and text of every row of the flat batch. `advance` has run already."""
    for name, count in output.num_scheduled_tokens.items():
        request = core.scheduler.requests[name]
        (table,) = core.scheduler.kv_cache_manager.get_block_ids(name)
        size = core.kv_cache_config.block_size
        for position in range(request.num_computed_tokens - count, request.num_computed_tokens):
            slot = table[position // size] * size + position % size
            yield name, position, slot, piece(request.all_token_ids[position])


def token_cell(ax: Axes, x: float, y: float, colour: str, text: str, ink: str = INK) -> None:
    ax.add_patch(Rectangle((x + 0.02, y), 0.94, 0.8, fc=colour, ec="none"))
    ax.text(x + 0.49, y + 0.4, text, ha="center", va="center", fontsize=9, color=ink)


# ---- what sharing a step costs


def throughput(path: Path) -> None:
    """Tokens per second by requests in a step: the model of the reference machine, and what was measured."""
    sizes = [2 ** (i / 16) for i in range(113)]
    figure, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    ax.plot(sizes, [n / step_seconds(n) for n in sizes], color=INK, lw=1.8)
    ax.text(
        1, 700, f"estimate: bytes / {CPU.gb_per_s:.1f} GB/s\nor FLOP / {CPU.flops / 1e9:.0f} GFLOP/s, the longer one",
        ha="left", va="bottom", fontsize=9.5, color=INK,
    )  # fmt: skip
    even = knee()
    ax.axvline(even, color="#999999", lw=1, ls=":")
    ax.text(even * 0.95, 24, "memory is the limit", ha="right", va="bottom", fontsize=9.5, color=LINE)
    ax.text(even * 1.06, 24, "arithmetic is the limit", ha="left", va="bottom", fontsize=9.5, color=LINE)
    for arm, label, colour in (
        ("1 plain torch", "plain torch (M1 to M3),\n2 points measured", PALETTE[0]),
        ("7 + huge pages", "fast kernels (M4),\n2 points measured", PALETTE[5]),
    ):
        speeds = {row["requests"]: row["requests"] / row["step"] * 1e6 for row in profile_rows(arm)}
        ax.plot(list(speeds), list(speeds.values()), "o", color=colour, ms=8)
        for n, speed in speeds.items():
            ax.annotate(
                f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}",
                (n, speed),
                (0, -15),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
                color=colour,
            )
        ax.text(32 * 1.25, speeds[32], label, ha="left", va="center", fontsize=9.5, color=colour)
    ax.set(xscale="log", yscale="log", xlim=(0.85, 128), ylim=(22, 2600))
    ax.set(xlabel="requests that decode together in one step", ylabel="tokens per second")
    ax.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    ax.set_yticks([30, 100, 300, 1000, 2000], ["30", "100", "300", "1,000", "2,000"])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    figure_files.save(figure, path)


CPU = HARDWARE["cpu"]
CONTEXT = 200  # tokens that each request has in its KV cache, as in the measurement


def arch() -> ModelArchitecture:
    return parse_hf_config(json.loads(SMOLLM2.read_text(encoding="utf-8")))


PARAMETERS = 134_515_008  # of SmolLM2-135M
KV_BYTES = arch().kv_bytes_per_token(2)


def step_bytes(requests: float) -> float:
    return 2 * PARAMETERS + requests * CONTEXT * KV_BYTES


def step_flops(requests: float) -> float:
    """A multiply and an add per weight and token. The attention's own are 5 % of that, and left out."""
    return requests * 2 * PARAMETERS


def step_seconds(requests: float) -> float:
    return max(step_bytes(requests) / CPU.bandwidth, step_flops(requests) / CPU.flops)


def knee() -> float:
    """Requests at which memory and arithmetic take equally long."""
    weights, per_request = step_bytes(0) / CPU.bandwidth, KV_BYTES * CONTEXT / CPU.bandwidth
    return weights / (step_flops(1) / CPU.flops - per_request)


def profile_rows(arm: str) -> list[dict[str, Any]]:
    profile = json.loads(PROFILE.read_text(encoding="utf-8"))
    assert profile["run"]["context"] == CONTEXT
    return [row for row in profile["results"] if row["arm"] == arm]


# ---- workload A


def workload(path: Path) -> None:
    """32 requests of workload A: who runs under static and continuous batching, and how uneven the steps get."""
    static, continuous = (workload_steps(batching, 8) for batching in ("static", "continuous"))
    wide = workload_steps("continuous", 32)
    assert (len(static), len(continuous), len(wide)) == (453, 312, 128)
    assert (max(tokens for _, tokens in wide), min(tokens for _, tokens in wide)) == (1987, 1)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.6), gridspec_kw={"width_ratios": [1.25, 1]}, layout="constrained"
    )
    for steps, name, colour, x in ((static, "static", PALETTE[5], 350), (continuous, "continuous", PALETTE[2], 130)):
        left.plot([running for running, _ in steps], color=colour, lw=1.6)
        left.text(x, 8.25, f"{name}: {len(steps)} steps", ha="center", va="bottom", fontsize=9.5, color=colour)
    left.set(xlabel="step", ylim=(0, 9.4), xlim=(-6, 460))
    left.set_title("8 seats: requests that run", fontsize=11)
    right.plot([tokens for _, tokens in wide], color=PALETTE[0], lw=1.6)
    right.set(xlabel="step", yscale="log", ylim=(0.8, 4000), xlim=(-3, 131))
    right.set_title("32 seats, continuous: tokens in a step", fontsize=11)
    right.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    most = max(range(len(wide)), key=lambda i: wide[i][1])
    right.annotate(
        f"step {most}: {wide[most][1]:,} tokens,\nalmost all of them of prompts", (most, wide[most][1]), (16, -4),
        textcoords="offset points", va="center", fontsize=9.5, color=INK, arrowprops={"arrowstyle": "-", "color": LINE},
    )  # fmt: skip
    right.text(40, 44, "only decodes, one token each", ha="left", va="bottom", fontsize=9.5, color=INK)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    figure_files.save(figure, path)


def workload_steps(batching: str, seats: int) -> list[tuple[int, int]]:
    """(running requests, computed tokens) of every step."""
    core = make_core(FakeExecutor(), max_model_len=2048, block_size=16, batching=batching, max_num_seqs=seats)
    for i, request in enumerate(make_workload("A", vocab_size=49152).requests):
        core.add_request(make_request(f"r{i}", request.prompt_token_ids, max_tokens=request.output_len))
    steps = []
    while core.has_unfinished_requests():
        output = core.scheduler.schedule()
        steps.append((len(output.num_scheduled_tokens), output.total_num_scheduled_tokens))
        core.scheduler.update_from_output(output, core.executor.sample(core.executor.execute(output)))
    return steps


# ---- preemption


def preemption(path: Path) -> None:
    """The three requests with memory for 6 blocks of 4 tokens: c is admitted, preempted and resumed."""
    core = example_core(num_kv_blocks=7)
    steps = list(run_example(core))
    assert [step.number for step in steps if step.preempted] == [5] and len(steps) == 7
    figure, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    draw_steps(ax, steps, num_steps=len(steps), with_blocks=True)
    ax.text(2.12, 2.05, "no memory", ha="left", va="top", fontsize=9, color=LINE)
    ax.add_patch(Rectangle((5.03, 1.6), 0.94, 0.8, fc="white", ec=PALETTE[5], lw=1.6, zorder=4))
    ax.text(5.5, 2, "preempted:\nloses its blocks", ha="center", va="center", fontsize=9.5, color=PALETTE[5], zorder=5)
    assert steps[4].blocks["b"] + [6] == steps[5].blocks["b"]
    ax.text(4.1, 0, "a has ended: blocks 1\nand 2 are free for c", ha="left", va="center", fontsize=9, color=LINE)
    ax.text(5.5, 0.52, "takes the last block, 6", ha="center", va="bottom", fontsize=9, color=PALETTE[5])
    held = [sum(len(blocks) for blocks in step.blocks.values()) for step in steps]
    ax.set_xticks([n + 0.5 for n in range(len(steps))], [f"step {n}\n{held[n]} of 6 blocks" for n in range(len(steps))])
    figure_files.save(figure, path)


FIGURES = {
    "02_timeline": timeline,
    "02_step_loop": step_loop,
    "02_two_passes": two_passes,
    "02_flat_batch": flat_batch,
    "02_throughput": throughput,
    "02_workload": workload,
    "02_preemption": preemption,
}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
