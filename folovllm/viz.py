"""viz: what the notebooks draw and ask. Small matplotlib helpers that give the same request the same colour everywhere.

Milestone: M1 (grows with the notebooks). vLLM counterpart: none. Left out: animation, and interactive elements except a
slider (`explore`). The slider needs ipywidgets; without it, the same pictures appear side by side.

Row 5: matplotlib and the standard library, no torch. Every helper takes plain data (dicts, lists, trace entries), so a
notebook can print what it draws. Code is coloured by pygments, which comes with Jupyter, and stays plain without it.
"""

import html
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import Locator

from folovllm.learn.notebook import MEASURE_AGAIN as MEASURE_AGAIN
from folovllm.learn.notebook import Shown as Shown
from folovllm.learn.notebook import answer as answer
from folovllm.learn.notebook import as_delivered as as_delivered
from folovllm.learn.notebook import as_text
from folovllm.learn.notebook import ask as ask
from folovllm.learn.notebook_tasks import FAILED as FAILED
from folovllm.learn.notebook_tasks import PASSED as PASSED
from folovllm.learn.notebook_tasks import UNDONE as UNDONE
from folovllm.learn.notebook_tasks import your_turn as your_turn
from folovllm.utils import cdiv

# Okabe and Ito's palette without black, and Tol's indigo: eight colours that colour-blind people can tell apart. Grey
# is reserved for a free block or a waiting request. Names are drawn too, so no meaning depends on a colour alone.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#332288")
NOBODY, INK = "#DDDDDD", "#333333"
_DARK = frozenset({"#0072B2", "#009E73", "#D55E00", "#332288"})  # white text is read more easily on these
DPI = 80  # GitHub shows notebooks about 800 pixels wide
ROOT = Path(__file__).resolve().parents[1]  # the repository, or the folder that folovllm is installed in


