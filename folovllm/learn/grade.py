"""Grading: runs the contract and the checks of an exercise, level by level. As a program, the worker process.

Milestone: M0. vLLM counterpart: none.

    python -m folovllm.learn.grade milestones/m3/exercises/block_pool work/m3/block_pool.py

prints one line of JSON when a check begins, one when it is done, and one at the end. A level is skipped if an earlier
one failed, because its message would be about a consequence.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from folovllm.learn.check import LEVELS, Check, Mine, checks_of
from folovllm.learn.contract import ContractError, load_work, refuse_borrowing
from folovllm.learn.defaults import default_checks
from folovllm.learn.exercise import ALL_PARTS, Exercise, load_exercise
from folovllm.parts import load_file

OK, FAILED, NOT_WRITTEN, SKIPPED = "ok", "failed", "not written", "skipped"
MAX_PRINTED = 2000  # characters: the last that a check printed
MAX_MESSAGE = 4000
SECONDS = {"contract": 30.0, "engine": 120.0}  # time for a check: torch is imported first, a model is written once
OTHER_SECONDS = 10.0


@dataclass(frozen=True)
class Result:
    """What became of a check. `where` is a line of the learner's file, "line 12, in free_blocks: ..."."""

    level: str
    check: str
    status: str
    message: str = ""
    doc: str = ""
    spec: str = ""
    hint: int = 1
    where: str = ""
    printed: str = ""  # by the learner's code
    seconds: float = 0.0
    limit: float = 0.0  # seconds that the check may take; 0: those of its level


Begin = Callable[[Result], object]  # is told of a check before it runs
CONTRACT = Result("contract", "contract", FAILED, doc="The class fits the engine, and its methods are your own.")
TOO_LONG = "It was still running after {:.0f} seconds: probably an endless loop."


class TimeLimit(BaseException):
    """The check took too long. Not an Exception, so that `except Exception` in the learner's loop does not stop it."""


def seconds_for(level: str, limit: float = 0.0) -> float:
    """The time limit of a check: its own if it has one, else that of its level."""
    return limit or SECONDS.get(level, OTHER_SECONDS)


def load_checks(exercise: Exercise) -> list[Check]:
    """The exercise's own checks, and the defaults for the levels trace and engine if it has none of its own there.

    Raises ValueError if checks.py has no check at all: an exercise that checks nothing must not pass.
    """
    own = checks_of(load_file(exercise.folder / "checks.py"))
    if not own:
        raise ValueError(f"{exercise.folder / 'checks.py'} has no checks")
    levels = {check.level for check in own}
    checks = own + [check for check in default_checks(exercise) if check.level not in levels]
    return sorted(checks, key=lambda check: LEVELS.index(check.level))


def mine_of(exercise: Exercise, path: Path, cls: Any) -> Mine:
    """What the checks are given. Of the capstone, `cls` is the dict of its parts, and there is no class."""
    if exercise.part == ALL_PARTS:
        return Mine(None, cls, None)
    parts = {exercise.part: f"{path}:{exercise.class_name}"} if exercise.replaces_a_part else {}
    return Mine(cls, parts, exercise.reference_class)


def grade(
    exercise: Exercise, path: Path, begin: Begin = lambda _: None, checks: Sequence[Check] = ()
) -> Iterator[Result]:
    """Yields a result per check, the contract's first. `begin` is told of each before it runs, as if it had failed.

    `checks` replace those of the exercise's folder.
    """
    with refuse_borrowing(exercise, path):
        yield from _grade(exercise, path, begin, checks)


def _grade(exercise: Exercise, path: Path, begin: Begin, checks: Sequence[Check]) -> Iterator[Result]:
    begin(CONTRACT)
    checks = checks or load_checks(exercise)
    contract, cls = check_contract(exercise, path)
    yield contract
    failed_level, hung = "contract" if contract.status != OK else "", False
    for check in checks:
        if hung or (failed_level and failed_level != check.level):
            yield result_of(check, SKIPPED)
            continue
        begin(result_of(check, FAILED))
        result = run_check(check, mine_of(exercise, path, cls), path)
        failed_level = check.level if result.status != OK else failed_level
        hung = result.seconds >= seconds_for(check.level, check.seconds)  # the next check would most likely hang too
        yield result


