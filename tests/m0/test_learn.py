"""The grader: every way in which a learner's file can be wrong is a result with a reason, and never a traceback.

The exercises are small ones of tests/learn_exercises.py. test_learn_guards.py is about those of milestones/.
"""

import contextlib
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from folovllm.learn import grade as grading
from folovllm.learn import worker as working
from folovllm.learn.check import Mine, check
from folovllm.learn.contract import ContractError, load_work
from folovllm.learn.exercise import find_exercises, get_exercise, load_exercise, milestones_dir, spec_line
from folovllm.learn.grade import FAILED, NOT_WRITTEN, OK, SKIPPED, grade
from folovllm.learn.story import story
from folovllm.learn.toy_engine import random_workload, run_workload
from folovllm.learn.worker import grade_in_worker
from tests import learn_guards
from tests.learn_exercises import SKELETON, SOLVED, make_milestones

pytestmark = pytest.mark.m0


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_milestones(tmp_path_factory.mktemp("learn") / "milestones")


@pytest.fixture
def exercise(root):
    return get_exercise("m2", "queue", root)


@pytest.fixture
def work_file(tmp_path):
    return tmp_path / "queue.py"


def graded(exercise, path, source):
    path.write_text(source)
    return {result.check: result for result in grade(exercise, path)}


# ---- the levels


def test_a_right_file_passes_every_level(exercise, work_file):
    results = graded(exercise, work_file, SOLVED)
    assert [r.level for r in results.values()] == ["contract", "unit", "unit", "trace", "engine"]
    assert {r.status for r in results.values()} == {OK}, results


def test_the_skeleton_is_not_written_yet(exercise):
    results = {r.check: r for r in grade(exercise, exercise.skeleton)}
    first = results["the_first_one_leaves_first"]
    assert (first.status, first.message) == (NOT_WRITTEN, "m2/queue: pop_request") and "line" in first.where
    assert results["the_queue_has_a_length"].status == OK  # given
    assert results["an_engine_runs_on_it"].status == results["same_trace_as_the_reference"].status == SKIPPED


def test_a_failure_says_what_came_out_where_it_was_and_skips_the_levels_after(exercise, work_file):
    results = graded(exercise, work_file, SOLVED.replace("popleft", "pop"))
    assert "returned c, expected a" in results["the_first_one_leaves_first"].message
    assert results["the_queue_has_a_length"].status == OK, "checks of the same level all run"
    assert results["an_engine_runs_on_it"].status == SKIPPED


def test_an_exception_in_the_learners_code_names_its_line(exercise, work_file):
    result = graded(exercise, work_file, SOLVED.replace("popleft", "poplft"))["the_first_one_leaves_first"]
    assert (
        result.message.startswith("AttributeError: ") and "poplft" in result.where and "in pop_request" in result.where
    )


def test_an_exception_that_no_line_of_the_learner_raised_names_the_line_of_the_check(exercise):
    """A method that returned None was told "cannot unpack non-iterable NoneType object", and no place."""

    @check("unit", spec="R2.1")
    def a_pair_comes_back(mine) -> None:
        """Two values."""
        assert sum(mine.cls().pair()) == 3, "1 and 2"

    cls = type("Queue", (), {"pair": lambda self: None})
    result = grading.run_check(a_pair_comes_back.__folovllm_check__, grading.Mine(cls, {}, cls), Path("queue.py"))
    assert result.status == FAILED and result.where == ""
    assert "NoneType" in result.message and "sum(mine.cls().pair())" in result.message


def test_what_the_learner_prints_is_kept_for_the_story(exercise, work_file):
    source = SOLVED.replace("return self._requests.popleft()", "print('here'); return self._requests.pop()")
    path = work_file
    path.write_text(source)
    assert "     > here" in "\n".join(story(exercise, path, grade_in_worker(exercise, path)))


def test_a_trace_that_differs_is_explained(exercise, work_file):
    """A queue that is right for three requests and wrong for more is caught by the default workloads."""
    lazy = "return self._requests.popleft() if len(self._requests) <= 3 else self._requests.pop()"
    source = SOLVED.replace("return self._requests.popleft()", lazy)
    source += "\n    def peek_request(self):\n        return self._requests[0 if len(self._requests) <= 3 else -1]\n"
    result = graded(exercise, work_file, source)["same_trace_as_the_reference"]
    assert result.status == FAILED, result
    assert "The first difference is at step" in result.message and "The workload: r0 of" in result.message
    assert "In yours:" in result.message and "in yours" not in result.message.split("The workload")[1]