def style() -> None:
    """Sets font and figure sizes for a notebook page. Call it once."""
    plt.rcParams.update(
        {
            "figure.dpi": DPI, "savefig.dpi": DPI, "figure.figsize": (9, 3), "figure.constrained_layout.use": True,
            "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left",
            "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        }
    )  # fmt: skip


def colours_of(names: Iterable[str]) -> dict[str, str]:
    """Returns a colour for each request, in the given order. The ninth request has the colour of the first again."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}


# ---- text: tables


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Shown:
    """A small table. Numbers are aligned right, text left. Floats have as many decimals as a column needs, up to 2."""
    given = [list(row) for row in rows]
    assert all(len(row) == len(header) for row in given), "a row of another length than the header"
    decimals = [_decimals(column) for column in zip(*given, strict=True)]
    lines = [[_cell(value, d) for value, d in zip(row, decimals, strict=True)] for row in given]
    right = [all(_is_number(line[i]) for line in lines) for i in range(len(header))]
    tags = ["right" if r else "left" for r in right]
    head = "".join(f'<th style="text-align:{t}">{as_text(h)}</th>' for h, t in zip(header, tags, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:{t}">{as_text(c)}</td>' for c, t in zip(line, tags, strict=True))
        + "</tr>"
        for line in lines
    )
    widths = [max(len(cell) for cell in column) for column in zip(header, *lines, strict=True)]
    text = "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in [list(header), *lines]
    )
    return Shown(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", text)


def _decimals(column: Iterable[Any]) -> int:
    """The fewest decimals, at most 2, that say as much as 2 about every float of the column."""
    floats = [value for value in column if isinstance(value, float) and math.isfinite(value)]
    return next((d for d in (0, 1) if all(round(value, d) == round(value, 2) for value in floats)), 2)


def _cell(value: Any, decimals: int) -> str:
    if isinstance(value, float):
        return f"{value:,.{decimals}f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(cell: str) -> bool:
    return cell.strip("%x-").replace(",", "").replace(".", "", 1).isdigit()


# ---- text: the engine's code


def source(obj: Any, start: str = "", end: str = "") -> Shown:
    """The code of a function, method or class, below its file and name. It is the code that runs, not a copy of it.

    `start` and `end` limit it to the lines from the first one that contains `start` to the first one after it that
    contains `end`.
    """
    if isinstance(obj, property):
        obj = obj.fget
    lines = inspect.getsource(obj).rstrip().splitlines()
    first = next(i for i, line in enumerate(lines) if start in line)
    last = next(i for i, line in enumerate(lines) if i > first and end in line) if end else len(lines) - 1
    code = textwrap.dedent("\n".join(lines[first : last + 1]))
    file = Path(inspect.getsourcefile(inspect.unwrap(obj)) or "").resolve()
    where = f"{file.relative_to(ROOT).as_posix()}, " if file.is_relative_to(ROOT / "folovllm") else ""
    name = getattr(obj, "__qualname__", getattr(obj, "__name__", ""))
    heading = f"{where}{name}".rstrip(", ") + (", in part" if start or end else "")
    return Shown(f"<p><code>{as_text(heading)}</code></p>{_highlighted(code)}", f"# {heading}\n{code}")


def _highlighted(code: str) -> str:
    """HTML with colours in the tags themselves, so that they survive where style sheets do not."""
    box = "background:#f8f8f8; color:#222222; line-height:125%; margin:0; padding:6px; overflow-x:auto"
    try:
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer
    except ImportError:
        return f'<pre style="{box}">{html.escape(code)}</pre>'
    return highlight(code, PythonLexer(), HtmlFormatter(noclasses=True, nobackground=True, prestyles=box))


# ---- a slider


def explore(draw: Callable[[Axes, Any], None], name: str, values: Sequence[Any], size: tuple[float, float]) -> None:
    """Calls `draw(axes, value)` for every value: small pictures side by side, and a slider if ipywidgets is installed.

    `size` is that of the whole row in inches.
    """
    _, axes = plt.subplots(1, len(values), figsize=size, squeeze=False, sharex=True, sharey=True)
    for ax, value in zip(axes[0], values, strict=True):
        draw(ax, value)
        ax.label_outer()
        ax.set_title(f"{name} = {value}")
    try:
        from ipywidgets import SelectionSlider, interact
    except ImportError:
        return

    def one(value: Any) -> None:
        _, ax = plt.subplots(figsize=(size[0] / 2, size[1]))
        draw(ax, value)
        plt.show()

    interact(one, value=SelectionSlider(options=list(values), description=name))


# ---- pictures: distributions


def bars(
    ax: Axes,
    labels: Sequence[str],
    probs: Sequence[float],
    colour: str = PALETTE[0],
    before: Sequence[float] | None = None,
) -> None:
    """A distribution. Tokens with probability 0 are crossed out, and `before` is drawn as an outline behind."""
    places = range(len(labels))
    if before is not None:
        ax.bar(places, before, width=0.8, facecolor="none", edgecolor="#999999", linewidth=0.8)
    ax.bar(places, probs, width=0.6, color=colour)
    if gone := [i for i, p in enumerate(probs) if p == 0]:  # an empty line would widen the picture
        ax.plot(gone, [0.0] * len(gone), "x", color=INK, markersize=5, clip_on=False, zorder=3)
    ax.set_xticks(list(places), labels, rotation=60, ha="right", rotation_mode="anchor")
    highest = max(*probs, *(before or [0.0]), 0.05) * 1.12
    shared = len(ax.get_shared_y_axes().get_siblings(ax)) > 1
    drawn_before = ax.get_ylim()[1] if shared and not ax.get_autoscaley_on() else 0.0  # keep a taller neighbour whole
    ax.set_ylim(0, max(highest, drawn_before))


# ---- pictures: the way of a token through the engine

# (place, column, row) of each stop: down on the left, through the layers, up on the right.
_STOPS = (
    ("text", 0, 3), ("core", 0, 2), ("worker", 0, 1), ("worker", 1, 1), ("layer", 0, 0), ("layer", 1, 0),
    ("layer", 2, 0), ("layer", 3, 0), ("worker", 2, 1), ("worker", 3, 1), ("core", 3, 2), ("text", 3, 3),
)  # fmt: skip
_BANDS = {  # place: (first row, rows, fill of the band, fill of its boxes, name)
    "text": (3, 1, "#F2F2F2", "#DDDDDD", "text"),
    "core": (2, 1, "#E3EFFA", "#B9D7F2", "core: decides, no tensors"),
    "worker": (0, 2, "#FDEFDD", "#FAD7A8", "worker: computes"),
}
_MESSAGES = {1: "Request", 2: "SchedulerOutput", 10: "ModelRunnerOutput", 11: "new token ids"}  # before which stop


def route(ax: Axes, stops: Sequence[tuple[str, str]], layers: int) -> None:
    """The 12 stops of a step, each (title, what leaves it), in text, core and worker, and the messages between them."""
    assert len(stops) == len(_STOPS)
    for first, rows, fill, _, name in _BANDS.values():
        ax.add_patch(Rectangle((-0.06, first + 0.03), 4.08, rows - 0.06, fc=fill, ec="none"))
        ax.text(1.98, first + rows - 0.12, name, ha="center", va="top", weight="bold", color="#555555")
    ax.text(1.98, 0.92, f"these four in each of the {layers} layers", ha="center", va="center", size=8, color="#555555")
    for number, ((place, column, row), (title, output)) in enumerate(zip(_STOPS, stops, strict=True)):
        fill = "#F5BE75" if place == "layer" else _BANDS[place][3]
        x, y = column + 0.03, row + 0.2
        ax.add_patch(FancyBboxPatch((x, y), 0.84, 0.5, boxstyle="round,pad=0.02", fc=fill, ec=INK, lw=0.8))
        ax.text(x + 0.42, y + 0.4, f"{number + 1}  {title}", ha="center", va="center", weight="bold", color=INK)
        ax.text(x + 0.42, y + 0.15, output, ha="center", va="center", size=8, color=INK, linespacing=1.05)
        if number:
            _arrow_between(ax, _STOPS[number - 1][1:], (column, row), _MESSAGES.get(number, ""))
    ax.set(xlim=(-0.08, 4.04), ylim=(0, 4))
    ax.axis("off")


def _arrow_between(ax: Axes, before: tuple[int, int], after: tuple[int, int], message: str) -> None:
    """An arrow from the box in (column, row) `before` to the one in `after`, with the message that it carries."""
    (x0, y0), (x1, y1) = ((column + 0.45, row + 0.45) for column, row in (before, after))
    dx, dy = x1 - x0, y1 - y0
    reach_x, reach_y = 0.45 * (dx > 0) - 0.45 * (dx < 0), 0.28 * (dy > 0) - 0.28 * (dy < 0)
    style = {"arrowstyle": "-|>", "color": INK, "lw": 2.0 if message else 1.0, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (x1 - reach_x, y1 - reach_y), (x0 + reach_x, y0 + reach_y), arrowprops=style)
    on_left = x0 < 2
    ax.text(
        x0 + (0.05 if on_left else -0.05), (y0 + y1) / 2, message,
        ha="left" if on_left else "right", va="center", size=8, style="italic", color=INK,
    )  # fmt: skip


# ---- pictures: which request computes when. `steps` is one list of trace entries per tick (folovllm/trace/record.py).

Steps = Sequence[Sequence[Mapping[str, Any]]]


def gantt(ax: Axes, steps: Steps, arrivals: Mapping[str, int], colours: Mapping[str, str]) -> None:
    """Steps x requests. A plain cell computes one token, a hatched one as many as its label says; a line is waiting."""
    for row, (name, arrival) in enumerate(arrivals.items()):
        mine = {t: e for t, entries in enumerate(steps) for e in entries if e["req"] == name}
        if not mine:
            ax.plot([arrival, len(steps)], [row, row], color="#999999", lw=1.2)
            continue
        idle = [t for t in range(arrival, max(mine)) if t not in mine]
        ax.hlines([row] * len(idle), idle, [t + 1 for t in idle], color="#999999", lw=1.2, zorder=1)
        ax.plot([arrival], [row], "|", color=INK, markersize=9, zorder=4)
        for t, entry in mine.items():
            _gantt_cell(ax, t, row, entry, colours[name])
    ax.set(xlim=(0, len(steps)), ylim=(len(arrivals) - 0.5, -0.5))
    ax.set_yticks(range(len(arrivals)), list(arrivals))
    ax.set_ylabel("request")
    _number_steps(ax)


class _MiddleOfSteps(Locator):
    """Ticks in the middle of steps, whose cells are one unit wide: 0.5, 1.5, ... Of many steps, some get a tick."""

    def __call__(self) -> Sequence[float]:
        assert self.axis is not None, "matplotlib sets it before it asks for ticks"
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**9) if vmax - vmin <= 24 * n)
        return [step + 0.5 for step in range(0, math.ceil(vmax), every) if vmin <= step + 0.5 <= vmax]


def _number_steps(ax: Axes) -> None:
    ax.xaxis.set_major_locator(_MiddleOfSteps())
    ax.xaxis.set_major_formatter(lambda place, _: f"{place - 0.5:.0f}")


def _gantt_cell(ax: Axes, tick: int, row: int, entry: Mapping[str, Any], colour: str) -> None:
    many = entry["n"] > 1
    hatch = "////" if many else None
    ax.add_patch(Rectangle((tick, row - 0.4), 1, 0.8, fc=colour, ec="white", lw=0.6, hatch=hatch, zorder=2))
    if many:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
        ax.text(tick + 0.5, row, str(entry["n"]), ha="center", va="center", size=8, color=INK, bbox=box, zorder=3)


def token_bars(ax: Axes, steps: Steps, colours: Mapping[str, str]) -> None:
    """Tokens computed in each step, stacked by request."""
    tops = [0] * len(steps)
    for t, entries in enumerate(steps):
        for entry in entries:
            ax.bar(t + 0.5, entry["n"], width=0.9, bottom=tops[t], color=colours[entry["req"]])
            tops[t] += entry["n"]
    ax.set(xlim=(0, len(steps)), ylabel="tokens")
    _number_steps(ax)


# ---- pictures: blocks


def block_map(
    ax: Axes,
    tables: Mapping[str, Sequence[int]],
    lengths: Mapping[str, int],
    num_blocks: int,
    block_size: int,
    colours: Mapping[str, str],
    columns: int = 8,
) -> None:
    """The physical pool: a cell per block, a square per slot. Full colour is K/V, hatching is reserved but unused."""
    owner = {block: (name, i) for name, table in tables.items() for i, block in enumerate(table)}
    for block in range(num_blocks):
        x, y = block % columns, block // columns
        name, i = owner.get(block, ("", 0))
        used = max(0, min(block_size, lengths.get(name, 0) - i * block_size)) if name else 0
        _block(ax, x, y, used, block_size, colours.get(name))
        label = "null" if block == 0 else f"{block}" + (f" = {name}{i}" if name else "")
        ax.text(x + 0.46, y + 0.78, label, ha="center", va="center", size=8, color=INK)
    rows = cdiv(num_blocks, columns)
    ax.set(xlim=(-0.05, columns), ylim=(rows, -0.05))
    ax.set_aspect("equal")
    ax.axis("off")


def _block(ax: Axes, x: float, y: float, used: int, block_size: int, colour: str | None) -> None:
    width = 0.92 / block_size
    for slot in range(block_size):
        face = NOBODY if colour is None else colour if slot < used else "white"
        hatch = "////" if colour is not None and slot >= used else None
        edge = "white" if hatch is None else colour
        ax.add_patch(Rectangle((x + slot * width, y + 0.05), width, 0.58, fc=face, ec=edge, lw=0.6, hatch=hatch))
    ax.add_patch(Rectangle((x, y + 0.05), 0.92, 0.58, fc="none", ec=INK if colour else "#999999", lw=0.8))


def strip(ax: Axes, segments: Iterable[tuple[float, float, str, str]], length: float, hatched: bool = False) -> None:
    """Memory as one bar from 0 to `length`, with (start, size, colour, label) for every piece in use."""
    ax.add_patch(Rectangle((0, 0), length, 1, fc=NOBODY, ec="none"))
    for start, size, colour, label in segments:
        hatch = "////" if hatched else None
        ax.add_patch(Rectangle((start, 0), size, 1, fc=colour, ec="white", lw=0.8, hatch=hatch))
        ink = "white" if colour in _DARK else INK
        ax.text(start + size / 2, 0.5, label, ha="center", va="center", size=8, color=ink)
    ax.set(xlim=(0, length), ylim=(0, 1))
    ax.set_yticks([])
