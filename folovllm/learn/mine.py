"""Your engine: the parts that you have written, put together from all exercises that you have passed.

Milestone: M1. vLLM counterpart: none.

Several exercises may be about one part: scheduling, preemption and chunks are all the scheduler's. If their classes
inherit from the same class of the engine, they become one class with several bases, the latest milestone first.
"""

import json
import os
from itertools import groupby
from pathlib import Path
from typing import Any

from folovllm.learn.exercise import Exercise, find_exercises
from folovllm.learn.files import friendly_os_errors
from folovllm.learn.record import digest, read_record
from folovllm.parts import load_class

FOLDER = ".mine"
HEADER = '"""Your parts for {part} as one class. Written by folovllm; do not edit."""\n\n'


def passed_exercises(work: Path) -> list[Exercise]:
    """The exercises about a part whose present file has passed: no capstone."""
    record = read_record(work)
    return [e for e in find_exercises() if e.replaces_a_part and record.is_passed(e)]


def my_parts(work: Path) -> dict[str, str]:
    """Returns part -> "path.py:Class" for every part that the learner has written. Raises ValueError if there is
    none.
    """
    passed = sorted(passed_exercises(work), key=lambda e: e.part)
    if not passed:
        raise ValueError(
            f"no exercise in {work}/ has passed, so there is no part of yours to run on; `folovllm learn` says what to "
            "do next, and a file that has changed must be checked again"
        )
    return {part: _combine(part, list(group), work) for part, group in groupby(passed, key=lambda e: e.part)}


def my_engine_args(work: Path) -> dict[str, Any]:
    """Returns the engine arguments that the learner's parts need.

    E.g. the attention of m1/kv_contiguous knows only pages as long as a request, until m3/paged_gather takes its place.
    """
    latest = {exercise.part: exercise.mine for exercise in passed_exercises(work)}  # sorted by milestone
    return {name: value for args in latest.values() for name, value in args.items()}


def _combine(part: str, exercises: list[Exercise], work: Path) -> str:
    """The file of one exercise, or a new one that puts several together."""
    chosen = _with_one_reference(exercises, work)
    if len(chosen) == 1:
        return f"{chosen[0].work_file(work)}:{chosen[0].class_name}"
    path = work / FOLDER / f"{part.replace('.', '_')}.py"
    text = HEADER.format(part=part) + "from pathlib import Path\n\nfrom folovllm.parts import load_file\n\n"
    text += "WORK = Path(__file__).parents[1]\n"
    for exercise in chosen:
        inside = exercise.work_file(Path()).as_posix()
        text += f'{exercise.milestone}_{exercise.name} = load_file(WORK / "{inside}").{exercise.class_name}\n'
    bases = ", ".join(f"{e.milestone}_{e.name}" for e in chosen)
    with friendly_os_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + f"\n\nclass Mine({bases}):\n    pass\n", encoding="utf-8")
    return f"{path}:Mine"


def _with_one_reference(exercises: list[Exercise], work: Path) -> list[Exercise]:
    """Those that can be combined, the latest first.

    Of different references the latest milestone wins. A class that does not inherit from the engine's brings all
    methods itself, so it stands alone.
    """
    latest_first = exercises[::-1]  # find_exercises sorts by milestone
    same = [e for e in latest_first if e.reference_class is latest_first[0].reference_class]
    scratch = [e for e in same if not _inherits(e, work)]
    return [e for e in same if e not in scratch] or scratch[:1]


def _inherits(exercise: Exercise, work: Path) -> bool:
    cls: Any = load_class(f"{exercise.work_file(work)}:{exercise.class_name}")
    return issubclass(cls, exercise.reference_class)


def write_engine(exercise: Exercise, work: Path) -> Path:
    """Writes the file of the capstone: the parts of the learner's engine, and the exercises that are missing."""
    passed = passed_exercises(work)
    missing = [need for need in exercise.needs if need not in {e.id for e in passed}]
    path = exercise.work_file(work)
    engine = {
        "missing": missing,
        "parts": {} if missing else {part: os.path.abspath(spec) for part, spec in my_parts(work).items()},
        "files": {e.id: digest(e.work_file(work)) for e in passed},
    }
    with friendly_os_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(engine, indent=1) + "\n", encoding="utf-8")
    return path
