"""The interview questions: loads the records of milestones/, checks their form, and computes their answers.

Milestone: M0. vLLM counterpart: none.

A record is a `[[q]]` table in milestones/mN/questions.toml, milestones/design_questions.toml or
milestones/number_drills.toml. It states the question, a 30-second and a 3-minute answer, the points of a good answer,
and Python code that checks what the answer claims. A record of kind "number" draws its variables, so that its answer is
computed and cannot be remembered; a record of kind "predict" computes its answer with the engine.
"""

import math
import random
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from folovllm.core.kv_cache_utils import kv_bytes_per_token
from folovllm.learn.exercise import milestones_dir
from folovllm.sim.hardware import HARDWARE
from folovllm.utils import cdiv, did_you_mean

KINDS = ("number", "predict", "explain", "code", "debug", "design")
LEVELS = ("screen", "core", "deep")
LANGS = ("en", "zh")
# File in milestones/ -> chapter; a chapter is what `folovllm quiz CHAPTER` asks, and the beginning of its ids.
SINGLE_FILES = {"design_questions.toml": "design", "number_drills.toml": "drill"}
FORMULA_NAMES: dict[str, Any] = {
    "ceil": math.ceil, "floor": math.floor, "sqrt": math.sqrt, "log2": math.log2,
    "min": min, "max": max, "round": round, "cdiv": cdiv, "kv_bytes_per_token": kv_bytes_per_token,
}  # fmt: skip
Text = Mapping[str, str]  # language -> text; "en" is always there


@dataclass(frozen=True)
class Point:
    """One line of the rubric. Without a `must` point an answer is not accepted."""

    text: Text
    must: bool


@dataclass(frozen=True)
class Question:
    """One record. The fields are the keys of the file, except `file` and `chapter`."""

    id: str
    kind: str
    level: str
    tags: tuple[str, ...]
    q: Text
    say30: Text
    points: tuple[Point, ...]
    trap: Text
    code: tuple[str, ...]
    source: tuple[str, ...]
    file: Path
    chapter: str  # "m0" .. "m10", "design", "drill"
    say3min: Text = field(default_factory=dict)
    follow: tuple[str, ...] = ()
    fact: int | None = None
    check: str = ""
    compute: str = ""
    vars: Mapping[str, list[Any]] = field(default_factory=dict)
    let: Mapping[str, str] = field(default_factory=dict)
    formula: str = ""
    unit: str = ""
    tolerance: float = 0.05

    def first_values(self) -> dict[str, Any]:
        """Returns the first value of every variable: what the generated pages show."""
        return {name: choices[0] for name, choices in self.vars.items()}

    def draw_values(self, rng: random.Random) -> dict[str, Any]:
        return {name: rng.choice(choices) for name, choices in self.vars.items()}

    def answer(self, values: Mapping[str, Any]) -> Any:
        """Returns the computed answer of a "number" or "predict" record for the drawn `values`."""
        if self.kind == "predict":
            names = _namespace(self, values)
            exec(compile(self.compute, f"{self.file.name}: compute of {self.id}", "exec"), names)
            return names["answer"]
        return eval(self.formula, {"__builtins__": {}}, FORMULA_NAMES | _namespace(self, values))

    def text(self, text: Text, values: Mapping[str, Any], lang: str = "en") -> str:
        """Returns `text` in `lang`, or in English where there is no such text, with {variables} and {answer} filled in.

        Only records with variables are filled in; in all others a brace is a brace.
        """
        template = text.get(lang) or text.get("en", "")
        if not self.vars:
            return template
        names = _namespace(self, values)
        return template.format_map(names | {"answer": self.answer(values)} if "{answer" in template else names)

    def run_check(self) -> None:
        """Runs the record's `check`. Raises AssertionError if the answer claims what is not so."""
        names: dict[str, Any] = {"__name__": self.id}
        exec(compile(self.check, f"{self.file.name}: check of {self.id}", "exec"), names)


