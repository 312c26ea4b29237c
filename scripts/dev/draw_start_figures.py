"""Draw the pictures of docs/learn/00_start_here.

Milestone: M1. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_start_figures.py [--out docs/learn/img]

Block ids, slots and token counts come from the three requests on the real scheduler (folovllm/learn/three_requests.py).
The numbers that the page quotes are asserted here.
"""

import json
from pathlib import Path

import figure_files
from figure_shapes import (
    BLOCK_SIZE,
    COLOURS,
    CORE,
    FREE,
    INK,
    LINE,
    ON,
    PALE,
    TEXT,
    WORKER,
    arrow,
    best,
    box,
    canvas,
    cell,
    known_ids,
    note,
    panel,
    piece,
    save,
    step_of,
    visible,
)
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.learn.three_requests import PIECES, Step, example_core, run_example


def main() -> None:
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)


# ---- 00: components


def draw_components(path: Path) -> None:
    """Three parts and what passes between them, with the messages of step 2 of the three requests."""
    step = step_of(2, num_kv_blocks=10)
    assert step.scheduled == {"a": 1, "b": 1, "c": 12} and step.blocks["c"] == [5, 6, 7]
    axes = canvas(9, 7.2)
    bands = (
        (5.75, 1.35, TEXT, "TEXT", "strings and token ids"),
        (2.6, 2.15, CORE, "CORE decides", "plain Python, no tensors"),
        (0.1, 1.52, WORKER, "WORKER computes", "torch and C++; the core calls it through an executor"),
    )
    for y, height, fill, title, note_text in bands:
        panel(axes, 0.1, y, 8.8, height, fill)
        note(axes, 0.9, y + height - 0.2, title, 11, weight="bold")
        note(axes, 2.75, y + height - 0.2, note_text, 9, color=LINE)
    draw_components_text(axes)
    draw_components_core(axes)
    draw_components_worker(axes)
    draw_messages(axes, step)
    save(axes, path)


def draw_components_text(axes: Axes) -> None:
    box(axes, 0.3, 5.95, 2.5, "input processor", "text to token ids")
    box(axes, 3.25, 5.95, 2.5, "you: LLM.generate(...)", "prompts in, answers out")
    box(axes, 6.2, 5.95, 2.5, "output processor", "token ids to text")
    arrow(axes, (3.25, 6.26), (2.8, 6.26))
    arrow(axes, (6.2, 6.26), (5.75, 6.26))


def draw_components_core(axes: Axes) -> None:
    box(axes, 0.3, 3.8, 8.4, "engine core", "the loop: one step after another, until no request is left")
    box(axes, 2.1, 2.75, 2.3, "scheduler", "tokens for each request")
    box(axes, 4.75, 2.75, 2.3, "KV cache manager", "blocks for each request")
    for start, end in (((3.15, 3.8), (3.15, 3.37)), ((3.35, 3.37), (3.35, 3.8))):
        arrow(axes, start, end)
    for start, end in (((4.4, 3.16), (4.75, 3.16)), ((4.75, 2.96), (4.4, 2.96))):
        arrow(axes, start, end)


def draw_components_worker(axes: Axes) -> None:
    for x, title, does in (
        (0.3, "model runner", "one flat batch"),
        (2.5, "model", "30 decoder layers"),
        (4.7, "KV cache", "keys and values"),
        (6.9, "sampler", "logits to one token"),
    ):
        box(axes, x, 0.25, 1.8, title, does)
    arrow(axes, (2.1, 0.56), (2.5, 0.56))
    arrow(axes, (4.3, 0.66), (4.7, 0.66))
    arrow(axes, (4.7, 0.46), (4.3, 0.46))
    axes.plot([3.4, 3.4, 6.7, 6.7], [0.87, 0.99, 0.99, 0.56], color=LINE, lw=1.4)
    arrow(axes, (6.7, 0.56), (6.9, 0.56))
    note(axes, 5.05, 1.12, "logits", 9, ha="center", color=LINE)