def check_contract(exercise: Exercise, path: Path) -> tuple[Result, Any]:
    """The result of the level "contract", and the learner's class if it keeps it."""
    result = CONTRACT
    try:
        with time_limit(seconds_for("contract")):
            cls = load_work(exercise, path)
    except ContractError as error:
        return replace(result, message=str(error), where=f"line {error.line}" if error.line else ""), None
    except ValueError as error:
        return replace(result, message=str(error)), None
    except TimeLimit as error:
        return replace(result, message=TOO_LONG.format(seconds_for("contract")), where=_where(error, path)), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the file's own code, while it is loaded
        return replace(result, message=_described(error), where=_where(error, path)), None
    return replace(result, status=OK), cls


def run_check(check: Check, mine: Mine, path: Path) -> Result:
    """Runs one check on a class that keeps the contract."""
    start, printed, seconds = time.perf_counter(), _Tail(), seconds_for(check.level, check.seconds)
    status, message, where = OK, "", ""
    try:
        with contextlib.redirect_stdout(printed), time_limit(seconds):
            check.function(mine)
    except NotImplementedError as error:
        status, message, where = NOT_WRITTEN, str(error), _where(error, path)
    except TimeLimit as error:
        status, message, where = FAILED, TOO_LONG.format(seconds), _where(error, path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also those of sys.exit and pytest.fail, which are no Exception
        status, message, where = FAILED, _described(error), _where(error, path)
        if not where and not isinstance(error, AssertionError):
            message += _while_checking(error, check)
    result = replace(result_of(check, status), message=message, where=where, printed=_plain(printed.text))
    return replace(result, seconds=time.perf_counter() - start)


def result_of(check: Check, status: str) -> Result:
    return Result(check.level, check.name, status, doc=check.doc, spec=check.spec, hint=check.hint, limit=check.seconds)


class _Tail(io.TextIOBase):
    """Keeps the last characters that are written to it: a loop that prints must not fill the memory."""

    text = ""

    def write(self, text: str) -> int:
        self.text = (self.text + text)[-MAX_PRINTED:]
        return len(text)


def _described(error: BaseException) -> str:
    """The message of an AssertionError; the kind of any other exception, too. Notes follow."""
    try:
        text = str(error)
    except Exception as other:  # the learner's own class of exceptions may have a faulty __str__
        text = f"(its message cannot be read: {type(other).__name__})"
    if not text or not isinstance(error, AssertionError | ContractError):
        text = f"{type(error).__name__}: {text}"
    text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ... ({len(text):,} characters)"
    return _plain("\n".join([text, *getattr(error, "__notes__", ())]))


def _plain(text: str) -> str:
    """Text that every terminal can show: half a character and control characters are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _while_checking(error: BaseException, check: Check) -> str:
    """The line of the check, for an exception that no line of the learner's file raised, e.g. if None was returned."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == check.function.__code__.co_filename]
    if not frames:
        return ""
    return (
        f"\nNo line of your file raised this. The check was at: {frames[-1].line}\n"
        "Perhaps a method of yours returns something else than its docstring says."
    )


def _where(error: BaseException, path: Path) -> str:
    """The innermost line of the learner's file that the exception came through. E.g. "line 12, in free_blocks".

    If it did not come through the file, its cause may have: `raise AssertionError(...) from error`.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    if frames:
        return f"line {frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}"
    return _where(error.__cause__, path) if error.__cause__ else ""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimit in the body if it runs longer; without signals (Windows), the parent's limit alone applies."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        raise TimeLimit

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def main() -> None:
    folder, path = map(Path, sys.argv[1:])
    work(lambda begin: grade(load_exercise(folder), path, begin))


def work(results: Callable[[Begin], Iterator[Result]]) -> None:
    """The worker process: sends the lines that worker.py reads to where stdout led.

    The learner's code cannot write there: from now on stdout is stderr, for its child processes, too.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)

        def emit(record: dict[str, Any]) -> None:
            print(json.dumps(record), file=lines, flush=True)

        for result in results(lambda begun: emit({"begin": asdict(begun)})):
            emit(asdict(result))
        emit({"end": True})


if __name__ == "__main__":
    main()
