"""`folovllm learn case` as a learner types it, and the toy runner that the cases run on."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from folovllm.learn import case_grade, cases, worker
from folovllm.learn.case_grade import answered, first_wrong_step, grade_case, question_of
from folovllm.learn.grade import grade as grade_exercise
from folovllm.learn.toy_engine import make_request, random_workload
from folovllm.learn.toy_runner import alone, generate, make_engine
from tests.m0.test_cases import solution

pytestmark = pytest.mark.m0
CASE = cases.get_case(2)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def learn_case(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["learn", "case", *args])
    assert result.exit_code == code, result.output
    return result.output


def solve(here: Path) -> None:
    learn_case("2")
    answer = here / "work/cases/02_answer.toml"
    text = answer.read_text().replace("wrong_step = -1", f"wrong_step = {first_wrong_step(CASE)}")
    answer.write_text(text.replace('cause = ""', f'cause = "{CASE.cause}"'))
    for name in ("test.py", "fix.py"):
        (here / f"work/cases/02_{name}").write_bytes((solution(CASE) / name).read_bytes())


def state(number: int) -> str:
    return next(line for line in learn_case().splitlines() if line[4:6].strip() == str(number))


# ---- the way through a case


def test_a_case_is_opened_once_and_nothing_is_overwritten(here):
    output = learn_case("2")
    assert "IndexError" in output and "r3, before step 4: [1, 2, 3" in output and "block_size=4" in output
    names = sorted(path.name for path in (here / "work/cases").iterdir())
    assert names == ["02_answer.toml", "02_fix.py", "02_test.py", "02_trace.jsonl"]
    assert output.count("(new)") == 4
    (here / "work/cases/02_fix.py").write_text("mine")
    (here / "work/cases/02_test.py").unlink()
    assert learn_case("2").count("(new)") == 1
    assert (here / "work/cases/02_fix.py").read_text() == "mine"


def test_the_commands_of_the_report_can_be_typed(here):
    """Each `folovllm trace` line that a case prints runs."""
    lines = [line.split("   ")[0].split() for line in learn_case("2").splitlines() if "folovllm trace" in line]
    assert len(lines) == 3
    for line in lines:
        assert CliRunner().invoke(app, line[1:]).exit_code in (0, 1)  # lint finds something


def test_unanswered_then_solved(here):
    assert "not begun" in state(2)
    learn_case("2")
    assert "begun" in state(2)
    output = learn_case("2", "check", code=1)
    assert output.count("not yet") == 4 and output.count("To do:") == 4 and "In your file" not in output
    assert "0 of 4" in state(2)
    solve(here)
    assert "changed" in state(2)
    output = learn_case("2", "check")
    assert output.count("right") == 4 and "Solved" in output
    assert "[x]" in state(2) and "solved" in state(2)


def test_a_wrong_answer_does_not_give_the_right_one_away(here):
    solve(here)
    path = here / "work/cases/02_answer.toml"
    path.write_text(path.read_text().replace('cause = "a"', 'cause = "B"').replace("wrong_step = 4", "wrong_step = 3"))
    output = learn_case("2", "check", code=1)
    assert output.count("not yet") == 2 and "3 of 4" not in output
    assert "Not this step" in output and "Not this cause" in output
    told = output.partition("Not this step")[2].partition(" test ")[0]
    assert not any(right in told for right in (" 4", "'a'", CASE.causes["a"]))
    assert "2 of 4" in state(2)


def test_hints_one_at_a_time(here):
    for number, hint in enumerate(CASE.hints, start=1):
        output = learn_case("2", "hint")
        assert f"Hint {number} of {len(CASE.hints)}" in output and hint.split()[0] in output
    assert f"Hint {len(CASE.hints)} of" in learn_case("2", "hint")


def test_the_lesson_after_the_case_is_solved_is_no_help(here):
    solve(here)
    learn_case("2", "check")
    assert "https://github.com/GeeeekExplorer/nano-vllm/issues/207" in learn_case("2", "lesson")
    path = here / "work/cases/02_test.py"
    path.write_text(path.read_text() + "\n# edited\n")
    learn_case("2", "lesson")
    learn_case("2", "check")
    assert "solved" in state(2), "after the first pass, a look at the lesson is no help"
    path.write_text("x")
    assert "changed" in state(2)
    solve(here)
    assert "solved" in state(2), "these contents have passed"


def test_the_lesson_before_the_first_pass_counts_as_help(here):
    learn_case("2", "lesson")
    solve(here)
    learn_case("2", "check")
    assert "assisted" in state(2)


def test_status_log_and_report_list_cases(here):
    learn_case("2")
    learn_case("2", "check", code=1)
    learn_case("2", "hint")
    run = CliRunner().invoke
    assert "[-] case/02                  0 of 4     1 check, 1 hint" in run(app, ["learn", "status"]).output
    assert "check: 0 of 4 right" in run(app, ["learn", "log"]).output
    assert "0 of 10 cases solved" in run(app, ["learn"]).output
    solve(here)
    learn_case("2", "check")
    assert run(app, ["learn", "report"]).exit_code == 0
    assert f"| {CASE.title} (`case/02`) | solved |" in (here / "work/report.md").read_text()
    assert "1 of 10 cases solved" in run(app, ["learn"]).output


# ---- mistakes and bad files


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["99"], "no case 99; there are 1, 2"),
        (["2", "chekc"], "unknown verb 'chekc'; write one of check, hint, lesson"),
        (["2", "check"], "`folovllm learn case 2` creates it"),
    ],
)
def test_a_mistake_is_one_line_with_the_fix(here, args, words):
    assert words in learn_case(*args, code=2)


@pytest.mark.parametrize(
    ("name", "text", "question", "words"),
    [
        ("answer.toml", "wrong_step = four", "step", "Invalid value"),
        ("answer.toml", 'wrong_step = 1\ncause = "z"', "cause", "none of the letters a, b, c, d, e"),
        ("answer.toml", 'wrong_step = "4"', "step", "wrong_step is '4'; write a number"),
        ("answer.toml", "wrong_step = true", "step", "wrong_step is True; write a number"),
        ("answer.toml", "wrong_step = 99", "step", "the trace has the steps 0 to"),
        ("answer.toml", 'wrong_stp = 4\ncause = "a"', "step", "did you mean 'wrong_step'"),
        ("answer.toml", "cause = 2", "cause", "write a letter in quotes"),
        ("answer.toml", "cause = a", "cause", "Write cause as a letter in quotes"),
        ("test.py", "def test(parts) -> None\n", "test", "line 1"),
        ("test.py", "x = 1\n", "test", "no function `test`"),
        ("test.py", "def test():\n    assert False\n", "test", "with one argument"),
        ("test.py", "def test(parts):\n    assert False\n", "test", "fails on an engine without the fault, too"),
        ("fix.py", "class Scheduler", "fix", "line 1"),
        ("fix.py", "from folovllm.core.sched.scheduler import Scheduler\n", "fix", "would grade itself"),
        ("fix.py", "", "fix", "no class Scheduler"),
    ],
)
def test_a_bad_file_is_a_result(here, name, text, question, words):
    solve(here)
    (here / f"work/cases/02_{name}").write_text(text)
    results = list(grade_case(CASE, here / "work"))
    failed = [result for result in results if result.status == "failed"]
    assert words in next(result.message for result in failed if question_of(result) == question)
    assert not any("No line of your file" in result.message for result in failed)
    others = {question_of(result) for result in failed} - {question}
    assert others <= ({"step", "cause"} if name == "answer.toml" else set())


# The alarm that ends a check after 10 seconds comes after half a second.
LOOP = """
import signal