def draw_messages(axes: Axes, step: Step) -> None:
    """What crosses between the three parts: above once per request or token, below once per step."""
    scheduled = ", ".join(f"{name}: {count}" for name, count in step.scheduled.items())
    sampled = ", ".join(f"{name}: {ids[0]}" for name, ids in step.sampled.items())
    words = ", ".join(f'"{piece(ids[0])}"' for ids in step.sampled.values())
    arrow(axes, (0.7, 5.95), (0.7, 4.42))
    note(axes, 0.9, 5.4, "Request", 10, weight="bold", style="italic")
    note(axes, 0.9, 5.1, "token ids and sampling parameters", 9)
    arrow(axes, (8.3, 4.42), (8.3, 5.95))
    note(axes, 8.1, 5.4, "EngineCoreOutput", 10, weight="bold", style="italic", ha="right")
    note(axes, 8.1, 5.1, "new token ids of a request", 9, ha="right")
    arrow(axes, (0.7, 3.8), (0.7, 0.87))
    note(axes, 0.9, 2.35, "SchedulerOutput", 10, weight="bold", style="italic")
    note(axes, 0.9, 2.05, f"tokens to compute: {{{scheduled}}}", 9)
    note(axes, 0.9, 1.78, f"c is new: its ids, its blocks {step.blocks['c']}", 9)
    arrow(axes, (8.3, 0.87), (8.3, 3.8))
    note(axes, 8.1, 2.35, "ModelRunnerOutput", 10, weight="bold", style="italic", ha="right")
    note(axes, 8.1, 2.05, f"sampled ids: {{{sampled}}}", 9, ha="right")
    note(axes, 8.1, 1.78, words, 9, ha="right", color=LINE)


# ---- 00: one token at a time


def draw_token_loop(path: Path) -> None:
    """Request a without any cache: what goes into the model, the best three tokens that come out, the chosen one."""
    axes = canvas(9, 3.75)
    note(axes, 0.1, 3.58, "goes into the model", 10, weight="bold")
    note(axes, 1.75, 3.58, "(dark: the answer so far)", 9, color=LINE)
    note(axes, 5.75, 3.58, "the three most likely next tokens", 10, weight="bold")
    for call in range(4):
        y = 2.8 - 0.82 * call
        x = 0.1
        ids = known_ids("a", 5 + call)
        for position, token_id in enumerate(ids):
            text = piece(token_id)
            width = 0.2 + 0.085 * len(text)
            is_prompt = position < 5
            cell(axes, x, y, width, 0.36, text, PALE["a"] if is_prompt else COLOURS["a"], INK if is_prompt else "white")
            x += width + 0.02
        arrow(axes, (x + 0.05, y + 0.18), (5.65, y + 0.18))
        for rank, (text, probability) in enumerate(best(f"a{call}", 3)):
            bar_y = y + 0.38 - 0.22 * rank
            axes.add_patch(
                Rectangle((6.6, bar_y - 0.08), 1.55 * probability, 0.16, fc=COLOURS["a"] if rank == 0 else FREE)
            )
            note(axes, 6.52, bar_y, visible(text), 9, ha="right", weight="bold" if rank == 0 else "normal")
            note(axes, 6.68 + 1.55 * probability, bar_y, f"{probability:.0%}", 9)
    save(axes, path)


# ---- 00: one step


def draw_one_step(path: Path) -> None:
    """Step 2 of the three requests in ten blocks, from text to text."""
    core = example_core(num_kv_blocks=10)
    step = list(run_example(core))[2]
    axes = canvas(9, 9.55)
    draw_texts(axes, step)
    draw_gaps(axes, step)
    rows = [(name, step.start[name] + i) for name, count in step.scheduled.items() for i in range(count)]
    slots = [slot(step, name, position) for name, position in rows]
    draw_flat_batch(axes, rows, slots)
    draw_tables_and_slots(axes, step, rows, slots)
    draw_logits(axes, step)
    draw_sampled(axes, step)
    save(axes, path)


