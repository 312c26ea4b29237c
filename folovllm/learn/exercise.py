"""Exercises: what milestones/mN/exercises holds, as data.

Milestone: M0. vLLM counterpart: none.

The folder names are the id: milestones/m3/exercises/block_pool is "m3/block_pool". The files of an exercise are read
from the repository if the package runs from a clone, and otherwise from the copy inside the installed package.
"""

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from folovllm.milestones import get_rung, rung_number
from folovllm.parts import PARTS, load_class
from folovllm.utils import did_you_mean

PACKAGE = Path(__file__).parents[1]
ALL_PARTS = "all"  # `part` of the capstone: it grades an engine made of all parts that the learner has written
NO_PART = (
    "none"  # `part` of an exercise on a class that the engine does not load as a part; `reference` names the class
)


def milestones_dir() -> Path:
    """The folder milestones/ of the clone that the package is in, or else the copy in the installed package."""
    of_clone = PACKAGE.parent / "milestones"
    return of_clone if (of_clone / "manifest.toml").is_file() else PACKAGE / "_milestones"


@dataclass(frozen=True)
class Exercise:
    """One exercise.toml and the folder that it is in."""

    folder: Path
    title: str
    part: str  # a name of folovllm.parts.PARTS, "all" or "none"
    class_name: str  # "class" in the file
    write: tuple[str, ...]  # the methods that the learner writes
    minutes: int
    level: int  # 1 easy .. 3 hard
    spec: tuple[str, ...]
    predict: str
    hints: tuple[str, ...]
    after: str
    reference: str = ""  # "module:Class"; the default is the part's own
    fast: bool = False  # on the fast track: one exercise per milestone
    needs: tuple[str, ...] = ()
    torch: bool = False
    trace: bool | None = None  # compare traces on the toy engine; None: if the exercise is not about tensors
    engine: dict[str, Any] = field(default_factory=dict)
    mine: dict[str, Any] = field(default_factory=dict)  # engine arguments without which --mine cannot run on the class

    @property
    def milestone(self) -> str:
        return self.folder.parents[1].name

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def id(self) -> str:
        return f"{self.milestone}/{self.name}"

    @property
    def replaces_a_part(self) -> bool:
        """Whether an engine can be built with the learner's class, by the argument `parts`."""
        return self.part not in (ALL_PARTS, NO_PART)

    @property
    def subject(self) -> str:
        """What the learner writes a piece of: a part, or a class of the engine."""
        return self.part if self.replaces_a_part else self.reference.rpartition(":")[2]

    @property
    def compares_traces(self) -> bool:
        return not self.torch and self.replaces_a_part if self.trace is None else self.trace

    @property
    def skeleton(self) -> Path:
        return self.folder / "skeleton.py"

    @property
    def mutants(self) -> list[Path]:
        return sorted((self.folder / "mutants").glob("*.py"))

    @cached_property
    def reference_class(self) -> Any:
        return load_class(self.reference or PARTS[self.part].default)

    def work_file(self, work: Path) -> Path:
        """The learner's file, e.g. work/m3/block_pool.py. That of the capstone lists the parts it is made of."""
        return work / self.milestone / f"{self.name}{'.json' if self.part == ALL_PARTS else '.py'}"

    def command(self, verb: str) -> str:
        """What the learner types. E.g. "folovllm learn m3 hint block_pool"."""
        return f"folovllm learn {self.milestone} {verb} {self.name}"


def find_exercises(milestone: str | None = None, root: Path | None = None) -> list[Exercise]:
    """Returns all exercises, or those of a milestone, in the order in which they are best done."""
    folders = sorted((root or milestones_dir()).glob(f"{milestone or '*'}/exercises/*/exercise.toml"))
    return in_order([load_exercise(path.parent) for path in folders])


def in_order(exercises: list[Exercise]) -> list[Exercise]:
    """Milestone by milestone; in one, an exercise after those that it needs, then the easy ones first."""
    order, left = [], sorted(exercises, key=lambda e: (rung_number(e.milestone), e.level, e.minutes, e.name))
    while left:
        open_ids = {exercise.id for exercise in left}
        ready = next((e for e in left if not open_ids & set(e.needs)), left[0])  # left[0]: a circle, which a test finds
        order.append(ready)
        left.remove(ready)
    return sorted(order, key=lambda e: rung_number(e.milestone))