def test(parts):
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    while True: pass
"""


def test_a_loop_and_a_crash_are_results(here, monkeypatch):
    """The test runs in the worker process: neither an endless loop nor an exit ends `folovllm learn`."""
    solve(here)
    path = here / "work/cases/02_test.py"
    path.write_text("import os\n\ndef test(parts):\n    os._exit(3)\n")
    results = list(grade_case(CASE, here / "work"))
    assert results[-1].level == "test" and "exit code 3" in results[-1].message
    path.write_text(LOOP)
    start = time.monotonic()
    results = list(grade_case(CASE, here / "work"))
    assert any(r.level == "test" and "still running" in r.message for r in results), results
    assert time.monotonic() - start < 60 and answered(results)["fix"]


def test_a_fix_that_ends_the_process_while_it_is_loaded_is_told_of_the_fix(here):
    """The result must not be that of the test, which was graded before. It also says what was not graded."""
    solve(here)
    (here / "work/cases/02_fix.py").write_text("import os\n\nos._exit(3)\n")
    assert answered(list(grade_case(CASE, here / "work"))) == {"step": True, "cause": True, "test": True, "fix": False}
    (here / "work/cases/02_test.py").write_text("import os\n\nos._exit(3)\n")
    output = learn_case("2", "check", code=1)
    assert output.count("exit code 3") == 1 and "Not checked: the process" in output


def test_pytest_functions_may_be_used(here):
    """What pytest.raises and pytest.fail raise is no Exception: it must not end the worker."""
    case = cases.get_case(4)
    path = here / "test.py"
    path.write_text(
        "import pytest\nfrom folovllm.learn.toy_engine import make_request\n"
        "from folovllm.learn.toy_runner import alone, generate, make_engine\n\n"
        "def test(parts):\n    core = make_engine(parts, block_size=4, num_kv_blocks=9)\n"
        "    if generate(core, [make_request('r', [1, 2], 4)])['r'] != alone([1, 2], 4):\n        pytest.fail('no')\n"
    )
    case_grade.check_test(case, path)


def test_a_test_cannot_tell_the_engines_apart_by_their_names(here):
    path = here / "test.py"
    for words in ("'fault' not in str(parts)", "'.py' not in str(parts)", "not parts", "len(str(parts)) < 60"):
        path.write_text(f"def test(parts):\n    assert {words}\n")
        for number in (1, 4, 5, 7):
            with pytest.raises(AssertionError, match=r"Your test (passes on the faulty engine|fails on an? )"):
                case_grade.check_test(cases.get_case(number), path)


def test_a_test_that_only_runs_the_engine_is_refused(tmp_path):
    """If the engine's own check fails and no assert of the test does, the test shows nothing that a user sees."""
    case = cases.get_case(7)
    path = tmp_path / "test.py"
    path.write_text(
        "def test(parts):\n    from folovllm.learn.toy_runner import make_engine\n"
        "    core = make_engine(parts, block_size=4, num_kv_blocks=8)\n"
        "    core.executor.execute = lambda output: (_ for _ in ()).throw(AssertionError('own check'))\n"
        "    from folovllm.learn.toy_engine import make_request\n"
        "    core.add_request(make_request('r', [1], 1))\n    core.step()\n"
    )
    with pytest.raises(AssertionError, match="not your test fails, but a check of the engine itself: own check"):
        case_grade.check_test(case, path)


