"""Tasks of the notebooks: what the reader's cell computed is compared with what the engine says.

Milestone: M1. vLLM counterpart: none. Titles and hints lie in the file of questions (folovllm/learn/notebook.py).
"""

import copy
import dis
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

from folovllm.learn.notebook import IDENTIFIER, Shown, as_text, entry_of, is_real, plain

MAX_SHOWN = 300  # characters of the arguments of a case
UNDONE, PASSED, FAILED = "To do", "Passed", "Not yet"


def your_turn(id_or_title: str, answer: Any, expected: Any, hint: str = "") -> Shown:
    """Checks what the reader's cell computed, and says what differs. It never raises an error because of `answer`.

    Title and hint come from the file of questions if the first argument is an id. An `answer` of None is a task not
    begun. Numbers may differ by 1e-6; lists, tuples and arrays are compared entry by entry. If `answer` is a function,
    `expected` is a list of (arguments, result), with a tuple for several arguments: the first case that fails is shown.
    A function without code of the reader's, or one that raises NotImplementedError, is not begun.

        viz.your_turn("slot_of", slot_of, [(([7, 2, 9], 20, 16), 36)], hint="divide the position by the block size")
    """
    task = {"title": id_or_title, "hint": hint}
    if IDENTIFIER.fullmatch(id_or_title):
        task = entry_of("task", id_or_title)
    say = functools.partial(_shown_number, in_hex=bool(task.get("hex")))
    if callable(answer):
        verdict, said = _try_cases(answer, expected, say)
    elif answer is None:
        verdict, said = UNDONE, ""
    else:
        said = _difference(answer, expected, bool(task.get("ids")))
        verdict = FAILED if said else PASSED
    return _verdict(task["title"], verdict, said, task.get("hint", ""))


def _verdict(title: str, verdict: str, said: str, hint: str) -> Shown:
    told = f" Hint: {hint}" if hint and verdict != PASSED else ""
    colour = {UNDONE: "#0072B2", PASSED: "#00795A", FAILED: "#B84A00"}[verdict]
    said_html = f" {as_text(said)}" if said else ""
    told_html = f"<details><summary>Hint</summary><p>{as_text(hint)}</p></details>" if told else ""
    return Shown(
        f'<div style="border-left:4px solid {colour}; padding-left:8px"><p><b>Your turn. {as_text(title)}</b></p>'
        f'<p><b style="color:{colour}">{verdict}.</b>{said_html}</p>{told_html}</div>',
        f"Your turn. {title}\n{verdict}." + (f" {said}" if said else "") + told,
    )


def _try_cases(
    function: Callable[..., Any], cases: Sequence[tuple[Any, Any]], say: Callable[[Any], str]
) -> tuple[str, str]:
    """The verdict on a function, and what it did in the first case that fails. Each call gets arguments of its own."""
    if _is_empty(function):
        return UNDONE, ""
    for given, expected in cases:
        args = copy.deepcopy(given) if isinstance(given, tuple) else (copy.deepcopy(given),)
        call = f"{getattr(function, '__name__', 'your function')}({_shortened(', '.join(map(_shown_number, args)))})"
        try:
            result = function(*args)
        except NotImplementedError:
            return UNDONE, ""
        except Exception as error:
            return FAILED, f"{call} raised {type(error).__name__}: {error}"
        if result is None and expected is not None:
            return FAILED, f"{call} returned None: is the return missing? Expected {say(expected)}."
        if _difference(result, expected):
            return FAILED, f"{call} returned {say(result)}; expected {say(expected)}."
    return PASSED, f"{len(cases)} cases."


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def _is_empty(function: Callable[..., Any]) -> bool:
    """Whether the function has no code but a docstring and perhaps `return None`."""
    nothing = {"RESUME", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "NOP"}
    function = inspect.unwrap(function)
    if not isinstance(function, FunctionType):
        return False
    code = list(dis.get_instructions(function))
    loaded = [i.argval for i in code if i.opname in ("LOAD_CONST", "RETURN_CONST")]
    return {i.opname for i in code} <= nothing and loaded == [None]


def _shown_number(value: Any, in_hex: bool = False) -> str:
    """A value for a message: floats with four digits."""
    value = plain(value)
    if isinstance(value, list):
        return "[" + ", ".join(_shown_number(entry, in_hex) for entry in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_shown_number(entry, in_hex)}" for key, entry in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:#010X}".replace("X", "x") if in_hex and is_real(value) else repr(value)


def _difference(got: Any, expected: Any, ids: bool = False) -> str:
    """What is wrong with `got`, without giving `expected` away. Returns "" if they are the same."""
    got, expected = plain(got), plain(expected)
    if isinstance(expected, list):
        return _list_difference(got, expected, ids)
    if isinstance(expected, dict) and isinstance(got, dict):
        if got.keys() != expected.keys():
            return f"The keys are {list(got)}; one of them is wrong or missing."
        differing = [key for key in expected if _difference(got[key], expected[key])]
        return (
            f"The value of {differing[0]!r} is {_shown_number(got[differing[0]])}, which is not it."
            if differing
            else ""
        )
    if is_real(expected) and is_real(got):
        return _number_difference(got, expected, ids)
    return "" if type(got) is type(expected) and got == expected else f"{got!r} is not it."


def _number_difference(got: float, expected: float, ids: bool) -> str:
    if math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6) or (math.isnan(got) and math.isnan(expected)):
        return ""
    if isinstance(expected, int) and math.isfinite(got) and abs(got - expected) < 1:
        return f"{_shown_number(got)} would be right after rounding: the answer is a whole number."
    if ids or math.isnan(got):
        return f"{_shown_number(got)} is not it" + (": another one belongs here." if ids else ".")
    return f"{_shown_number(got)} is {'too large' if got > expected else 'too small'}."


def _list_difference(got: Any, expected: list[Any], ids: bool) -> str:
    if not isinstance(got, list):
        return f"{got!r} is not a list."
    if len(got) != len(expected):
        return f"Its length is {len(got)}; expected {len(expected)}."
    for i, (mine, right) in enumerate(zip(got, expected, strict=True)):
        if said := _difference(mine, right, ids):
            return f"Entry {i}: {said}"
    return ""
