"""Grading a case: the first wrong step, the root cause, the test and the fix. As a program, the worker process.

Milestone: M0. vLLM counterpart: none.

    python -m folovllm.learn.case_grade milestones/m6/cases/01_full_hit work/cases/01_

prints a line of JSON per check, as grade.py does. The four are graded independently of each other, and no message says
what the right answer is.
"""

import inspect
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from folovllm.learn.cases import GRADED, QUESTIONS, Case, load_case, record_trace, run_requests
from folovllm.learn.check import Check, Mine, checks_of
from folovllm.learn.defaults import NAMES, with_attributes
from folovllm.learn.grade import FAILED, NOT_WRITTEN, OK, Begin, Result, TimeLimit, result_of, run_check, work
from folovllm.learn.grade import grade as grade_exercise
from folovllm.learn.toy_engine import Workload, random_workload
from folovllm.learn.worker import results_of
from folovllm.parts import load_file
from folovllm.text_files import read_text_file
from folovllm.trace.diff import diff
from folovllm.trace.record import read_trace
from folovllm.utils import did_you_mean

NUM_WORKLOADS = 15
ENGINE_CORE = Path("folovllm", "engine", "core.py").parts
ANSWERS = {"wrong_step": (int, "a number, e.g. wrong_step = 7"), "cause": (str, 'a letter in quotes, e.g. cause = "x"')}


def grade_case(case: Case, folder: Path) -> Iterator[Result]:
    """Grades the learner's files in a worker process. Yields a result per check."""
    command = [sys.executable, "-m", "folovllm.learn.case_grade", str(case.folder), str(case.file(folder, ""))]
    yield from results_of(command)


def grade(case: Case, files: dict[str, Path], begin: Begin = lambda _: None) -> Iterator[Result]:
    """Yields the results of all four questions. `begin` is told of each check before it runs."""
    for question, file, function in (
        ("step", "answer", check_step),
        ("cause", "answer", check_cause),
        ("test", "test", check_test),
    ):
        path = files[file]
        check = Check(question, lambda _, function=function, path=path: function(case, path))  # type: ignore[misc]
        begin(result_of(check, FAILED))
        yield run_check(check, Mine(None, {}, None), path)
    if case.is_untouched(files["fix"]):  # its first failing check would tell the cause
        to_do = f"mend {', '.join(case.write)} in {files['fix'].name}, which is still the part with the fault"
        yield Result("fix", "fix", NOT_WRITTEN, to_do)
        return
    yield from grade_exercise(case.exercise, files["fix"], begin, fix_checks(case))


def question_of(result: Result) -> str:
    """One of QUESTIONS. The levels of a fix are those of an exercise."""
    return result.level if result.level in QUESTIONS else "fix"


def answered(results: list[Result]) -> dict[str, bool]:
    """Question -> whether it is answered rightly."""
    of = {question: [r.status == OK for r in results if question_of(r) == question] for question in QUESTIONS}
    return {question: bool(statuses) and all(statuses) for question, statuses in of.items()}


# ---- (a) and (b): the answer


def check_step(case: Case, path: Path) -> None:
    answer = _read_answer(path, "wrong_step", -1)
    last = len(read_trace(case.folder / "trace.jsonl").steps) - 1
    assert 0 <= answer <= last, f"There is no step {answer}: the trace has the steps 0 to {last}."
    assert answer == first_wrong_step(case), "Not this step: either it is right, or an earlier one is wrong."


def check_cause(case: Case, path: Path) -> None:
    answer = _read_answer(path, "cause", "").strip(" )").lower()
    assert answer in case.causes, f"{answer!r} is none of the letters {', '.join(case.causes)}."
    assert answer == case.cause, "Not this cause: it would have left other marks in the trace."


def _read_answer(path: Path, name: str, unanswered: Any) -> Any:
    """Raises NotImplementedError if the file has no answer yet, and AssertionError for what is no answer."""
    kind, form = ANSWERS[name]
    try:
        values = tomllib.loads(read_text_file(path))
    except ValueError as error:
        raise AssertionError(f"{path.name} cannot be read: {error}. Write {name} as {form}.") from None
    for other in values.keys() - ANSWERS:
        raise AssertionError(f"{path.name} has an unknown name {other!r}{did_you_mean(other, ANSWERS)}")
    answer = values.get(name, unanswered)
    if answer == unanswered:
        raise NotImplementedError(f"write {form}, into {path.name}")
    assert type(answer) is kind, f"{name} is {answer!r}; write {form}."
    return answer


def first_wrong_step(case: Case) -> int:
    """The first step in which the faulty engine differs from a good one, unless checks.py knows better."""
    own = getattr(load_file(case.folder / "checks.py"), "first_wrong_step", None)
    if own is not None:
        step: int = own()
        return step
    with tempfile.TemporaryDirectory(prefix="folovllm-case-") as folder:
        good, faulty = Path(folder, "good.jsonl"), Path(folder, "faulty.jsonl")
        record_trace(case, case.good, good)
        record_trace(case, case.fault, faulty)
        found = diff(read_trace(good), read_trace(faulty), NAMES)
    assert found is not None, f"{case.id}: the fault changes nothing in the run of the report"
    return found.step