# ---- contract and provenance


POP = "self._requests.popleft()"
REFUSED = {
    "re-export": ("from folovllm.core.sched.request_queue import FCFSRequestQueue as Queue\n", "would grade itself"),
    "inherited": (SKELETON + "    pass\n", "does not define pop_request"),
    "assigned": (SKELETON + "    pop_request = _Real.pop_request\n", "would grade itself"),
    "signature": (SOLVED.replace("pop_request(self)", "pop_request(self, n)"), r"parameters are (self, n)"),
    "static": (SOLVED.replace("    def pop", "    @staticmethod\n    def pop"), "must be a plain method"),
    "other name": (SOLVED.replace("class Queue", "class Queues"), "no class Queue"),
    "from scratch, half": ("class Queue:\n    def pop_request(self): ...\n", "lacks add_request, prepend_request"),
    "syntax": ("class Queue\n", "line 1: expected ':'"),
    "no import": ("import nothing_of_that_name\n", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "exits": ("raise SystemExit(0)\n", "SystemExit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_keep_the_contract_is_refused(exercise, work_file, case):
    source, words = REFUSED[case]
    results = graded(exercise, work_file, source)
    assert results["contract"].status == FAILED and words in results["contract"].message
    assert {r.status for r in results.values() if r.level != "contract"} == {SKIPPED}


BORROWED = {
    "super": "super().pop_request()",
    "super, in two steps": "(lambda base: base.pop_request())(super())",
    "getattr": "getattr(super(), 'pop_request')()",
    "by name": "_Real.pop_request(self)",
    "another object": "_Real().pop_request()",
    "the base class": "type(self).__mro__[1].pop_request(self)",
    "its dict": "vars(_Real)['pop_request'](self)",
    "another import": "__import__('sys').modules[_Real.__module__].FCFSRequestQueue.pop_request(self)",
    "a helper class": "type('Helper', (_Real,), {}).pop_request(self)",
    "kept before": "kept(self)",
}


@pytest.mark.parametrize("way", BORROWED)
def test_the_engines_own_method_is_refused_by_whatever_way_it_is_called(exercise, work_file, way):
    """An attack on the grader passed by all of these but the two that name the class."""
    source = SOLVED.replace(POP, BORROWED[way]).replace("class Queue", "kept = _Real.pop_request\n\n\nclass Queue")
    result = graded(exercise, work_file, source)["the_first_one_leaves_first"]
    assert result.status == FAILED and "which would grade itself" in result.message and "in " in result.where
    real = exercise.reference_class
    assert real.pop_request.__code__.co_filename.endswith("request_queue.py"), "the engine's class is as it was"


def test_a_file_that_is_not_utf8_is_refused(exercise, work_file):
    work_file.write_bytes(b'x = "caf\xe9"\n')
    assert "save it as UTF-8" in next(grade(exercise, work_file)).message


def test_an_extra_parameter_with_a_default_is_fine(exercise, work_file):
    work_file.write_text(SOLVED.replace("pop_request(self)", "pop_request(self, verbose=False)"))
    assert load_work(exercise, work_file).__name__ == "Queue"


def test_a_class_from_scratch_may_stand_in(exercise, work_file):
    body = "".join(
        f"    def {name}(self, *args):\n        return self._d.{call}\n"
        for name, call in {
            "add_request": "append(*args)",
            "prepend_request": "appendleft(*args)",
            "peek_request": "__getitem__(0)",
            "remove_requests": "clear()",
            "__len__": "__len__()",
            "__iter__": "__iter__()",
        }.items()
    )
    source = (
        "from collections import deque\n\nclass Queue:\n    def __init__(self):\n        self._d = deque()\n" + body
    )
    source += "    def pop_request(self):\n        return self._d.popleft()\n"
    assert {r.status for r in graded(exercise, work_file, source).values()} == {OK}


def test_a_file_saved_twice_in_a_second_is_read_twice(exercise, work_file):
    """No bytecode is kept: Python would take two files of one size and second for the same."""
    work_file.write_text(SOLVED.replace("popleft", "poplef1"))
    with contextlib.suppress(ContractError):
        load_work(exercise, work_file)
    work_file.write_text(SOLVED.replace("popleft", "popleft"))
    assert {r.status for r in grade(exercise, work_file)} == {OK}
    assert not (work_file.parent / "__pycache__").exists()


# ---- the worker process


def in_worker(exercise, path, source):
    path.write_text(source)
    return list(grade_in_worker(exercise, path))


def test_an_endless_loop_is_a_result(exercise, work_file, monkeypatch):
    monkeypatch.setattr(grading, "OTHER_SECONDS", 0.3)
    work_file.write_text(SOLVED.replace("return self", "while True: pass\n        return self"))
    results = {r.check: r for r in grade(exercise, work_file)}
    result = results["the_first_one_leaves_first"]
    assert result.status == FAILED and "endless loop" in result.message and "while True" in result.where
    # The others of the level would run into it, too, and each would take its 10 seconds.
    assert results["the_queue_has_a_length"].status == SKIPPED


def test_after_an_endless_loop_the_other_checks_are_not_waited_for(exercise, work_file, monkeypatch):
    """A learner waited 63 seconds for six checks of one level that all ran into the same loop."""
    monkeypatch.setattr(grading, "OTHER_SECONDS", 0.3)
    looping = SOLVED.replace("return self", "while True: pass\n        return self")
    results = graded(exercise, work_file, looping)
    assert results["the_first_one_leaves_first"].status == FAILED
    assert results["the_queue_has_a_length"].status == SKIPPED  # of the same level
    assert "Not run after it: 1 check of this level." in "\n".join(story(exercise, work_file, results.values()))


def test_a_check_may_have_a_time_limit_of_its_own(monkeypatch):
    """The capstone runs sets of the engine's tests: on a busy machine the lattice alone took more than 120 seconds."""
    monkeypatch.setitem(grading.SECONDS, "engine", 0.2)

    @check("engine", spec="R7.30", seconds=5.0)
    def a_slow_check(mine):
        """It ends."""
        time.sleep(0.4)

    slow = a_slow_check.__folovllm_check__
    mine = Mine(None, {}, None)
    assert grading.run_check(slow, mine, Path("none.py")).status == OK
    too_slow = grading.run_check(replace(slow, seconds=0.0), mine, Path("none.py"))
    assert too_slow.status == FAILED and "after 0 seconds" in too_slow.message
    assert working.seconds_for(slow.level, grading.result_of(slow, OK).limit) == 5.0


def test_a_loop_that_cannot_be_interrupted_is_ended_from_outside(exercise, work_file, monkeypatch):
    monkeypatch.setattr(working, "seconds_for", lambda level, limit: 1.5)
    monkeypatch.setattr(working, "GRACE", 0.5)
    start = time.monotonic()
    stubborn = "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); time.sleep(60)"
    results = in_worker(exercise, work_file, SOLVED.replace("return self", f"{stubborn}\n        return self"))
    assert "was stopped" in results[-1].message and results[-1].check == "the_first_one_leaves_first"
    assert results[-1].doc == "The request that waits longest is popped." and time.monotonic() - start < 30


@pytest.mark.parametrize(
    "code",
    [
        """import os; os.write(1, b'{"level": "unit", "check": "x", "status": "ok"}\\n{"end": true}\\n')""",
        "import sys; print('here', file=sys.__stdout__, flush=True)",
        "import os; os.system('echo here')",
    ],
)
def test_results_cannot_be_written_by_the_learners_code(exercise, work_file, code):
    """A print to the real stdout ended `folovllm learn` with "Expecting value", and a printed result counted."""
    results = in_worker(exercise, work_file, SOLVED.replace("return self", f"{code}\n        return self"))
    assert [r.level for r in results] == ["contract", "unit", "unit", "trace", "engine"]
    assert {r.status for r in results} == {OK}


def test_a_child_process_that_stays_is_not_waited_for(exercise, work_file):
    """The child holds the pipes of the worker; the end of the grading waited until it ended, too."""
    child = "import subprocess\n\nsubprocess.Popen(['sleep', '60'])\n"
    start = time.monotonic()
    assert {r.status for r in in_worker(exercise, work_file, child + SOLVED)} == {OK}
    assert time.monotonic() - start < 50


def test_a_question_to_the_terminal_is_an_error_and_does_not_wait(exercise, work_file):
    results = in_worker(exercise, work_file, SOLVED.replace("return self", "input('?')\n        return self"))
    assert any("EOFError" in r.message for r in results)


def test_messages_are_short_and_printable(exercise, work_file):
    code = "print('x' * 10_000_000); raise ValueError('\\ud800 \\x1b[2J ' + 'm' * 1_000_000)"
    result = graded(exercise, work_file, SOLVED.replace("return self", f"{code}\n        return self"))[
        "the_first_one_leaves_first"
    ]
    assert result.message.startswith("ValueError: \\ud800 \\x1b[2J mmm") and "1,000,019 characters" in result.message
    assert len(result.message) + len(result.printed) < 7000


def test_an_exception_without_a_readable_message_is_a_result(exercise, work_file):
    broken = "class Odd(Exception):\n    def __str__(self):\n        return 1 / 0\n\n\n"
    source = broken + SOLVED.replace("return self", "raise Odd\n        return self")
    result = graded(exercise, work_file, source)["the_first_one_leaves_first"]
    assert result.message == "Odd: (its message cannot be read: ZeroDivisionError)"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os._exit(0)", "ended here with exit code 0"),
        ("import os; os._exit(3)", "ended here with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL (probably there was no memory left)"),
    ],
)
def test_a_process_that_dies_is_a_result_and_never_a_pass(exercise, work_file, code, words):
    results = in_worker(exercise, work_file, SOLVED.replace("return self", f"{code}\n        return self"))
    assert words in results[-1].message and results[-1].status == FAILED
    assert results[-1].check == "the_first_one_leaves_first"


def test_an_exercise_without_checks_does_not_pass(root, tmp_path, work_file):
    copy = tmp_path / "milestones/m2/exercises/queue"
    shutil.copytree(root, tmp_path / "milestones")
    (copy / "checks.py").write_text("def prediction() -> str:\n    return 'a'\n")
    results = in_worker(load_exercise(copy), work_file, SOLVED)
    assert [r.status for r in results] == [FAILED] and "has no checks" in results[0].message


# ---- exercise.toml and the guards themselves


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('title = "The queue"', 'title = ""', "title, predict and after"),
        ("minutes = 10", "minutes = 1", "minutes must be between"),
        ("minutes = 10", "minuts = 10", "unknown field 'minuts'; did you mean 'minutes'"),
        ("level = 1", "level = 4", "level must be 1, 2 or 3"),
        ('"core.request_queue.fcfs"', '"core.queue"', "is not in folovllm/parts.py"),
        ('["Which end?", "A deque.", "popleft"]', '["one"]', "hints must be three layers"),
        ('["R2.1"]', '["Rx.9"]', "Rx.9 is not in the SPEC.md"),
        ('["R2.1"]', "[]", "spec must name requirements"),
        ("needs = []", 'needs = ["queue"]', "needs must be ids"),
        ("minutes = 10", "", "missing 1 required positional argument: 'minutes'"),
        ("minutes = 10", "minutes = ", "Invalid value"),
        ("minutes = 10", 'minutes = "10"', "minutes cannot be '10'"),
        ("needs = []", "needs = 3", "needs cannot be 3"),
        ('["R2.1"]', "[5]", "spec cannot be (5,)"),
        ('title = "The queue"', "title = 5", "title cannot be 5"),
        ("fast = true", 'fast = true\ntrace = "yes"', "trace cannot be 'yes'"),
    ],
)
def test_a_wrong_exercise_toml_is_refused_by_name(root, tmp_path, old, new, words):
    shutil.copytree(root, tmp_path / "milestones")
    folder = tmp_path / "milestones/m2/exercises/queue"
    text = (folder / "exercise.toml").read_text()
    assert old in text
    (folder / "exercise.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"exercise\.toml") as raised:
        load_exercise(folder)
    assert words in str(raised.value)


def test_a_method_that_the_reference_lacks_is_an_error_of_the_exercise(root, tmp_path, work_file):
    shutil.copytree(root, tmp_path / "milestones")
    folder = tmp_path / "milestones/m2/exercises/queue"
    toml = folder / "exercise.toml"
    toml.write_text(toml.read_text().replace('["pop_request"]', '["pop_requests"]'))
    with pytest.raises(ValueError, match="FCFSRequestQueue has no method pop_requests; mend `write`"):
        list(grade(load_exercise(folder), work_file))


def test_exercises_come_in_the_order_in_which_they_need_each_other(root):
    assert [e.id for e in find_exercises(root=root)] == ["m2/queue", "m2/preempted", "m7/your_engine"]


def test_a_wrong_name_finds_the_nearest(root):
    with pytest.raises(ValueError, match=r"no exercise 'que' in m2; m2 has queue, preempted; did you mean 'queue'"):
        get_exercise("m2", "que", root)
    assert get_exercise("m2", "m2/queue.py", root).id == "m2/queue"


def test_requirements_are_quoted_as_spec_words_them():
    assert spec_line("R3.4") == "No new blocks is success."
    assert spec_line("R3." + "0") is None and spec_line("Rx.9") is None
    assert (milestones_dir() / "m3" / "SPEC.md").is_file()


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="unknown level 'units'"):
        check("units", spec="R0.1")


