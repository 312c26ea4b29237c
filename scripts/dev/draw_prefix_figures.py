"""Draw the pictures of docs/learn/06: what a chat costs turn by turn, and the free queue while blocks are evicted.

Milestone: M6. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_prefix_figures.py [--out docs/learn/img]

Everything drawn is a run of the real scheduler on the fake executor; what the page quotes is asserted here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figure_files
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json"
COMPUTED, HIT, EMPTY, INK = "#d95f02", "#9fcbbb", "#f2f2f2", "#333333"
OWNERS = {"a": "#9fcbbb", "b": "#8da0cb", "c": "#ffd92f", "d": "#e78ac3"}

# Ten turns: 100 tokens from the user, 100 from the model.
TURNS, SAYS, ANSWERS = 10, 100, 100
CHAT_OFF = [100, 300, 500, 700, 900, 1100, 1300, 1500, 1700, 1900]  # tokens computed before each turn's first answer
CHAT_ON = [100, 108, 116, 108, 116, 108, 116, 108, 116, 108]
A = list(range(100, 110))
STORY = [
    ("a", A, 2),
    ("b", [*A[:8], 1, 2, 3], 2),
    ("c", list(range(200, 213)), 1),
    ("d", list(range(300, 313)), 1),
]
QUEUES = [
    [1, 2, 3, 4, 5, 6, 7, 8],
    [3, 4, 5, 6, 7, 8, 2, 1],
    [4, 5, 6, 7, 8, 3, 2, 1],
    [7, 8, 3, 2, 1, 6, 5, 4],
    [2, 1, 6, 5, 4, 3, 8, 7],
]


def make_core(**args: Any) -> EngineCore:
    config = EngineConfig.from_args(preset="m6", attention_backend="torch_naive", **args)
    return EngineCore(config.resolve(parse_hf_config(json.loads(SMOLLM2.read_text())), "cpu"), FakeExecutor())


def serve(core: EngineCore, name: str, prompt: Sequence[int], num_tokens: int) -> tuple[Request, int]:
    """Run one request to its end; the request, and how many tokens its first step computed."""
    request = Request(name, list(prompt), SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    core.add_request(request)
    first = 0
    while core.has_unfinished_requests():
        step = core.scheduler.schedule()
        first = first or step.num_scheduled_tokens[name]
        core.scheduler.update_from_output(step, core.executor.sample(core.executor.execute(step)))
    return request, first


def chat_costs(caching: bool) -> list[int]:
    core = make_core(max_model_len=2048, max_num_batched_tokens=2048, enable_prefix_caching=caching)
    history: list[int] = []
    costs = []
    for turn in range(TURNS):
        history += [(100 * turn + i) % 1000 for i in range(SAYS)]
        request, first = serve(core, f"turn {turn}", history, ANSWERS)
        history = request.all_token_ids
        costs.append(first)
    return costs


def chat(path: Path) -> None:
    """Tokens computed for the prompt of every turn."""
    off, on = chat_costs(False), chat_costs(True)
    assert (off, on, sum(off), sum(on)) == (CHAT_OFF, CHAT_ON, 10_000, 1_104)
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
    for ax, name, costs in ((axes[0], "off (m5)", off), (axes[1], "on (m6)", on)):
        turns = range(1, TURNS + 1)
        ax.bar(turns, costs, color=COMPUTED, label="computed")
        ax.bar(turns, [all_ - c for all_, c in zip(off, costs, strict=True)], bottom=costs, color=HIT, label="hit")
        ax.set_title(f"prefix caching {name}: {sum(costs):,} prompt tokens computed", loc="left", fontsize=10)
        ax.set(xlabel="turn", xticks=turns)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[0].set_ylabel("tokens of the prompt")
    axes[1].legend(fontsize=8, loc="upper left")
    figure_files.save(figure, path)


# ---- the free queue


@dataclass(frozen=True)
class Moment:
    """The free queue after a request was served, head first, and what each block still holds: id -> (owner, block)."""

    title: str
    queue: list[int]
    cached: dict[int, tuple[str, int]]


def moments() -> list[Moment]:
    core = make_core(max_model_len=16, block_size=4, num_kv_blocks=9, max_num_batched_tokens=64)
    pool = core.scheduler.kv_cache_manager.block_pool
    holds: dict[int, tuple[str, int]] = {}

    def look(title: str) -> Moment:
        queue = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        return Moment(title, queue, {b: holds[b] for b in queue if pool.blocks[b].block_hash is not None})

    found = [look("at the start")]
    for name, prompt, num_tokens in STORY:
        table, num_hit, num_evicted = watch(core, name, prompt, num_tokens)
        holds |= {block: (name, i) for i, block in enumerate(table) if i >= num_hit // 4}
        events = [f"{num_hit} tokens hit"] * (num_hit > 0) + [f"{num_evicted} blocks evicted"] * (num_evicted > 0)
        found.append(look(f"{name}: {', '.join(events) or 'nothing hit'}"))
    assert [moment.queue for moment in found] == QUEUES
    return found


def watch(core: EngineCore, name: str, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], int, int]:
    """Serve one request: its block table, how many tokens it hit, how many cached blocks it threw out."""
    pool = core.scheduler.kv_cache_manager.block_pool
    request = Request(name, list(prompt), SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    known = {block.block_id for block in pool.blocks if block.block_hash is not None}
    core.add_request(request)
    table: list[int] = []
    while core.has_unfinished_requests():
        step = core.scheduler.schedule()
        table = core.scheduler.kv_cache_manager.get_block_ids(name)[0]
        core.scheduler.update_from_output(step, core.executor.sample(core.executor.execute(step)))
    own = set(table[request.num_cached_tokens // 4 :])
    return table, request.num_cached_tokens, len(own & known)


def eviction(path: Path) -> None:
    """The queue from head to tail after each of four requests."""
    found = moments()
    figure, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
    for row, moment in enumerate(found):
        ax.text(-0.2, row, moment.title, ha="right", va="center", fontsize=9, color=INK)
        for column, block in enumerate(moment.queue):
            _draw_block(ax, column, row, block, moment.cached.get(block))
    ax.text(0.45, -0.85, "head: taken next", ha="center", fontsize=8, color=INK)
    ax.text(7.45, -0.85, "tail: lives longest", ha="center", fontsize=8, color=INK)
    ax.set(xlim=(-2.2, 8.1), ylim=(len(found) - 0.4, -1.1))
    ax.axis("off")
    figure_files.save(figure, path)


def _draw_block(ax: Axes, column: int, row: int, block: int, held: tuple[str, int] | None) -> None:
    colour = OWNERS[held[0]] if held else EMPTY
    ax.add_patch(Rectangle((column, row - 0.36), 0.9, 0.72, fc=colour, ec=INK, lw=0.6))
    label = f"{block}" + (f"\n{held[0]}, {4 * held[1]}-{4 * held[1] + 3}" if held else "")
    ax.text(column + 0.45, row, label, ha="center", va="center", fontsize=8, color=INK)


FIGURES = {"06_chat": chat, "06_eviction": eviction}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
