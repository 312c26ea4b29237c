"""Every case can be solved, and what does not solve it is refused. A test of a case carries its milestone's marker.

The solutions are in tests/mN/cases/NN: fix.py and test.py. To record the trace of case 3 again:
`python tests/m0/test_cases.py 3`.
"""

import itertools
import re
import sys
from pathlib import Path

import pytest

from folovllm.learn import cases
from folovllm.learn.case_grade import answered, first_wrong_step, fix_checks, grade, variants
from folovllm.learn.check import Mine
from folovllm.learn.exercise import milestones_dir, spec_line
from folovllm.learn.grade import OK, run_check
from folovllm.learn.record import read_record
from folovllm.parts import load_class
from folovllm.trace.diff import diff
from folovllm.trace.record import read_trace

CASES = cases.find_cases()
SOLUTIONS = Path(__file__).parents[1]
REFUSED_BY = re.compile(r"# refused-by: (\w+) \| (.+)")


def params(kind=None):
    """One parameter per case, or per file of `mutants/` that begins with `kind`."""
    found = []
    for case in CASES:
        mark, files = getattr(pytest.mark, case.milestone), [None]
        if kind:
            files = sorted((case.folder / "mutants").glob(f"{kind}_*.py"))
        for file in files:
            name = f"{case.folder.name}/{file.stem}" if file else case.folder.name
            found.append(pytest.param(*[case, file][: 2 if file else 1], marks=mark, id=name))
    return found


def solution(case):
    return SOLUTIONS / case.milestone / "cases" / f"{case.number:02}"


def answer_file(case, tmp_path, step=None, cause=None):
    path = tmp_path / "answer.toml"
    step = first_wrong_step(case) if step is None else step
    path.write_text(f'wrong_step = {step}\ncause = "{cause or case.cause}"\n')
    return path


def results_of(case, tmp_path, **files):
    """What grading says of these files and, where none is given, of the solution."""
    where = {"test": solution(case) / "test.py", "fix": solution(case) / "fix.py"} | files
    return list(grade(case, {"answer": files.get("answer") or answer_file(case, tmp_path), **where}))


@pytest.mark.m0
def test_there_are_ten_cases_numbered_from_one():
    assert [case.number for case in CASES] == list(range(1, 11))


@pytest.mark.parametrize("case", params())
def test_the_solution_is_accepted(case, tmp_path):
    results = results_of(case, tmp_path)
    assert [f"{r.check}: {r.message}" for r in results if r.status != OK] == []
    assert answered(results) == dict.fromkeys(cases.QUESTIONS, True)


@pytest.mark.parametrize("case", params())
def test_wrong_answers_and_the_untouched_files_are_refused(case, tmp_path):
    for wrong in [letter for letter in case.causes if letter != case.cause]:
        answer = answer_file(case, tmp_path, first_wrong_step(case) + 1, wrong)
        of_answer = itertools.islice(grade(case, {"answer": answer}), 2)
        assert [(r.level, r.status) for r in of_answer] == [("step", "failed"), ("cause", "failed")]
    record = read_record(tmp_path)
    cases.open_case(case, record)
    files = {
        name: case.file(tmp_path, f"{name}.{ext}") for name, ext in (("answer", "toml"), ("test", "py"), ("fix", "py"))
    }
    results = list(grade(case, files))
    assert answered(results) == dict.fromkeys(cases.QUESTIONS, False)
    assert [r.level for r in results if r.status != "ok"] == ["step", "cause", "test", "fix"]
    assert {r.status for r in results} == {"not written"}, "the first failing check of an untouched fix tells the cause"


@pytest.mark.parametrize(("case", "mutant"), params("fix"))
def test_a_wrong_fix_is_refused_by_the_check_that_it_names(case, mutant, tmp_path):
    refused(results_of(case, tmp_path, fix=mutant), mutant)


@pytest.mark.parametrize(("case", "mutant"), params("test"))
def test_a_wrong_test_is_refused(case, mutant, tmp_path):
    refused([r for r in results_of(case, tmp_path, test=mutant) if r.level == "test"], mutant)


def refused(results, mutant):
    header = REFUSED_BY.match(mutant.read_text(encoding="utf-8").split("\n", 1)[0])
    assert header, f"{mutant}: the first line must be `# refused-by: check | words of its message`"
    failed = {("check_test" if r.level == "test" else r.check): r.message for r in results if r.status == "failed"}
    assert header[1] in failed, f"failed: {failed or 'nothing'}"
    assert header[2].strip() in failed[header[1]]


@pytest.mark.parametrize("case", params())
def test_the_trace_is_what_the_faulty_engine_does_today(case, tmp_path):
    run = cases.record_trace(case, case.fault, tmp_path / "trace.jsonl")
    today, recorded = read_trace(tmp_path / "trace.jsonl"), read_trace(case.folder / "trace.jsonl")
    assert diff(recorded, today) is None
    assert bool(run.errors) == case.crash
    assert "fault.py" in str(recorded.config["parts"]) or case.part == "toy.runner"
    assert "/" not in str(recorded.config["parts"])


@pytest.mark.parametrize("case", params())
def test_an_engine_without_the_fault_passes_the_checks_of_the_fix(case):
    place = f"{case.exercise.reference_class.__module__}:{case.class_name}"
    parts = case.good or {case.part: place}
    mine = Mine(load_class(parts[case.part]), parts, case.exercise.reference_class)
    results = [run_check(check, mine, case.folder) for check in fix_checks(case)]
    assert [f"{r.check}: {r.message}" for r in results if r.status != OK] == []


@pytest.mark.parametrize("case", params())
def test_the_files_are_complete(case):
    mutants = [path.name for path in (case.folder / "mutants").iterdir() if path.suffix == ".py"]
    assert sum(name.startswith("fix_") for name in mutants) >= 2 and any(name.startswith("test_") for name in mutants)
    assert variants(case), "a test must be tried on another engine without the fault"
    assert spec_line(case.spec) and all(spec_line(c.spec) for c in fix_checks(case) if c.spec)
    assert 3 <= len(re.findall(r"[.?!](?:\s|$)", case.lesson)) <= 5
    assert not re.search(r"[/\\]", case.report), "a user's words name no file"


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        chosen = cases.get_case(number)
        print(cases.record_trace(chosen, chosen.fault, chosen.folder / "trace.jsonl"))
        print("the first wrong step:", first_wrong_step(chosen), "in", milestones_dir())