FAULTS = {
    "mutant survives": ("mutants/last_first_0.py", ("pop()", "popleft()"), "does not fail"),
    "other words": ("mutants/last_first_0.py", ("returned c", "returned b"), "lacks 'returned b'"),
    "no header": ("mutants/last_first_0.py", ("# killed-by", "# kiled-by"), "the first line must be"),
    "no docstring": ("mutants/last_first_0.py", ('"""', "# "), "no docstring"),
    "skeleton passes": (
        "checks.py",
        ("popped = filled(mine).pop_request().request_id", "popped = 'a'"),
        "skeleton passes",
    ),
    "given fails": ("checks.py", ("len(filled(mine)) == 3", "filled(mine).pop_request()"), "is marked given=True"),
    "reference fails": ("checks.py", ('popped == "a"', 'popped == "b"'), "the reference fails"),
    "bare assert": ("checks.py", (', "three requests were added"', ""), "an assert without a message"),
    "no such requirement": ("checks.py", ('"R2.1", hint=3', '"Rx.9", hint=3'), "is no requirement"),
    "no prediction": ("checks.py", ("def prediction", "def predict"), "no function prediction"),
    "signature drift": ("skeleton.py", ("pop_request(self)", "pop_request(self, n)"), "its parameters are"),
    "long skeleton": ("skeleton.py", ("class Queue", "\n" * 50 + "class Queue"), "at most 40"),
    "long readme": ("README.md", ("What", "\n" * 70 + "What"), "at most 60"),
    "unknown need": ("exercise.toml", ("needs = []", 'needs = ["m2/nothing"]'), "which is no exercise"),
}