# ---- (c): the test


def check_test(case: Case, path: Path) -> None:
    """Raises AssertionError if the learner's test misses the fault, or sees it where it is not."""
    try:
        test = getattr(load_file(path), "test", None)
    except ValueError as unreadable:  # e.g. a syntax error
        raise AssertionError(str(unreadable)) from unreadable
    assert callable(test) and len(inspect.signature(test).parameters) == 1, (
        f"{path.name} has no function `test` with one argument: write `def test(parts)`."
    )
    error = _failure(case, test, case.fault)
    assert error is not None, (
        "Your test passes on the faulty engine. Let it run into what the report tells, and assert what should come out."
    )
    if not case.crash and not _is_assert(error):
        raise AssertionError(
            f"On the faulty engine your test ends with {_short(error)}. The fault raises nothing: assert what is wrong."
        ) from error
    if not case.crash and _is_of_engine(error):
        raise AssertionError(
            f"On the faulty engine not your test fails, but a check of the engine itself: {_short(error)}. Assert what "
            "the user sees."
        ) from error
    for name, parts in [("an engine without the fault", case.good), *variants(case)]:
        if error := _failure(case, test, parts):
            raise AssertionError(f"Your test fails on {name}, too: {_short(error)}") from error


def _failure(case: Case, test: Callable[[dict[str, str]], object], parts: dict[str, str]) -> BaseException | None:
    """What the test raises. It is given the same names for every engine, so that it cannot tell them apart by these."""
    with with_attributes({case.part: case.exercise.reference} | parts) as hidden:
        try:
            test(hidden)
        except (NotImplementedError, TimeLimit, KeyboardInterrupt):
            raise
        except BaseException as error:
            return error
    return None


def _is_assert(error: BaseException) -> bool:
    """Whether a test says so itself. What pytest.fail and pytest.raises raise is no Exception."""
    return isinstance(error, AssertionError) or not isinstance(error, (Exception, SystemExit))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removeprefix("AssertionError: ") or "an assert without a message"


def _is_of_engine(error: BaseException) -> bool:
    """Whether the exception came out of a step, and not from an assert of the test."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).parts[-len(ENGINE_CORE) :] == ENGINE_CORE for frame in frames)


def variants(case: Case) -> list[tuple[str, dict[str, str]]]:
    """Other engines without the fault, which a test must accept: `VARIANTS` in checks.py, {what it is: parts}."""
    path = case.folder / "checks.py"
    found: dict[str, dict[str, str]] = getattr(load_file(path), "VARIANTS", {})
    return [
        (name, {part: place.replace("checks.py:", f"{path}:") for part, place in parts.items()})
        for name, parts in found.items()
    ]


# ---- (d): the fix


def fix_checks(case: Case) -> list[Check]:
    """The case's own checks, then the run of the report and random workloads."""

    def run_of_the_report(mine: Mine) -> None:
        """The requests of the report get what an engine without the fault gives them, with no more work."""
        _compare(case, mine, case.workload, "the requests of the report")

    def random_workloads(mine: Mine) -> None:
        """On other workloads, too, the engine gives the right tokens with no more work than one without the fault."""
        for seed in range(NUM_WORKLOADS):
            workload = random_workload(seed, case.milestone, **case.random)
            _compare(case, mine, workload, f"the workload {workload}")

    own = checks_of(load_file(case.folder / "checks.py"))
    return [*own, Check("unit", run_of_the_report), Check("property", random_workloads)]


def _compare(case: Case, mine: Mine, workload: Workload, what: str) -> None:
    """Runs requests with the fix and with a good engine. Raises AssertionError with the first thing that differs."""
    good, run = run_requests(case.good, workload), run_requests(mine.parts, workload, check_integrity=True)
    if run.errors:
        step, error = run.errors[0]
        raise AssertionError(f"In step {step} of {what}, the engine ends with {_short(error)}") from error
    assert run.is_done, f"With {what}, the engine never finishes: requests wait that nothing will wake up."
    for request_id in (args["request_id"] for _, args in workload.arrivals if not args.get("temperature")):
        got, tokens = run.tokens[request_id], good.tokens[request_id]
        assert got == tokens, f"With {what}, {request_id} gets {got}, and without the fault {tokens}."
    assert run.num_computed_tokens <= good.num_computed_tokens, (
        f"With {what}, the engine computes {run.num_computed_tokens} tokens where {good.num_computed_tokens} are "
        "enough: the fix avoids the symptom at the cost of work."
    )
    assert run.num_steps <= good.num_steps, (
        f"With {what}, the engine takes {run.num_steps} steps where {good.num_steps} are enough: requests wait that "
        "could run."
    )


def main() -> None:
    """The worker process."""
    case, prefix = load_case(Path(sys.argv[1])), sys.argv[2]
    files = {name.split(".")[0]: Path(prefix + name) for name in GRADED}
    work(lambda begin: grade(case, files, begin))


if __name__ == "__main__":
    main()
