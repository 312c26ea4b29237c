"""Results as a story: a line per level, and for the first failure what was done, what came out, and what to ask next.

Milestone: M0. vLLM counterpart: none (its tests print tracebacks). Plain text; the command adds the colours.
"""

import textwrap
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from folovllm.learn.ask import check_source
from folovllm.learn.exercise import ALL_PARTS, Exercise, spec_line
from folovllm.learn.grade import FAILED, NOT_WRITTEN, OK, SKIPPED, Result

WIDTH = 110
MAX_PRINTED_LINES = 20
MEANING = {
    "contract": "your class fits the engine, and the methods are your own",
    "unit": "small cases",
    "property": "long random sequences",
    "trace": "the toy engine decides the same with your class and with the engine's",
    "engine": "a real engine runs on it",
    "counters": "it uses no more than it should",
}


def heading(exercise: Exercise, path: Path) -> str:
    """E.g. "m3/block_pool   work/m3/block_pool.py   yours: get_new_blocks (the engine's own class does the rest)"."""
    if exercise.part == ALL_PARTS:
        return f"{exercise.id}   every part is yours"
    return f"{exercise.id}   {path}   yours: {', '.join(exercise.write)} (the engine's own class does the rest)"


def story(exercise: Exercise, path: Path, results: Iterable[Result], why: bool = False) -> Iterator[str]:
    """Yields lines as results come in: a level is told when it is complete."""
    failed_level = 0
    for number, (level, group) in enumerate(groupby(results, key=lambda result: result.level), start=1):
        of_level = list(group)
        if failed_level:
            yield _line(number, level, f"skipped until {failed_level} passes")
            continue
        yield _line(number, level, _verdict(level, of_level))
        bad = [result for result in of_level if result.status in (FAILED, NOT_WRITTEN)]
        if bad:
            failed_level = number
            told = next((result for result in bad if result.status == FAILED), bad[0])  # a fault in what is written
            yield from _failure(exercise, path, told)
            yield from textwrap.indent(check_source(exercise, told.check) if why else "", "     | ").splitlines()
            if missing := dict.fromkeys(_method(exercise, r) for r in bad if FAILED == told.status != r.status):
                yield _indented(f"Not written yet: {', '.join(missing)}.")
        if others := [result.check for result in bad if result.status == FAILED and result is not told]:
            yield _indented(f"Also failing: {', '.join(others)}. One fault often fails several checks.")
        if bad and (num_left := sum(result.status == SKIPPED for result in of_level)):
            yield _indented(f"Not run after it: {num_left} check{'s' if num_left > 1 else ''} of this level.")


def _line(number: int, level: str, verdict: str) -> str:
    return f" {number} {level:9} {verdict}"


def _verdict(level: str, results: list[Result]) -> str:
    """E.g. "ok      small cases", "5/6     small cases", "to do"."""
    passed = sum(result.status == OK for result in results)
    if passed == len(results):
        return f"{'ok':7} {MEANING[level]}"
    if all(result.status in (NOT_WRITTEN, OK) for result in results):
        return "to do"
    return f"{'failed' if len(results) == 1 else f'{passed}/{len(results)}':7} {MEANING[level]}"


def _failure(exercise: Exercise, path: Path, result: Result) -> Iterator[str]:
    """The first failure of a level: the rule, what happened, where, the requirement, and what can be asked."""
    if result.status == NOT_WRITTEN:
        yield _indented(f"Not written yet: {_method(exercise, result)}. {path}, {result.where.partition(',')[0]}")
        return
    if result.level != "contract":
        yield _indented(f"{result.check}: {result.doc}")
    yield _indented(result.message)
    if result.where:
        yield _indented(f"{path}, {result.where}")
    yield from _printed(result.printed)
    if requirement := result.spec and spec_line(result.spec, exercise.folder.parents[2]):
        yield _indented(f"SPEC {result.spec}: {requirement}")
    if result.level != "contract":
        yield _indented(f"Stuck? {exercise.command('hint')} (hint {result.hint} of 3 is about this)")
        yield _indented(f"The check's source: {exercise.command('check')} --why")


def _method(exercise: Exercise, result: Result) -> str:
    """The method of which the skeleton's NotImplementedError says that it is not written yet."""
    return result.message.removeprefix(f"{exercise.id}: ")


def _printed(printed: str) -> Iterator[str]:
    """The last lines that the learner's code printed in the check that failed."""
    if lines := printed.splitlines()[-MAX_PRINTED_LINES:]:
        yield _indented("Your code printed, at the end:")
        yield from (f"     > {line}" for line in lines)


def wrapped(text: str, indent: str = "") -> str:
    """Lines of at most WIDTH characters; the line ends of the text are kept."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(wrap.fill(line) for line in text.splitlines())


def _indented(text: str) -> str:
    return wrapped(text, indent="     ")
