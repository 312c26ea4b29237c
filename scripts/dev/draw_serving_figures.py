"""Draw the pictures of docs/learn/08: the slow client, the path of a token, a disconnect, the collector, open loop.

Milestone: M8. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_serving_figures.py [--out docs/learn/img]

Nothing is typed in by hand. Tokens, blocks, messages and frames come from runs of the real front end and the real
scheduler on the fake model; the times of the last picture are those of the simulator.
"""

import asyncio
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import figure_files
from figure_shapes import COLOURS, CORE, INK, LINE, PALE, TEXT, arrow, box, canvas, note, panel, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.engine.core_loop import StepBuffer
from folovllm.engine.messages import StepOutputs
from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.entrypoints.openai.sse import EventStream
from folovllm.learn.three_requests import EXAMPLES, ReplayExecutor, example_core, example_request, text_of
from folovllm.learn.toy_engine import make_core, make_request
from folovllm.learn.toy_server import ToyServer, start_toy_llm
from folovllm.outputs import CompletionOutput, RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.sim.metrics import SLO
from folovllm.sim.simulate import make_simulation
from folovllm.sim.workloads import Recipe, follow_recipe

DELTA = RequestOutputKind.DELTA
STEP_MS, NUM_TOKENS = 12, 10
SEND_MS = {"a": 0, "b": 0, "phone": 100}  # how long a client takes for one piece, as in the page's first example
ROW_COLOURS = {"a": COLOURS["a"], "b": COLOURS["b"], "phone": COLOURS["c"]}
SEATS, RATES = 8, (4, 16)
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


# ---- a slow client: one loop and two


class Piece(NamedTuple):
    """A client takes `num_tokens` tokens from `start` on; it has them at `end` (milliseconds)."""

    start: float
    end: float
    num_tokens: int = 1


def run_clients(one_loop: bool) -> tuple[list[float], dict[str, list[Piece]]]:
    """The ends of the steps, and what each client takes, on the toy engine with a clock of its own."""
    core, now = make_core(max_num_seqs=len(SEND_MS)), 0.0
    steps: list[float] = []
    taken: dict[str, list[Piece]] = {name: [] for name in SEND_MS}
    for name in SEND_MS:
        core.add_request(make_request(name, prompt=4, max_tokens=NUM_TOKENS))
    while core.has_unfinished_requests():
        outputs = core.step()
        now += STEP_MS
        steps.append(now)
        for name in [output.request_id for output in outputs]:
            before = taken[name][-1].end if taken[name] else 0.0
            piece = Piece(max(now, before), max(now, before) + SEND_MS[name])
            taken[name].append(piece)
            if one_loop:
                now = piece.end
    return steps, taken


def slow_client(path: Path) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.8), sharex=True, layout="constrained")
    for ax, one_loop in zip(axes, (True, False), strict=True):
        steps, taken = run_clients(one_loop)
        _draw_clients(ax, steps, taken)
        done = taken["a"][-1].end
        how = "One loop steps and sends" if one_loop else "The engine's loop steps, the event loop sends"
        ax.set_title(f"{how}: a and b have their ten tokens after {done:,.0f} ms", loc="left", fontsize=11)
    axes[1].set_xlabel("milliseconds")
    axes[1].text(330, 0.5, "a and b are done,\nand so is the engine", va="center", fontsize=9.5, color=LINE)
    figure_files.save(figure, path)


def _draw_clients(ax: Axes, steps: list[float], taken: dict[str, list[Piece]]) -> None:
    for end in steps:
        ax.add_patch(Rectangle((end - STEP_MS, -1.4), STEP_MS * 0.92, 0.7, fc=INK, ec="none"))
    for row, (name, pieces) in enumerate(taken.items()):
        for piece in pieces:
            if piece.end > piece.start:
                width = piece.end - piece.start
                ax.add_patch(Rectangle((piece.start, row - 0.36), width, 0.72, fc=PALE["c"], ec=ROW_COLOURS[name]))
            ax.plot([piece.end] * 2, [row - 0.4, row + 0.4], color=ROW_COLOURS[name], lw=2.2)
    ax.set_yticks([-1.05, 0, 1, 2], ["steps of\nthe engine", "client a", "client b", "phone"], fontsize=9.5)
    ax.set(xlim=(0, 1_130), ylim=(2.6, -1.6))
    ax.tick_params(axis="y", length=0)


# ---- the path of one token


def one_token() -> dict[str, Any]:
    """The second token of request a at each station between the core and the socket."""
    core = example_core()
    core.add_request(example_request("a"))
    core.step()
    buffer = StepBuffer()
    core.step(buffer)
    message = StepOutputs(buffer.outputs, core.stats())
    pieces: list[RequestOutput] = []

    async def read() -> None:
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=4, output_kind=DELTA)
        async with await start_toy_llm(ReplayExecutor(), vocab_size=50_000) as llm:
            pieces.extend([p async for p in llm.generate(list(EXAMPLES["a"].prompt_token_ids), params, "a")])

    asyncio.run(read())
    token_id = buffer.outputs[0].new_token_ids[0]
    assert token_id == EXAMPLES["a"].answer_token_ids[1] == [i for p in pieces for i in p.outputs[0].token_ids][1]
    text = text_of([token_id])
    frame = EventStream().encode(json.dumps({"choices": [{"index": 0, "text": text}]}))
    return {"id": token_id, "text": text, "message": len(pickle.dumps(message)), "frame": frame}