def _namespace(question: Question, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the variables as formulas and texts see them: the key of a machine is the machine, a table has fields."""
    names: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, str) and value in HARDWARE:
            value = HARDWARE[value]
        names[name] = SimpleNamespace(**value) if isinstance(value, dict) else value
    for name, expression in question.let.items():
        names[name] = eval(expression, {"__builtins__": {}}, FORMULA_NAMES | names)
    return names


# ---- loading


def question_files(root: Path | None = None) -> list[Path]:
    root = root or milestones_dir()
    of_rungs = sorted(root.glob("m[0-9]*/questions.toml"), key=lambda path: int(path.parent.name[1:]))
    return [*of_rungs, *(p for n in SINGLE_FILES if (p := root / n).is_file())]


def load_questions(root: Path | None = None) -> dict[str, Question]:
    """Returns all records by id, in the order of the milestones. Raises ValueError with file, id and fix."""
    questions: dict[str, Question] = {}
    for file in question_files(root):
        for question in load_file(file):
            if (other := questions.get(question.id)) is not None:
                raise ValueError(f"{file}, {question.id}: {other.file} has this id, too; choose another one")
            questions[question.id] = question
    for question in questions.values():
        for id_ in question.follow:
            if id_ not in questions:
                raise _error(question.file, question.id, f"follow names {id_!r}{did_you_mean(id_, questions)}")
    return questions


def load_file(file: Path) -> list[Question]:
    """Returns the records of one file, each checked by itself."""
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of the format, or of UTF-8
        raise ValueError(f"{file} is not valid TOML: {error}") from None
    if set(tables) != {"q"} or not isinstance(tables["q"], list):
        raise ValueError(f"{file} must hold [[q]] records and nothing else, it has {', '.join(tables) or 'nothing'}")
    chapter = SINGLE_FILES.get(file.name, file.parent.name)
    return [_question(file, chapter, table) for table in tables["q"]]


_FIELDS = set(Question.__dataclass_fields__) - {"file", "chapter"}
_REQUIRED = ("id", "kind", "level", "tags", "q", "say30", "points", "trap", "code", "source")
_LISTS = ("tags", "code", "source", "follow")
_TEXTS = ("q", "say30", "say3min", "trap")
_STRINGS = ("id", "kind", "level", "check", "compute", "formula", "unit")


def _error(file: Path, id_: str, problem: str) -> ValueError:
    return ValueError(f"{file}, {id_}: {problem}")


def _question(file: Path, chapter: str, table: dict[str, Any]) -> Question:
    id_ = str(table.get("id", "a record without id"))
    for problem in _problems(chapter, table):
        raise _error(file, id_, problem)
    fields: dict[str, Any] = {name: tuple(value) if name in _LISTS else value for name, value in table.items()}
    fields["points"] = tuple(
        Point({k: v for k, v in point.items() if k != "must"}, point.get("must", False)) for point in table["points"]
    )
    question = Question(file=file, chapter=chapter, **fields)
    if question.kind == "number":
        _check_formula(question)
    return question


def _problems(chapter: str, table: dict[str, Any]) -> Iterable[str]:
    """Yields what is wrong with the form of a record; later ones rely on earlier ones."""
    for name in table:
        if name not in _FIELDS:
            yield f"unknown key {name!r}{did_you_mean(name, _FIELDS)}"
    for name in _REQUIRED:
        if name not in table:
            yield f"lacks {name!r}; every record has {', '.join(_REQUIRED)}"
    for name in _STRINGS:
        if not isinstance(table.get(name, ""), str):
            yield f"{name} must be a string"
    for name in _LISTS:
        value = table.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            yield f"{name} must be a list of strings"
    for name in ("tags", "code", "source", "points"):
        if not table[name]:
            yield f"{name} must not be empty"
    for name in _TEXTS:
        if name in table:
            yield from _text_problems(name, table[name])
    yield from _point_problems(table["points"])
    if not table["id"].startswith(f"{chapter}-"):
        yield f"the id must begin with '{chapter}-', as all of this file"
    if table["kind"] not in KINDS:
        yield f"kind {table['kind']!r} is none of {', '.join(KINDS)}"
    if table["level"] not in LEVELS:
        yield f"level {table['level']!r} is none of {', '.join(LEVELS)}"
    yield from _kind_problems(table)


def _text_problems(name: str, text: Any) -> Iterable[str]:
    if not isinstance(text, dict) or not all(isinstance(t, str) and t.strip() for t in text.values()):
        yield f'{name} must have a text per language: {name}.en = "..."'
    elif "en" not in text or not set(text) <= set(LANGS):
        yield f"{name} must be in {' and '.join(LANGS)} at most, and always in en"


def _point_problems(points: Any) -> Iterable[str]:
    if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
        yield "points must be a list like [{must = true, en = '...'}, {en = '...'}]"
        return
    for point in points:
        if not isinstance(point.get("must", False), bool):
            yield "must is true or false"
        yield from _text_problems("a point", {k: v for k, v in point.items() if k != "must"})
    if not any(point.get("must") for point in points):
        yield "at least one point must have must = true"


def _kind_problems(table: dict[str, Any]) -> Iterable[str]:
    kind, is_number = table["kind"], table["kind"] == "number"
    if "say3min" not in table and not is_number:
        yield f"lacks 'say3min'; only records of kind 'number' can do without it, this is {kind!r}"
    if is_number != bool(table.get("formula")) or is_number != bool(table.get("unit")):
        yield "a record of kind 'number', and no other, has a formula and a unit"
    if (kind == "predict") != bool(table.get("compute")):
        yield "a record of kind 'predict', and no other, has a compute, which sets `answer`"
    if is_number and not table.get("vars"):
        yield "a record of kind 'number' has vars to draw from, like vars.layers = [28, 32]"
    for name, choices in table.get("vars", {}).items():
        if not name.isidentifier() or not isinstance(choices, list) or not choices:
            yield f"vars.{name} must be a list of values under a Python name"
    if "let" in table and not all(isinstance(v, str) for v in table["let"].values()):
        yield "let must map names to expressions in quotes"
    fact = table.get("fact", 1)
    if not isinstance(fact, int) or not 1 <= fact <= 14:
        yield f"fact is the number of a wrong public claim, 1 to 14, not {fact!r}"


def _check_formula(question: Question) -> None:
    try:
        answer = question.answer(question.first_values())
    except Exception as error:
        raise _error(question.file, question.id, f"the formula fails: {type(error).__name__}: {error}") from None
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer) or answer == 0:
        raise _error(question.file, question.id, f"the formula must give a number that is not 0, it gives {answer!r}")
