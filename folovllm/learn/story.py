"""Results as a story: a line per level, and for the first failure what was done, what came out, and what to ask next.

Milestone: M0. vLLM counterpart: none (its tests print tracebacks). Plain text here; the command adds the colours.
"""

import inspect
import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from folovllm.learn.check import LEVELS
from folovllm.learn.exercise import Exercise, spec_line
from folovllm.learn.grade import FAILED, NOT_WRITTEN, OK, SKIPPED, Result, load_checks

WIDTH = 110
MEANING = {
    "contract": "the class fits the engine, and its methods are yours",
    "unit": "small cases",
    "property": "long random sequences",
    "trace": "the same decisions as the engine's own part",
    "engine": "a real engine runs on it",
    "counters": "resources that it uses",
}


def heading(exercise: Exercise, path: Path) -> str:
    written = f"yours: {', '.join(exercise.write)}" if exercise.write else exercise.title
    return f"{exercise.id}   {path}   {written}"


def story(exercise: Exercise, path: Path, results: Iterable[Result], why: bool = False) -> Iterator[str]:
    """Yields lines as results come in: a level is told when it is complete."""
    told_failure = False
    for level, group in groupby(results, key=lambda result: result.level):
        of_level = list(group)
        yield _level_line(level, of_level)
        first = next((r for r in of_level if r.status in (FAILED, NOT_WRITTEN)), None)
        if first is not None and not told_failure:
            told_failure = True
            yield from _failure(exercise, path, first)
            if why:
                yield from source_of(exercise, first.check)
            others = [r.check for r in of_level if r.status == FAILED and r is not first]
            if others:
                yield _indented(f"Also failing: {', '.join(others)}. They may have the same cause.")


def _level_line(level: str, results: list[Result]) -> str:
    passed = sum(result.status == OK for result in results)
    if all(result.status == SKIPPED for result in results):
        verdict = "skipped until the levels above pass"
    elif passed == len(results):
        verdict = f"{'ok' if len(results) == 1 else f'{passed}/{passed} ok':8} {MEANING[level]}"
    elif any(result.status == FAILED for result in results):
        verdict = f"{'failed' if len(results) == 1 else f'{passed}/{len(results)}':8} {MEANING[level]}"
    else:
        verdict = f"{'to do':8} not written yet"
    return f" {LEVELS.index(level)} {level:9} {verdict}"


def _failure(exercise: Exercise, path: Path, result: Result) -> Iterator[str]:
    if result.status == NOT_WRITTEN:
        yield _indented(f"Not written yet: {result.message.removeprefix(f'{exercise.id}: ')}. ({result.where})")
        return
    if result.level != "contract":
        yield _indented(f"{result.check}: {result.doc}")
    yield _indented(result.message)
    if result.where:
        yield _indented(f"In {path}, {result.where}")
    if requirement := result.spec and spec_line(result.spec, exercise.folder.parents[2]):
        yield _indented(f"SPEC {result.spec}: {requirement}")
    if result.level != "contract":
        yield _indented(f"Hint {result.hint} of 3: {exercise.command('hint')}")
        yield _indented(f"The check itself: {exercise.command('check')} --why")


def source_of(exercise: Exercise, name: str) -> Iterator[str]:
    """The source of a check, as it is in checks.py."""
    for check in load_checks(exercise):
        if check.name == name:
            yield textwrap.indent(inspect.getsource(check.function).rstrip(), "     | ")


def _indented(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="     ", subsequent_indent="     ", break_on_hyphens=False)