def path_of_a_token(path: Path) -> None:
    found = one_token()
    axes = canvas(9, 5.1)
    panel(axes, 0.15, 3.5, 8.7, 1.5, CORE)
    note(axes, 0.3, 4.78, "the engine's process: EngineCoreLoop", weight="bold")
    box(axes, 0.4, 3.75, 2.3, "EngineCore.step", f"samples token {found['id']} for a")
    box(axes, 3.3, 3.75, 2.4, "EngineCoreOutput", f"a, [{found['id']}], not finished")
    box(axes, 6.3, 3.75, 2.3, "StepOutputs", f"{found['message']} bytes, pickled")
    arrow(axes, (2.7, 4.06), (3.3, 4.06))
    arrow(axes, (5.7, 4.06), (6.3, 4.06))
    panel(axes, 0.15, 0.15, 8.7, 2.85, TEXT)
    note(axes, 0.3, 0.38, "the front end's process: one event loop, no torch", weight="bold")
    box(axes, 6.3, 2.15, 2.3, "OpenRequests", "finds the request of a")
    box(axes, 3.3, 2.15, 2.4, "OutputProcessor", f"{found['id']} is the text {found['text']!r}")
    box(axes, 0.4, 2.15, 2.3, "RequestOutputCollector", "keeps it until it is taken")
    box(axes, 0.4, 0.75, 2.3, "RequestStream", "the route awaits its next")
    box(axes, 3.3, 0.75, 2.4, "EventStream.encode", "JSON becomes a frame")
    box(axes, 6.3, 0.75, 2.3, "uvicorn", "writes it to the socket")
    arrow(axes, (7.45, 3.75), (7.45, 2.77), COLOURS["a"], 2.2)
    note(axes, 7.35, 3.25, "a pipe; a thread reads it and calls the event loop", ha="right", size=9.5)
    arrow(axes, (6.3, 2.46), (5.7, 2.46))
    arrow(axes, (3.3, 2.46), (2.7, 2.46))
    arrow(axes, (1.55, 2.15), (1.55, 1.37), COLOURS["a"], 2.2)
    note(axes, 1.7, 1.75, "here the two speeds meet: the engine has put, the client takes when it can", size=9.5)
    arrow(axes, (2.7, 1.06), (3.3, 1.06))
    arrow(axes, (5.7, 1.06), (6.3, 1.06))
    shown = found["frame"].decode().replace("\n", "\\n")
    note(axes, 8.7, 0.38, shown, ha="right", family="monospace", size=9)
    save(axes, path)


# ---- a disconnect and its blocks


def blocks_of_clients(b_leaves: bool) -> list[dict[str, int]]:
    """Per step the blocks that each client's request holds; b leaves before step 4, or the server does not notice."""

    async def scene() -> list[dict[str, int]]:
        server = ToyServer(block_size=4)
        streams = {name: server.open(name, prompt=8, max_tokens=24) for name in "abc"}
        held: list[dict[str, int]] = []
        while server.core.has_unfinished_requests():
            if b_leaves and len(held) == 4:
                await streams["b"].aclose()
            server.step()
            manager = server.core.scheduler.kv_cache_manager
            held.append({name: len(manager.get_block_ids(name)[0]) if name in manager.req_to_blocks else 0
                         for name in "abc"})  # fmt: skip
            assert sum(held[-1].values()) == server.num_used_blocks
        return held

    return asyncio.run(scene())