def test_a_good_exercise_passes_every_guard(exercise, tmp_path):
    assert learn_guards.guard_all(exercise) == []
    assert learn_guards.re_export_is_refused(exercise, tmp_path) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_guard_finds(root, tmp_path, fault):
    file, (old, new), words = FAULTS[fault]
    shutil.copytree(root, tmp_path / "milestones")
    folder = tmp_path / "milestones/m2/exercises/queue"
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    exercise = load_exercise(folder)
    problems = learn_guards.about_files(exercise)
    if not problems:
        problems += learn_guards.guard_all(exercise)
    assert any(words in problem for problem in problems), problems


def test_too_few_mutants_and_a_missing_file_are_found(root, tmp_path):
    shutil.copytree(root, tmp_path / "milestones")
    folder = tmp_path / "milestones/m2/exercises/queue"
    (folder / "README.md").unlink()
    shutil.rmtree(folder / "mutants")
    problems = learn_guards.files_are_complete(load_exercise(folder))
    assert problems == ["no README.md", "0 mutants, at least 3 are wanted"]


# ---- workloads


@pytest.mark.parametrize("milestone", ["m0", "m1", "m2", "m3", "m5", "m6"])
def test_workloads_grow_repeat_and_run(milestone):
    workloads = [random_workload(seed, milestone) for seed in range(6)]
    assert workloads == [random_workload(seed, milestone) for seed in range(6)]
    assert len(workloads[0].arrivals) == 2 < len(workloads[5].arrivals)
    for workload in workloads:
        assert len(run_workload(workload)) == len(workload.arrivals)
