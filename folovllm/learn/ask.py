"""What a learner may ask for: a hint, a layer at a time, a verdict on a prediction, and the engine's own source.

Milestone: M0. vLLM counterpart: none. Every answer is recorded. Nothing is forbidden, but an exercise that is passed
after a look at the solution counts as assisted.
"""

import ast
import difflib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from folovllm.learn.contract import plain_function
from folovllm.learn.exercise import ALL_PARTS, Exercise
from folovllm.learn.record import Record
from folovllm.parts import load_file


def next_hint(exercise: Exercise, record: Record) -> tuple[int, str]:
    """Returns the number and the text of the next layer. After the last one, it is the last one again."""
    layer = min(len(record.of(exercise, "hint")), len(exercise.hints) - 1)
    record.add("hint", exercise.id, layer=layer + 1)
    return layer + 1, exercise.hints[layer]


# ---- predictions


def check_prediction(exercise: Exercise, record: Record, answer: str) -> tuple[bool, str]:
    """Returns whether the answer is that of the engine, and the engine's own, which is computed now.

    Only the first line of the engine's answer is compared. The lines after it explain it, and may hold other numbers.
    """
    computed: str = load_file(exercise.folder / "checks.py").prediction()
    is_right = is_same_answer(answer, computed.split("\n", 1)[0])
    record.add("predict", exercise.id, answer=answer, right=is_right)
    return is_right, computed


def is_same_answer(answer: str, computed: str) -> bool:
    """Compares the numbers of two answers if the computed one has any. Otherwise its words must occur, in their order.

    E.g. "Blocks 1 and 2." is the same as "[1, 2]", and "It waits, I think" the same as "waits". A computed number with
    decimals is a rounded one, so 0.1353 is the same as 0.135.
    """
    if wanted := numbers_of(computed):
        found = numbers_of(answer)
        return len(found) == len(wanted) and all(map(_rounds_to, found, wanted))
    said = iter(_words(answer))
    return all(word in said for word in _words(computed))


def numbers_of(text: str) -> list[str]:
    """E.g. "1,365 blocks of 16.0" -> ["1365", "16.0"]. A comma between digits separates thousands only in front of
    three of them. The 4 of "float4" and the 2 of "m2" belong to names, and the 0x of "0x21" belongs to no number.
    """
    return re.findall(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)", re.sub(r"(?<=\d),(?=\d{3}\b)|\b0x(?=\d)", "", text))


def _rounds_to(number: str, computed: str) -> bool:
    decimals = len(computed.partition(".")[2])
    tolerance = 0.5001 * 10**-decimals if decimals else 0.0
    return abs(float(number) - float(computed)) <= tolerance


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


# ---- solutions


def solution(exercise: Exercise, record: Record, path: Path) -> Iterator[str]:
    """Yields, for each method that the learner writes, the engine's source and how the learner's differs from it."""
    if exercise.part == ALL_PARTS:
        raise ValueError(f"{exercise.id} is made of your other exercises; it has no solution of its own")
    record.add("solution", exercise.id)
    written = _methods_in(path, exercise.class_name)
    for name in exercise.write:
        function = plain_function(inspect.getattr_static(exercise.reference_class, name))
        source = textwrap.dedent(inspect.getsource(function)).strip() + "\n"
        yield f"# {function.__module__}: {function.__qualname__}\n{source}"
        if mine := written.get(name):
            yield _difference(_without_docstring(mine), _without_docstring(source))


def _methods_in(path: Path, class_name: str) -> dict[str, str]:
    """The source of each method of a class in a file; empty if the file cannot be parsed."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return {}
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for item in node.body:
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found[item.name] = textwrap.dedent(_source_lines(text, item))
    return found


def _source_lines(text: str, node: Any) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(text.split("\n")[first - 1 : node.end_lineno]) + "\n"


def _without_docstring(source: str) -> str:
    """The source of a function as it is, but for the lines of its docstring, which is no difference in what it does."""
    function = ast.parse(source).body[0]
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    if ast.get_docstring(function) is None:
        return source
    lines, docstring = source.splitlines(keepends=True), function.body[0]
    return "".join(lines[: docstring.lineno - 1] + lines[docstring.end_lineno :])


def _difference(mine: str, source: str) -> str:
    lines = difflib.unified_diff(mine.splitlines(), source.splitlines(), "yours", "the engine's", lineterm="", n=2)
    return "\n".join(lines) + "\n"


def check_source(exercise: Exercise, name: str) -> str:
    """The source of a check by its name, from checks.py or from the default checks; nothing is imported."""
    for path in (exercise.folder / "checks.py", Path(__file__).with_name("defaults.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return textwrap.dedent(_source_lines(text, node))
    return ""