def get_exercise(milestone: str, name: str, root: Path | None = None) -> Exercise:
    """Raises ValueError, with the exercises there are and the nearest name, for a milestone or exercise that is not."""
    get_rung(milestone)
    exercises = {exercise.name: exercise for exercise in find_exercises(milestone, root)}
    name = name.removeprefix(f"{milestone}/").removesuffix(".py")
    if name not in exercises:
        there_are = f"{milestone} has {', '.join(exercises)}" if exercises else f"{milestone} has no exercises"
        raise ValueError(f"no exercise {name!r} in {milestone}; {there_are}{did_you_mean(name, exercises)}")
    return exercises[name]


# ---- reading a file


def load_exercise(folder: Path) -> Exercise:
    """Reads exercise.toml. Raises ValueError that names the file and the field for anything wrong in it."""
    exercise: Exercise = read_fields(folder / "exercise.toml", Exercise, lint)
    return exercise


def read_fields(path: Path, made: Any, lint: Callable[[Any], list[str]]) -> Any:
    """Returns the dataclass `made` with the file's folder and the fields of the file, in which `class` is `class_name`.

    Raises ValueError that names the file and the field for anything wrong, `lint` included.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    values["class_name"] = values.pop("class", "")
    known = {f.name: f.type for f in fields(made) if f.name != "folder"}
    for name in values.keys() - known.keys():
        raise ValueError(f"{path}: unknown field {name!r}{did_you_mean(name, known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in values.items():
        if not _is_a(value, known[name]):
            raise ValueError(f"{path}: {name} cannot be {value!r}; it is of the kind {known[name]}")
    try:
        read = made(path.parent, **values)
    except TypeError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{made.__name__}.__init__() ')}") from None
    if problems := lint(read):
        raise ValueError(f"{path}: {problems[0]}")
    return read


def _is_a(value: Any, kind: Any) -> bool:
    """E.g. (("a", "b"), tuple[str, ...]) -> True. What a dict holds is not looked at."""
    if get_origin(kind) is UnionType:
        return isinstance(value, kind)
    if not isinstance(value, get_origin(kind) or kind):
        return False
    return not isinstance(value, tuple) or all(_is_a(item, get_args(kind)[0]) for item in value)


def lint(exercise: Exercise) -> list[str]:
    """What is wrong with the fields themselves; guard.py looks at the files beside."""
    capstone, partless = exercise.part == ALL_PARTS, exercise.part == NO_PART
    rules = {
        f"part {exercise.part!r} is not in folovllm/parts.py": capstone or partless or exercise.part in PARTS,
        "part 'none' needs a reference, the class of the engine that the learner writes": not partless
        or bool(exercise.reference),
        "class and write must name what the learner writes": capstone or bool(exercise.class_name and exercise.write),
        "hints must be three layers": len(exercise.hints) == 3 and all(exercise.hints),
        "title, predict and after must not be empty": bool(exercise.title and exercise.predict and exercise.after),
        "level must be 1, 2 or 3": exercise.level in (1, 2, 3),
        "minutes must be between 5 and 180": 5 <= exercise.minutes <= 180,
        "spec must name requirements": bool(exercise.spec),
        "needs must be ids such as 'm3/block_pool'": all(re.fullmatch(r"m\d+/\w+", need) for need in exercise.needs),
    }
    missing = [spec_id for spec_id in exercise.spec if spec_line(spec_id, exercise.folder.parents[2]) is None]
    unknown = [f"spec {spec_id} is not in the SPEC.md of its milestone" for spec_id in missing]
    return [problem for problem, kept in rules.items() if not kept] + unknown


def spec_line(spec_id: str, root: Path | None = None) -> str | None:
    """The requirement as SPEC.md words it. E.g. "R3.4" -> "No new blocks is success.", or None if there is none."""
    number = re.fullmatch(r"R(\d+)\.\d+", spec_id)
    path = (root or milestones_dir()) / f"m{number[1] if number else ''}" / "SPEC.md"
    if not path.is_file():
        return None
    found = re.search(rf"^- {re.escape(spec_id)} (.+?)(?: — .*)?$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None