def disconnect(path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for ax, b_leaves in zip(axes, (False, True), strict=True):
        held = blocks_of_clients(b_leaves)
        bottom = [0] * len(held)
        for name in "abc":
            heights = [one[name] for one in held]
            is_waste = name == "b" and not b_leaves
            hatches = [("///" if is_waste and step >= 4 else "") for step in range(len(held))]
            ax.bar(range(len(held)), heights, 0.9, bottom, color=COLOURS[name], ec="white", hatch=hatches)
            middle = bottom[2] + heights[2] / 2
            ax.text(2, middle, name, ha="center", va="center", fontsize=10, color="white" if name != "b" else INK)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        wasted = sum(one["b"] for one in held[4:])
        title = "b is aborted before step 4" if b_leaves else f"not noticed: {wasted} block-steps in vain"
        ax.set_title(title, loc="left", fontsize=11)
        ax.axvline(3.5, color=INK, lw=1, ls="--")
        ax.text(3.3, 22.3, "b leaves", ha="right", va="center", fontsize=9.5, color=INK)
        ax.set(xlabel="step", ylim=(0, 25.5), xlim=(-0.6, 23.6))
    axes[0].set_ylabel("blocks in use")
    figure_files.save(figure, path)


# ---- the collector's merge


def read_slowly(merge: bool) -> list[Piece]:
    """What the phone takes, from a queue of outputs or from the real collector."""
    puts = [(STEP_MS * (i + 1), RequestOutput("phone", None, [1], [CompletionOutput(0, f"{i} ", [i])], False))
            for i in range(NUM_TOKENS)]  # fmt: skip
    collector, pieces, now = RequestOutputCollector(DELTA), list[Piece](), 0.0
    while puts:
        now = max(now, puts[0][0])
        while puts and puts[0][0] <= now:
            collector.put(puts.pop(0)[1])
            if not merge:
                break
        output = collector.get_nowait()
        assert output is not None
        pieces.append(Piece(now, now + SEND_MS["phone"], len(output.outputs[0].token_ids)))
        now = pieces[-1].end
    return pieces


def merge(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(9, 3.0), layout="constrained")
    rows = {"the engine puts": None, "a queue:\nthe phone takes": read_slowly(False),
            "the collector:\nthe phone takes": read_slowly(True)}  # fmt: skip
    for i in range(NUM_TOKENS):
        ax.plot([STEP_MS * (i + 1)] * 2, [-0.35, 0.35], color=INK, lw=2)
    ax.text(STEP_MS * NUM_TOKENS + 15, 0, f"{NUM_TOKENS} tokens, one every {STEP_MS} ms", va="center", fontsize=9.5)
    for row, pieces in enumerate(rows.values()):
        for piece in pieces or ():
            ax.add_patch(Rectangle((piece.start, row - 0.36), piece.end - piece.start - 3, 0.72, fc=PALE["c"],
                                   ec=COLOURS["c"]))  # fmt: skip
            label = f"{piece.num_tokens} token" + ("s" if piece.num_tokens > 1 else "")
            ax.text((piece.start + piece.end) / 2, row, label, ha="center", va="center", fontsize=9)
        if pieces:
            ax.text(pieces[-1].end + 8, row, f"{pieces[-1].end:,.0f} ms", va="center", fontsize=10, color=INK)
    ax.set_yticks(range(3), list(rows), fontsize=9.5)
    ax.set(xlim=(0, 1_130), ylim=(2.6, -0.6), xlabel="milliseconds")
    ax.tick_params(axis="y", length=0)
    figure_files.save(figure, path)


# ---- open loop


def moments(rate: float) -> list[tuple[float, int, int, float]]:
    """(seconds, waiting, running, milliseconds of the step) after each step of the page's simulated load."""
    recipe = Recipe("questions of users who do not know each other", rate, prompt=(20, 200), output=(40, 100))
    load = follow_recipe(recipe, "questions", 60)
    simulation = make_simulation(load, model="smollm2-135m", gpu="cpu", max_num_seqs=SEATS)
    found: list[tuple[float, int, int, float]] = []
    step: Callable[..., Any] = simulation.core.step

    def observed(*args: Any) -> Any:
        before = simulation.executor.now
        outputs, stats = step(*args), simulation.core.stats()
        after = simulation.executor.now
        found.append((after, stats.num_waiting, stats.num_running, 1e3 * (after - before)))
        return outputs

    simulation.core.step = observed  # type: ignore[assignment, method-assign]
    simulation.run(SLO())
    return found


def load(path: Path) -> None:
    figure, axes = plt.subplots(3, 1, figsize=(9, 5.4), sharex=True, layout="constrained")
    titles = (
        "requests in the queue",
        f"requests in the step (at most {SEATS})",
        "time of a step, ms: the gaps of the running",
    )
    for rate, colour in zip(RATES, (COLOURS["a"], COLOURS["b"]), strict=True):
        seconds, waiting, running, gaps = zip(*moments(rate), strict=True)
        for ax, values in zip(axes, (waiting, running), strict=False):
            ax.plot(seconds, values, drawstyle="steps-post", color=colour, lw=1.6)
        axes[2].plot(seconds, gaps, ".", color=colour, ms=2.5)
        where = (5.6, 24) if rate == max(RATES) else (12.5, 4)
        axes[0].text(*where, f"{rate} requests per second", color=colour, fontsize=10.5, va="center")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, loc="left", fontsize=10.5)
        ax.set_ylim(0)
        ax.grid(alpha=0.25)
    axes[0].set_yticks(range(0, 31, 10))
    axes[1].set_yticks(range(0, SEATS + 1, 2))
    axes[2].set_xlabel("seconds")
    figure_files.save(figure, path)


FIGURES = {
    "08_slow_client": slow_client,
    "08_path": path_of_a_token,
    "08_disconnect": disconnect,
    "08_collector": merge,
    "08_load": load,
}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__ or "").parse_args().out)
