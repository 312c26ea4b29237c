"""Draw the pictures of docs/learn/06: a shared block, the hash chain, the free queue, and what a hit saves.

Milestone: M6. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_prefix_figures.py [--out docs/learn/img]

The pictures of blocks are runs of the real scheduler on the three requests of the learning pages. The times are those
of milestones/m6/results/shared_prefix_cpu.json. What the page quotes is asserted here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figure_files
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from folovllm.core.block_hash import BlockHasher, get_hash_function, root_hash
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.learn.prefill_costs import calibrated, roofline
from folovllm.learn.three_requests import (
    EXAMPLES,
    PIECES,
    Step,
    example_core,
    example_request,
    run_example,
)
from folovllm.learn.toy_engine import block_ids, drive, make_core, make_request
from folovllm.request import Request
from folovllm.viz import PALETTE

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "milestones/m6/results/shared_prefix_cpu.json"
OWNERS = {"a": "#0072B2", "b": "#E69F00", "c": "#009E73"}  # viz.PALETTE[:3]
FREE, INK = "#DDDDDD", "#333333"
COMPUTED, HIT = "#555555", "#B9D7EA"
ROOFLINE, CALIBRATED, WITH_CACHE = PALETTE[5], PALETTE[3], PALETTE[0]  # the models as on page 05
BLOCK_SIZE = 4
M5 = {"num_kv_blocks": 10, "enable_chunked_prefill": True, "max_num_batched_tokens": 6}


def text_on(colour: str) -> str:
    return "white" if colour in (OWNERS["a"], OWNERS["c"]) else "black"


def piece(token_id: int) -> str:
    """A token as it is printed in a slot: without its leading space, a new line as \\n."""
    return PIECES[token_id].replace("\n", "\\n").strip(" ")


def blank(ax: Axes, width: float, height: float) -> None:
    """Axes without ticks, x to the right, y downwards."""
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")


# ---- a chat, turn by turn

# Ten turns: 100 tokens from the user, 100 from the model.
TURNS, SAYS, ANSWERS = 10, 100, 100
CHAT_OFF = [100, 300, 500, 700, 900, 1100, 1300, 1500, 1700, 1900]  # tokens computed before each turn's first answer
CHAT_ON = [100, 108, 116, 108, 116, 108, 116, 108, 116, 108]


def chat_costs(caching: bool) -> list[int]:
    core = make_core(
        FakeExecutor(), max_model_len=2048, block_size=16, num_kv_blocks=129, max_num_batched_tokens=2048,
        enable_prefix_caching=caching,
    )  # fmt: skip
    history: list[int] = []
    costs = []
    for turn in range(TURNS):
        history += [(100 * turn + i) % 1000 for i in range(SAYS)]
        request = make_request(f"turn {turn}", history, max_tokens=ANSWERS)
        costs.append(first_step(core, request))
        history = request.all_token_ids
    return costs


def first_step(core: EngineCore, request: Request) -> int:
    """Runs one request to its end. Returns how many tokens its first step computed."""
    core.add_request(request)
    first = 0
    while core.has_unfinished_requests():
        step = core.scheduler.schedule()
        first = first or step.num_scheduled_tokens[request.request_id]
        core.scheduler.update_from_output(step, core.executor.sample(core.executor.execute(step)))
    return first


def chat(path: Path) -> None:
    """Tokens computed for the prompt of every turn."""
    off, on = chat_costs(False), chat_costs(True)
    assert (off, on, sum(off), sum(on)) == (CHAT_OFF, CHAT_ON, 10_000, 1_104)
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, layout="constrained")
    for ax, name, costs in ((axes[0], "off", off), (axes[1], "on", on)):
        turns = range(1, TURNS + 1)
        ax.bar(turns, costs, color=COMPUTED, label="computed")
        ax.bar(turns, [all_ - c for all_, c in zip(off, costs, strict=True)], bottom=costs, color=HIT)
        ax.set_title(f"prefix caching {name}: {sum(costs):,} prompt tokens computed", loc="left", fontsize=10)
        ax.set(xlabel="turn of the chat", xticks=turns)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_ylabel("tokens of the prompt")
    axes[0].text(1.0, 1500, "computed", color=COMPUTED, fontsize=11, weight="bold")
    axes[1].text(1.0, 1500, "taken from the cache", color="#3A7CA5", fontsize=11, weight="bold")
    axes[1].text(1.0, 1300, "computed", color=COMPUTED, fontsize=11, weight="bold")
    axes[1].text(1.0, 1100, "blocks of 16 tokens", color=INK, fontsize=10)
    figure_files.save(figure, path)


# ---- the block map of step 2, as on page 03


def step_two(caching: bool) -> Step:
    return list(run_example(example_core(**M5, enable_prefix_caching=caching)))[2]


def block_map(path: Path) -> None:
    """Every slot of the pool as step 2 leaves it, without and with prefix caching."""
    off, on = step_two(False), step_two(True)
    assert off.blocks == {"a": [1, 2], "b": [3, 4], "c": [5]} and off.start["c"] == 0
    assert on.blocks == {"a": [1, 2], "b": [3, 4], "c": [1, 5]} and on.hits == {"c": 4}
    figure, axes = plt.subplots(2, 1, figsize=(9, 5.0), layout="constrained")
    panels = (
        (axes[0], off, "prefix caching off: c computes its positions 0-3. Block 5 holds the same tokens as block 1."),
        (axes[1], on, "prefix caching on: c shares block 1 with a, and computes its positions 4-7."),
    )
    for ax, step, title in panels:
        draw_pool(ax, step)
        ax.set_title(title, loc="left", fontsize=10)
    figure_files.save(figure, path)


def draw_pool(ax: Axes, step: Step) -> None:
    """Blocks 1 to 9 side by side, each four slots from top to bottom."""
    blank(ax, 9, BLOCK_SIZE + 1.35)
    for block in range(1, 10):
        holders = [name for name, table in step.blocks.items() if block in table]
        ax.text(block - 0.54, 0.3, f"block {block}", ha="center", va="center", fontsize=9, color=INK)
        for offset in range(BLOCK_SIZE):
            draw_slot(ax, block - 1, 0.6 + offset, step, block, offset)
        label = " and ".join(holders) if holders else "free"
        ax.text(block - 0.54, BLOCK_SIZE + 0.95, label, ha="center", va="center", fontsize=10, weight="bold",
                color=OWNERS[holders[0]] if len(holders) == 1 else INK)  # fmt: skip


def draw_slot(ax: Axes, x: float, y: float, step: Step, block: int, offset: int) -> None:
    """One slot: the colours of all its holders side by side, and its token if it has been computed."""
    holders = [name for name, table in step.blocks.items() if block in table]
    text = ""
    for i, name in enumerate(holders):
        example = EXAMPLES[name]
        tokens = example.prompt_token_ids + example.answer_token_ids
        position = step.blocks[name].index(block) * BLOCK_SIZE + offset
        computed = position < step.start[name] + step.scheduled[name]
        width = 0.92 / len(holders)
        ax.add_patch(
            Rectangle((x + i * width, y), width, 0.94, fc=OWNERS[name] if computed else "white", ec=OWNERS[name])
        )
        text = piece(tokens[position]) if computed else ""
    if not holders:
        ax.add_patch(Rectangle((x, y), 0.92, 0.94, fc=FREE, ec="white"))
    colour = text_on(OWNERS[holders[-1]]) if holders else INK
    ax.text(x + 0.46, y + 0.49, text, ha="center", va="center", fontsize=10, color=colour)


# ---- the hash chain


def chains() -> dict[str, list[tuple[list[int], str]]]:
    """Request -> its full blocks of known tokens after all three have finished, each with the start of its hash."""
    sha256 = get_hash_function("sha256")
    found = {}
    for name, example in EXAMPLES.items():
        tokens = [*example.prompt_token_ids, *example.answer_token_ids[: example.max_tokens - 1]]  # those with K and V
        request = make_request(name, tokens)
        request.attach_block_hasher(BlockHasher(BLOCK_SIZE, sha256, root_hash(0, sha256)))
        blocks = [tokens[i : i + BLOCK_SIZE] for i in range(0, len(tokens), BLOCK_SIZE)]
        found[name] = [(b, h.hex()[:6]) for b, h in zip(blocks, request.block_hashes, strict=False)]
    return found


def chain(path: Path) -> None:
    """One row per request: root, blocks, and the hash of each block, which goes into the next one."""
    found = chains()
    assert {name: [h for _, h in blocks] for name, blocks in found.items()} == {
        "a": ["2bcee0", "bfb5a5"],
        "b": ["b92264", "324832"],
        "c": ["2bcee0", "806915", "77bb64"],
    }
    figure, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
    blank(ax, 9.2, 6.45)
    for row, (name, blocks) in enumerate(found.items()):
        y = 0.35 + 2.1 * row
        ax.text(0.05, y + 0.3, name, fontsize=14, weight="bold", color=OWNERS[name], va="center")
        ax.text(0.75, y + 1.15, "root", fontsize=10, ha="center", va="center", color=INK)
        for i, (tokens, block_hash) in enumerate(blocks):
            draw_link(ax, 1.6 + 2.6 * i, y, name, tokens, block_hash, is_first=i == 0)
    ax.text(4.25, 4.0, "hash of b92264 and tokens (all generated)", fontsize=10, color=INK, ha="left", va="center")
    ax.text(1.65, 6.1, "equal to a's: a hit", fontsize=10, color=INK, ha="left", va="center")
    ax.text(1.65, 1.9, "hash of root and tokens", fontsize=10, color=INK, ha="left", va="center")
    ax.text(4.25, 1.9, "hash of 2bcee0 and tokens (some generated)", fontsize=10, color=INK, ha="left", va="center")
    figure_files.save(figure, path)


def draw_link(ax: Axes, x: float, y: float, name: str, tokens: list[int], block_hash: str, is_first: bool) -> None:
    """A block's tokens above, its hash below; one arrow from the tokens and one from the hash before."""
    ax.add_patch(Rectangle((x, y), 2.3, 0.6, fc=OWNERS[name], ec="none"))
    words = " ".join(map(piece, tokens))
    ax.text(x + 1.15, y + 0.3, words, ha="center", va="center", fontsize=10, color=text_on(OWNERS[name]))
    shared = block_hash == "2bcee0"
    ax.text(x + 1.15, y + 1.15, block_hash, ha="center", va="center", fontsize=11, family="monospace", color=INK,
            weight="bold" if shared else "normal",
            bbox={"boxstyle": "round,pad=0.25", "fc": HIT if shared else "white", "ec": INK, "lw": 0.8})  # fmt: skip
    arrows = [((x + 1.15, y + 0.6), (x + 1.15, y + 0.93))]
    start = x - 0.62 if is_first else x - 0.95
    arrows.append(((start, y + 1.15), (x + 0.66, y + 1.15)))
    for tail, head in arrows:
        ax.add_patch(
            FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=11, color=INK, lw=1.1, shrinkA=0, shrinkB=0)
        )