def test_a_case_file_with_a_fault_is_named(tmp_path):
    folder = tmp_path / "m6/cases/02_x"
    folder.mkdir(parents=True)
    text = (CASE.folder / "case.toml").read_text()
    for old, new, words in (
        ('cause = "a"', 'cause = "q"', "cause must be one of causes"),
        ("minutes = 40", "minute = 40", "did you mean 'minutes'"),
        ("number = 2", "number = 3", "begin with the number"),
        ("minutes = 40", "", "minutes"),
        ("minutes = 40", "minutes = ", "case.toml"),
    ):
        (folder / "case.toml").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=words):
            cases.load_case(folder)


def test_the_fix_is_run_to_its_end_if_requests_wait_forever(tmp_path):
    """A case whose fault makes requests wait forever ends after a few idle steps, and says so."""
    case = cases.get_case(1)
    run = cases.run_requests(case.fault, case.workload)
    assert not run.is_done and run.num_steps < 30
    results = grade_exercise(case.exercise, case.folder / "fault.py", checks=case_grade.fix_checks(case))
    messages = [result.message for result in results if result.status == "failed"]
    assert messages and "it was not started" in messages[0]


# ---- the toy runner


@pytest.mark.parametrize("milestone", ["m1", "m2", "m3", "m5", "m6"])
def test_the_toy_runner_answers_as_without_a_cache(milestone):
    for seed in range(12):
        workload = random_workload(seed, milestone)
        core = make_engine({}, **workload.config_args)
        requests = [make_request(**args) for _, args in workload.arrivals]
        tokens = generate(core, requests, at=[step for step, _ in workload.arrivals])
        for request in requests:
            room = workload.config_args["max_model_len"] - request.num_prompt_tokens
            expected = alone(request.prompt_token_ids, min(request.max_tokens, room))
            assert tokens[request.request_id] == expected, f"{workload}"


def test_the_toy_runner_copies_blocks():
    core = make_engine({}, block_size=4, num_kv_blocks=9, enable_prefix_caching=True, partial_block_hits=True)
    for prompt in ([1, 2, 3, 4, 5], [1, 2, 3, 9, 9]):
        request = make_request(f"r{prompt[-1]}", prompt, max_tokens=3)
        assert generate(core, [request])[request.request_id] == alone(prompt, 3)
    assert request.num_cached_tokens == 3


def test_two_ranks_agree_and_sample():
    parts = {"toy.runner": "folovllm.learn.toy_runner:TwoRankRunner"}
    for temperature in (0.0, 1.0):
        core = make_engine(parts, block_size=4, num_kv_blocks=9)
        core.add_request(make_request("r", [1, 2, 3], max_tokens=5, temperature=temperature))
        for _ in range(4):
            core.step()
            first, second = (rank.requests["r"].token_ids for rank in core.executor.ranks)
            assert first == second


def test_the_command_line_imports_no_torch(here):
    code = (
        "import sys; sys.argv = ['folovllm', 'learn', 'case', '1']\n"
        "from folovllm.entrypoints.cli import app\n"
        "try: app()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules\n"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
    lines = (here / "work/.results.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["exercise"] == "case/01" and worker.GRACE > 0
