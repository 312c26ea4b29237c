"""The questions of the notebooks: asked before an experiment, and answered by it.

Milestone: M1. vLLM counterpart: none. Left out: a record of guesses (`folovllm learn` keeps one for the exercises).

The texts lie in notebooks/src/questions_NN.toml and not in the cells, because GitHub shows a cell's code above its
output: with options and reason in the code, a reader would see the answer before the question.

    [[ask]]
    id = "03.1"
    question = "How many steps does the static batch take with {seats} seats?"  # {names} are arguments of ask()
    options = [6, 8, 10]     # left out if the answer is a number to compute
    values = [[0, 7], ...]   # what the experiment computes for each option, if that is not the option itself;
                             # two numbers are a range, without its end
    because = "..."          # {computed}, and the names that answer() gets

    [[task]]
    id = "03.t1"
    title = "..."
    hint = "..."
    ids = true               # its numbers are names of things: "too small" would mean nothing
    hex = true               # its numbers are shown in hexadecimal

    [delivered]              # the values of the knobs, as Python expressions; [[turn]] are other ones that a test tries
    SEATS = "3"
"""

import functools
import html
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLONE = Path(__file__).resolve().parents[2]
IDENTIFIER = re.compile(r"\d\d\.t?\d+")


class Shown:
    """HTML in a notebook, plain text elsewhere."""

    def __init__(self, as_html: str, as_text: str) -> None:
        self._html, self._text = as_html, as_text

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return self._text


def as_text(value: Any) -> str:
    """A value as HTML text. Whole numbers get thousands separators."""
    return html.escape(_said(value))


def _said(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---- the file of questions


def questions_file(number: str) -> Path:
    """Where the questions of notebook `number` are: beside the notebook, or in the clone that folovllm runs from."""
    name = f"src/questions_{number}.toml"
    folders = [Path.cwd(), *(folder / "notebooks" for folder in (Path.cwd(), *Path.cwd().parents, CLONE))]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"the questions of notebook {number} are not here: notebooks/{name} is part of the repository. "
        "Run the notebook in the folder notebooks of a clone"
    )


def read_questions(number: str) -> dict[str, Any]:
    """The tables of notebook `number`: ask and task by their ids, delivered, and the list turn."""
    path = questions_file(number)
    return _parsed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _parsed(path: Path, changed: int) -> dict[str, Any]:
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    for kind in ("ask", "task"):
        found[kind] = {entry["id"]: entry for entry in found.get(kind, [])}
    return {"delivered": {}, "turn": []} | found


def entry_of(kind: str, identifier: str) -> dict[str, Any]:
    if not IDENTIFIER.fullmatch(identifier):
        raise ValueError(f'{identifier!r} is no id of a question or task; an id is like "03.4" or "03.t1"')
    entries = read_questions(identifier[:2])[kind]
    if identifier not in entries:
        raise ValueError(
            f"{questions_file(identifier[:2]).name} has no [[{kind}]] {identifier}; it has {', '.join(entries)}"
        )
    entry: dict[str, Any] = entries[identifier]
    return entry


# ---- predictions

_asked: dict[str, tuple[str, Sequence[Any] | None, Any]] = {}  # id -> question, options, guess


def ask(identifier: str, guess: Any = None, options: Sequence[Any] | None = None, **values: Any) -> Shown:
    """Shows a question and its options, before the experiment. Later, `answer` says which option it was.

    Set `guess` to an option, or to its beginning, to have your own answer judged. `options` replaces those of the file,
    and `values` fill the names in braces.
    """
    entry = entry_of("ask", identifier)
    options = options or entry.get("options")
    question = _filled(entry, "question", values)
    _asked[identifier] = question, options, guess
    listed = "" if options is None else "<ul>" + "".join(f"<li>{as_text(o)}</li>" for o in options) + "</ul>"
    asked = " <i>(a number)</i>" if options is None else ""
    return Shown(
        f"<p><b>Predict {identifier}.</b> {html.escape(question)}{asked}</p>{listed}",
        f"Predict {identifier}. {question}" + ("" if options is None else f" {list(options)}"),
    )


def answer(identifier: str, computed: Any, **values: Any) -> Shown:
    """Says which option the experiment has shown to be right, and why. `values` fill the names in the reason.

    If it is none of the options, it is added to them: with other knobs, the answer may be another one.
    """
    entry = entry_of("ask", identifier)
    question, options, guess = _asked.get(identifier, (None, entry.get("options"), None))
    right = _option_of(computed, options, entry.get("values"))
    added = "" if options is None or right is not None else f" ({NOT_OFFERED})"
    shown = computed if right is None else right
    reason = _filled(entry, "because", values | {"computed": computed}) + added
    verdict = "" if guess is None else f" Your guess, {guess}, is {_judge(guess, shown, options)}."
    again = "" if question is None else f" <i>{html.escape(question)}</i>"
    reason_html = html.escape(reason + verdict)
    return Shown(
        f"<p><b>Answer to {identifier}.</b>{again}</p><p><b>{as_text(shown)}</b>. {reason_html}</p>",
        f"Answer to {identifier}: {_said(shown)}. {reason}{verdict}",
    )


def _filled(entry: Mapping[str, Any], part: str, values: Mapping[str, Any]) -> str:
    try:
        return str(entry[part].format(**values))
    except KeyError as missing:
        raise ValueError(f"the {part} of {entry['id']} needs {missing.args[0]}=...") from None


NOT_OFFERED = "This was none of the options: you have changed something, and the reason may not fit"


# What a notebook prints if its measurements contradict each other. The builder does not publish such a run.
MEASURE_AGAIN = "other programs disturbed the measurement; run it again on a quiet machine"


def _option_of(computed: Any, options: Sequence[Any] | None, values: Sequence[Any] | None) -> Any:
    """The option that stands for what was computed. Returns None if there is none."""
    for option, value in zip(options or (), values or options or (), strict=True):
        if _stands_for(value, plain(computed), is_range=values is not None):
            return option
    return None


def _stands_for(value: Any, computed: Any, is_range: bool) -> bool:
    value = plain(value)
    if is_range and isinstance(value, list) and len(value) == 2 and all(map(is_real, value)) and is_real(computed):
        return bool(value[0] <= computed < value[1])
    return bool(value == computed)


def _judge(guess: Any, right: Any, options: Sequence[Any] | None) -> str:
    meant = [option for option in options or () if str(option) == str(guess)]
    meant = meant or [option for option in options or () if str(option).startswith(str(guess))]
    return "right" if str(right) in map(str, meant[:1] or [guess]) else "not it"


def as_delivered(number: str, namespace: Mapping[str, Any]) -> bool:
    """Whether the knobs of notebook `number` are as delivered. Says so if not: what it claims holds for those only."""
    delivered = read_questions(number)["delivered"]
    turned = [name for name, text in delivered.items() if namespace[name] != eval(text, dict(namespace))]
    if turned:
        print(f"You have changed {', '.join(turned)}: what this notebook claims is not checked.")
    return not turned


def plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists, so that only their values are compared."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
