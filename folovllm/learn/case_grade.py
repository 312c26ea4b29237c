"""Grading a case: the first wrong step, the root cause, the test and the fix. As a program, the worker process.

Milestone: M0. vLLM counterpart: none.

    python -m folovllm.learn.case_grade milestones/m6/cases/01_full_hit work/cases/01_

prints a line of JSON per check, as grade.py does. The four are graded independently of each other, and no message says
what the right answer is.
"""

import json
import sys
import tempfile
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from folovllm.learn.cases import QUESTIONS, Case, load_case, record_trace, requests_of, run_requests
from folovllm.learn.check import Check, Mine, checks_of
from folovllm.learn.defaults import NAMES
from folovllm.learn.grade import FAILED, OK, SKIPPED, Result, check_contract, mine_of, run_check
from folovllm.learn.toy_engine import random_workload
from folovllm.learn.worker import results_of
from folovllm.parts import load_file
from folovllm.text_files import read_text_file
from folovllm.trace.diff import diff
from folovllm.trace.record import read_trace

NUM_WORKLOADS = 15
ENGINE_CORE = Path("folovllm", "engine", "core.py").parts


def grade_case(case: Case, work: Path) -> Iterator[Result]:
    """Grades the learner's files in a worker process. Yields a result per check; the level is the question."""
    command = [sys.executable, "-m", "folovllm.learn.case_grade", str(case.folder), str(case.file(work, ""))]
    yield from results_of(command)


def grade(case: Case, files: dict[str, Path], begin: Callable[[Result], object] = lambda _: None) -> Iterator[Result]:
    """Yields the results of all four questions. `begin` is told of each check before it runs."""
    for check in _answer_checks(case, files["answer"]):
        begin(_begun(check))
        yield run_check(check, Mine(None, {}, None), files["answer"])
    test = Check("test", lambda _: check_test(case, files["test"]))
    begin(_begun(test))
    yield run_check(test, Mine(None, {}, None), files["test"])
    yield from grade_fix(case, files["fix"], begin)


def _begun(check: Check) -> Result:
    return Result(check.level, check.name, FAILED, doc=check.doc)


# ---- (a) and (b): the answer


def _answer_checks(case: Case, path: Path) -> list[Check]:
    def step(_: Mine) -> None:
        answer = _read_answer(path, "wrong_step", -1)
        if answer == -1:
            raise NotImplementedError(f"write the number of the step into {path.name}: wrong_step")
        assert answer == first_wrong_step(case), "Not this step: either it is right, or an earlier one is wrong."

    def cause(_: Mine) -> None:
        answer = str(_read_answer(path, "cause", "")).strip().lower()
        if not answer:
            raise NotImplementedError(f"write the letter of the cause into {path.name}: cause")
        assert answer in case.causes, f"{answer!r} is none of the letters {', '.join(case.causes)}."
        assert answer == case.cause, "Not this cause: it would have left other marks in the trace."

    return [Check("step", step), Check("cause", cause)]


def _read_answer(path: Path, name: str, default: Any) -> Any:
    try:
        return tomllib.loads(read_text_file(path)).get(name, default)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None


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
    test = getattr(load_file(path), "test", None)
    assert callable(test), f"{path.name} has no function `test`: write `def test(parts)`."
    error = _failure(test, case.fault)
    assert error is not None, (
        "Your test passes on the faulty engine. Let it run into what the report tells, and assert what should come out."
    )
    if not case.crash:
        assert isinstance(error, AssertionError), (
            f"On the faulty engine your test ends with {_short(error)}. The fault raises nothing: assert what is wrong."
        )
        assert not _is_of_engine(error), (
            f"On the faulty engine not your test fails, but a check of the engine itself: {_short(error)}. Assert what "
            "the user sees."
        )
    for name, parts in [("an engine without the fault", case.good), *variants(case)]:
        error = _failure(test, parts)
        assert error is None, f"Your test fails on {name}, too: {_short(error)}"


def _failure(test: Callable[[dict[str, str]], object], parts: dict[str, str]) -> Exception | None:
    try:
        test(dict(parts))
    except NotImplementedError:
        raise
    except Exception as error:
        return error
    return None


def _short(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}".removeprefix("AssertionError: ") or "an assert without a message"


def _is_of_engine(error: Exception) -> bool:
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


def grade_fix(case: Case, path: Path, begin: Callable[[Result], object] = lambda _: None) -> Iterator[Result]:
    contract, cls = check_contract(case.exercise, path)
    yield replace(contract, level="fix")
    failed = contract.status != OK
    for check in fix_checks(case):
        begin(_begun(check))
        if failed:
            yield replace(_begun(check), level="fix", status=SKIPPED)
            continue
        result = run_check(check, mine_of(case.exercise, path, cls), path)
        failed = result.status != OK
        yield replace(result, level="fix")


def fix_checks(case: Case) -> list[Check]:
    """The case's own checks, then the run of the report and random workloads."""

    def run_of_the_report(mine: Mine) -> None:
        """The requests of the report get what an engine without the fault gives them, with no more work."""
        _compare(case, mine, case.engine, case.requests, "the requests of the report")

    def random_workloads(mine: Mine) -> None:
        """On other workloads, too, the engine gives the right tokens with no more work than one without the fault."""
        for seed in range(NUM_WORKLOADS):
            workload = random_workload(seed, case.milestone, **case.random)
            requests = tuple(args | {"step": step} for step, args in workload.arrivals)
            _compare(case, mine, workload.config_args, requests, f"the workload {workload}")

    own = checks_of(load_file(case.folder / "checks.py"))
    return [*own, Check("unit", run_of_the_report), Check("property", random_workloads)]


def _compare(case: Case, mine: Mine, engine: dict[str, Any], requests: tuple[dict[str, Any], ...], what: str) -> None:
    """Runs requests with the fix and with a good engine. Raises AssertionError with the first thing that differs."""
    same = replace(case, engine=engine, requests=requests)
    good = run_requests(case.good, engine, *requests_of(same))
    run = run_requests(mine.parts, engine, *requests_of(same), check_integrity=True)
    if run.errors:
        step, error = run.errors[0]
        error.add_note(f"It was raised in step {step} of {what}.")
        raise error
    assert run.is_done, f"With {what}, the engine never finishes: requests wait that nothing will wake up."
    greedy = [request.request_id for request in requests_of(same)[0] if request.sampling_params.temperature == 0]
    for request_id in greedy:
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


# ---- the result


def answered(results: list[Result]) -> dict[str, bool]:
    """Question -> whether it is answered rightly."""
    of = {question: [r.status == OK for r in results if r.level == question] for question in QUESTIONS}
    return {question: bool(statuses) and all(statuses) for question, statuses in of.items()}


def main() -> None:
    """The worker process."""
    case, prefix = load_case(Path(sys.argv[1])), sys.argv[2]
    files = {name.split(".")[0]: Path(prefix + name) for name in ("answer.toml", "test.py", "fix.py")}
    lines, sys.stdout = sys.stdout, sys.stderr  # stdout belongs to the results

    def emit(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=lines, flush=True)

    for result in grade(case, files, lambda begun: emit({"begin": asdict(begun)})):
        emit(asdict(result))
    emit({"end": True})


if __name__ == "__main__":
    main()