def slot(step: Step, name: str, position: int) -> int:
    return step.blocks[name][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


def band(axes: Axes, y: float, height: float, fill: str) -> None:
    panel(axes, 0.08, y, 8.84, height, fill)


def heading(axes: Axes, x: float, y: float, number: str, title: str, remark: str = "") -> None:
    """Of a stage: its number and its name."""
    note(axes, x, y, number, 12, weight="bold")
    note(axes, x + 0.25, y, title, 10, weight="bold")
    note(axes, 8.78, y, remark, 9, ha="right", color=LINE)


def draw_texts(axes: Axes, step: Step) -> None:
    band(axes, 7.82, 1.65, TEXT)
    heading(axes, 0.2, 9.25, "1", "text and token ids", "dark: tokens that this step computes")
    for row, name in enumerate(step.scheduled):
        y = 8.72 - 0.4 * row
        note(axes, 0.22, y + 0.16, name, 11, weight="bold", color=COLOURS[name])
        ids = known_ids(name, step.start[name] + step.scheduled[name])
        shown = ids if len(ids) <= 8 else [*ids[:3], -1, *ids[-4:]]
        x = 0.5
        for index, token_id in enumerate(shown):
            text = "..." if token_id < 0 else f"{piece(token_id)} {token_id}"
            width = 0.16 + 0.074 * len(text)
            is_new = step.start[name] == 0 or index == len(shown) - 1
            cell(axes, x, y, width, 0.33, text, COLOURS[name] if is_new else PALE[name], ON[name] if is_new else INK)
            x += width


def draw_gaps(axes: Axes, step: Step) -> None:
    band(axes, 6.66, 1.08, CORE)
    heading(axes, 0.2, 7.53, "2", "schedule: how many tokens does each request lack?")
    notes = ("decode: one token is missing", "decode", "prefill: the whole prompt is missing")
    for row, (name, text) in enumerate(zip(step.scheduled, notes, strict=True)):
        y = 7.25 - 0.21 * row
        num_known = step.start[name] + step.scheduled[name]
        note(axes, 0.22, y, name, 11, weight="bold", color=COLOURS[name])
        note(axes, 0.5, y, f"{num_known} tokens known, {step.start[name]} computed earlier", 9.5)
        note(axes, 3.75, y, f"compute {step.scheduled[name]}", 9.5, weight="bold")
        note(axes, 5.0, y, text, 9.5, color=LINE)


def draw_flat_batch(axes: Axes, rows: list[tuple[str, int]], slots: list[int]) -> None:
    band(axes, 5.12, 1.46, WORKER)
    width, left = 0.545, 1.15
    for index, (name, position) in enumerate(rows):
        x = left + width * index
        token_id = known_ids(name, position + 1)[-1]
        cell(axes, x, 5.72, width, 0.28, str(token_id), COLOURS[name], ON[name])
        cell(axes, x, 5.46, width, 0.26, str(position), PALE[name])
        cell(axes, x, 5.2, width, 0.26, str(slots[index]), PALE[name])
    for y, text in ((5.86, "token id"), (5.59, "position"), (5.33, "slot")):
        note(axes, 1.08, y, text, 9.5, ha="right")
    bounds = [0]
    for name in COLOURS:
        bounds.append(bounds[-1] + sum(row[0] == name for row in rows))
        middle = left + width * (bounds[-2] + bounds[-1]) / 2
        note(axes, middle, 6.1, name, 11, weight="bold", color=COLOURS[name], ha="center")
    heading(axes, 0.2, 6.38, "3", "flat batch: the tokens of all requests in one row", f"query_start_loc = {bounds}")


def draw_tables_and_slots(axes: Axes, step: Step, rows: list[tuple[str, int]], slots: list[int]) -> None:
    panel(axes, 0.08, 2.96, 4.14, 2.08, CORE)
    panel(axes, 4.3, 2.96, 4.62, 2.08, WORKER)
    heading(axes, 0.2, 4.83, "4", "block table, from the core")
    heading(axes, 4.4, 4.83, "5", "KV cache", "dark: written, pale: only read")
    note(axes, 0.3, 4.5, "positions", 9, color=LINE)
    for column in range(3):
        first = column * BLOCK_SIZE
        note(axes, 1.52 + 0.7 * column, 4.5, f"{first}-{first + 3}", 9, color=LINE, ha="center")
    for row, (name, blocks) in enumerate(step.blocks.items()):
        y = 4.08 - 0.34 * row
        note(axes, 0.9, y + 0.15, name, 11, weight="bold", color=COLOURS[name])
        for column, block in enumerate(blocks):
            cell(axes, 1.18 + 0.7 * column, y, 0.68, 0.3, f"block {block}", PALE[name])
    note(axes, 0.22, 3.13, "slot = block * 4 + position % 4. b, position 5: 4 * 4 + 1 = 17", 9)
    assert slots[1] == 17 and rows[1] == ("b", 5)
    owner = {block: name for name, blocks in step.blocks.items() for block in blocks}
    for block in range(10):
        column, line = divmod(block, 5)
        x, y = 4.85 + 2.15 * column, 4.35 - 0.31 * line
        note(axes, x - 0.06, y + 0.13, "null" if block == 0 else str(block), 9, ha="right", color=LINE)
        for offset in range(BLOCK_SIZE):
            draw_slot(axes, x + 0.45 * offset, y, owner.get(block), block * BLOCK_SIZE + offset, step, slots)


def draw_slot(axes: Axes, x: float, y: float, name: str | None, number: int, step: Step, slots: list[int]) -> None:
    """One slot of the KV cache: dark if this step writes it, pale if this step reads it, grey if it is free."""
    if number in slots:
        assert name is not None
        cell(axes, x, y, 0.44, 0.28, str(number), COLOURS[name], ON[name])
        return
    is_read = name is not None and any(slot(step, name, p) == number for p in range(step.start[name]))
    cell(axes, x, y, 0.44, 0.28, str(number), PALE[name] if name and is_read else FREE, INK if is_read else "#999999")


def draw_logits(axes: Axes, step: Step) -> None:
    band(axes, 1.36, 1.52, WORKER)
    heading(axes, 0.2, 2.67, "6", "logits of each request's last row: [3, 49152]", "as probabilities, the best three")
    places = {"a": "a2", "b": "b2", "c": "c0"}
    for row, name in enumerate(step.sampled):
        x = 0.25 + 2.95 * row
        note(axes, x, 2.3, name, 11, weight="bold", color=COLOURS[name])
        for rank, (text, probability) in enumerate(best(places[name], 3)):
            y = 2.3 - 0.3 * rank
            note(axes, x + 0.98, y, visible(text), 9.5, ha="right", weight="bold" if rank == 0 else "normal")
            fill = COLOURS[name] if rank == 0 else FREE
            axes.add_patch(Rectangle((x + 1.05, y - 0.1), 1.2 * probability, 0.2, fc=fill))
            note(axes, x + 1.1 + 1.2 * probability, y, f"{probability:.0%}", 9)


def draw_sampled(axes: Axes, step: Step) -> None:
    panel(axes, 0.08, 0.08, 1.84, 1.2, WORKER)
    panel(axes, 2.0, 0.08, 6.92, 1.2, TEXT)
    heading(axes, 0.2, 1.07, "7", "sampled token")
    note(axes, 2.12, 1.07, "the text so far", 10, weight="bold")
    for row, (name, ids) in enumerate(step.sampled.items()):
        num_known = step.start[name] + step.scheduled[name]
        text = "".join(PIECES[i] for i in [*known_ids(name, num_known), *ids])
        y = 0.74 - 0.24 * row
        note(axes, 0.22, y, name, 11, weight="bold", color=COLOURS[name])
        note(axes, 0.5, y, f'{ids[0]}, "{piece(ids[0])}"', 9.5, weight="bold")
        note(axes, 2.12, y, json.dumps(text), 9.5)


# ---- 00: the KV cache of request a


def draw_kv_steps(path: Path) -> None:
    """What request a reads and writes in its four steps."""
    steps = [step for step in run_example(example_core(num_kv_blocks=10)) if "a" in step.scheduled]
    ids = known_ids("a", 9)
    axes = canvas(9, 3.75)
    left, width = 1.5, 0.72
    note(axes, 0.1, 3.5, "token", 9.5, color=LINE)
    note(axes, 0.1, 3.25, "position", 9.5, color=LINE)
    for position, token_id in enumerate(ids):
        x = left + width * (position + 0.5)
        note(axes, x, 3.5, piece(token_id), 9.5, ha="center", weight="bold" if position >= 5 else "normal")
        note(axes, x, 3.25, str(position), 9.5, ha="center", color=LINE)
    for step in steps:
        y = 2.55 - 0.56 * step.number
        start, count = step.start["a"], step.scheduled["a"]
        note(axes, 0.1, y + 0.31, f"step {step.number}", 10, weight="bold")
        note(axes, 0.1, y + 0.1, "prefill" if start == 0 else "decode", 9.5, color=LINE)
        for position in range(8):
            x = left + width * position
            if position < start:
                cell(axes, x, y, width, 0.42, "read", PALE["a"])
            elif position < start + count:
                cell(axes, x, y, width, 0.42, "write", COLOURS["a"], "white")
        new = start + count
        axes.text(left + width * new + 0.06, y + 0.2, f'samples "{piece(ids[new])}"', size=9.5, va="center", color=INK)
    counts = [(step.start["a"], step.scheduled["a"]) for step in steps]
    assert counts == [(0, 5), (5, 1), (6, 1), (7, 1)]
    note(
        axes,
        0.1,
        0.45,
        "write: the token is computed in this step, and its key and value are stored in every layer.",
        9.5,
    )
    note(
        axes, 0.1, 0.2, "read: the key and value that an earlier step stored. Nothing is computed for this token.", 9.5
    )
    save(axes, path)


# ---- 00: what batching changes


def draw_timeline(path: Path) -> None:
    """The three requests one at a time and together: which request computes in which step."""
    runs = {
        "one request at a time": list(run_example(example_core(block_size=16, max_num_seqs=1, batching="static"))),
        "all requests together": list(run_example(example_core(num_kv_blocks=10))),
    }
    assert [len(run) for run in runs.values()] == [12, 6]
    axes = canvas(9, 2.25)
    x0 = 0.45
    width = 0.42
    for title, run in runs.items():
        note(axes, x0, 2.05, f"{title}: {len(run)} steps", 10.5, weight="bold")
        for row, name in enumerate(COLOURS):
            y = 1.3 - 0.42 * row
            note(axes, x0 - 0.2, y + 0.18, name, 11, weight="bold", color=COLOURS[name])
            for step in run:
                waits = name in step.waiting
                count = step.scheduled.get(name, 0)
                fill = COLOURS[name] if count else "white" if not waits else FREE
                cell(axes, x0 + width * step.number, y, width, 0.38, str(count or ("waits" if waits else "")), fill,
                     ON[name] if count else LINE, 9 if count else 7)  # fmt: skip
        for step in run:
            note(axes, x0 + width * (step.number + 0.5), 0.32, str(step.number), 9, ha="center", color=LINE)
        note(axes, x0 + width * len(run) / 2, 0.1, "step", 9, ha="center", color=LINE)
        x0 += width * len(run) + 0.85
    save(axes, path)


FIGURES = {
    "00_components": draw_components,
    "00_token_loop": draw_token_loop,
    "00_one_step": draw_one_step,
    "00_kv_steps": draw_kv_steps,
    "00_timeline": draw_timeline,
}


if __name__ == "__main__":
    main()