# ---- the free queue


@dataclass(frozen=True)
class Moment:
    """The free queue after a request was served, head first, and what each block still holds: id -> (owner, block)."""

    title: str
    queue: list[int]
    cached: dict[int, tuple[str, int]]
    partly_filled: dict[int, str]  # block without a hash -> what it holds


QUEUES = [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 2, 1], [5, 6, 2, 1, 4, 3], [2, 4, 3, 6, 5, 1]]


def moments() -> list[Moment]:
    """a, b and c, one after another, in the pool of six usable blocks."""
    core = example_core(num_kv_blocks=7, enable_prefix_caching=True)
    pool = core.scheduler.kv_cache_manager.block_pool
    holds: dict[int, tuple[str, int]] = {}

    def look(title: str) -> Moment:
        queue = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        cached = {b: holds[b] for b in queue if pool.blocks[b].block_hash is not None}
        return Moment(title, queue, cached, {b: remains(*holds[b]) for b in queue if b in holds and b not in cached})

    found = [look("at the start")]
    for name, title in (("a", "after a"), ("b", "after b"), ("c", "after c, which hit\nblock 1 and\nevicted block 2")):
        request = example_request(name)
        table = table_of(core, request)
        holds |= {block: (name, i) for i, block in enumerate(table) if i >= request.num_cached_tokens // BLOCK_SIZE}
        found.append(look(title))
    assert [moment.queue for moment in found] == QUEUES
    assert 2 not in found[-1].cached and found[-1].cached[1] == ("a", 0)
    return found


def remains(name: str, index: int) -> str:
    """What the last block of a request holds, which is not full. The last token of an answer is never computed."""
    example = EXAMPLES[name]
    count = len(example.prompt_token_ids) + example.max_tokens - 1 - index * BLOCK_SIZE
    assert 0 < count < BLOCK_SIZE
    return f"{count} token{'s' if count > 1 else ''} of {name},\nno hash"


def table_of(core: EngineCore, request: Request) -> list[int]:
    """Runs one request to its end. Returns its block table in its last step."""
    core.add_request(request)
    table: list[int] = []
    while core.has_unfinished_requests():
        step = core.scheduler.schedule()
        table = block_ids(core, request.request_id)
        core.scheduler.update_from_output(step, core.executor.sample(core.executor.execute(step)))
    drive(core)
    return table


def eviction(path: Path) -> None:
    """The queue from head to tail at the start and after each of three requests."""
    found = moments()
    figure, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for row, moment in enumerate(found):
        ax.text(-0.12, row, moment.title, ha="right", va="center", fontsize=10, color=INK)
        for column, block in enumerate(moment.queue):
            draw_queued(ax, column, row, block, moment.cached.get(block), moment.partly_filled.get(block, ""))
    ax.text(0.46, -0.62, "head: handed out next", ha="center", fontsize=10, color=INK)
    ax.text(5.46, -0.62, "tail: kept longest", ha="center", fontsize=10, color=INK)
    ax.set(xlim=(-1.5, 6.05), ylim=(len(found) - 0.5, -0.85))
    ax.axis("off")
    figure_files.save(figure, path)


def draw_queued(ax: Axes, column: int, row: int, block: int, held: tuple[str, int] | None, remains: str) -> None:
    colour = OWNERS[held[0]] if held else FREE
    ax.add_patch(Rectangle((column, row - 0.4), 0.92, 0.8, fc=colour, ec="white"))
    label = f"block {block}" + (f"\n{remains}" if remains else "")
    if held:
        name, index = held
        tokens = (EXAMPLES[name].prompt_token_ids + EXAMPLES[name].answer_token_ids)[4 * index : 4 * index + 4]
        words = [piece(t) for t in tokens]
        label += f"  ({name})\n{' '.join(words[:2])}\n{' '.join(words[2:])}"
    ax.text(column + 0.46, row, label, ha="center", va="center", fontsize=9.5, color=text_on(colour))


# ---- time to first token


def measured_ttft(arm: str) -> dict[int, float]:
    """Share of the prompt that is shared, in percent -> median TTFT in ms of the warm requests."""
    groups: dict[str, Any] = json.loads(MEASURED.read_text())["arms"][arm]["modes"]["single"]["groups"]
    return {int(name.split("%")[0]): group["ttft_ms"]["p50"] for name, group in groups.items() if "warm" in name}


def ttft(path: Path) -> None:
    """TTFT of a prompt of 1,500 tokens against the tokens that are hit."""
    hits = range(0, 1_489, 16)
    figure, ax = plt.subplots(figsize=(9, 3.4), layout="constrained")
    for model, colour in ((roofline(), ROOFLINE), (calibrated(), CALIBRATED)):
        ax.plot(hits, [1000 * model.step([(hit, 1500 - hit)], 1).seconds for hit in hits], color=colour, lw=1.5)
    for arm, colour, marker in (("m5", COMPUTED, "s"), ("m6", WITH_CACHE, "o")):
        times = measured_ttft(arm)
        ax.plot([1500 * share // 100 // 16 * 16 for share in times], list(times.values()), marker, color=colour, ms=7)
    ax.text(960, 1050, "m5, warm requests: no cache", color=COMPUTED, fontsize=10, weight="bold")
    ax.text(770, 640, "m6, warm requests", color=WITH_CACHE, fontsize=10, weight="bold")
    ax.text(60, 480, "the roofline: the least time\nthat 445 GFLOP/s allow", color=ROOFLINE, fontsize=10)
    ax.text(1040, 470, "calibrated", color=CALIBRATED, fontsize=10)
    ax.set(
        xlabel="tokens of the prompt that are found in the cache, of 1,500",
        ylabel="TTFT, ms",
        ylim=(0, 1150),
        xlim=(-20, 1500),
    )
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(alpha=0.3)
    figure_files.save(figure, path)


FIGURES = {
    "06_chat": chat,
    "06_block_map": block_map,
    "06_chain": chain,
    "06_eviction": eviction,
    "06_ttft": ttft,
}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
