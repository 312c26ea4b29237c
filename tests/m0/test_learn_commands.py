"""`folovllm learn` as a learner types it: what it prints, what it records, and one clear line for every mistake."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands import learn as learn_command
from folovllm.entrypoints.commands import learn_progress
from folovllm.learn import ask, workspace
from folovllm.learn import exercise as exercise_module
from folovllm.learn.ask import is_same_answer
from folovllm.learn.exercise import get_exercise
from folovllm.learn.grade import FAILED, NOT_WRITTEN, Result
from folovllm.learn.mine import my_engine_args, my_parts
from folovllm.learn.record import Record, read_record
from folovllm.learn.story import story
from folovllm.milestones import RUNG_IDS
from folovllm.parts import load_part
from tests.learn_exercises import SOLVED, SOLVED_SECOND, make_milestones

pytestmark = pytest.mark.m0
PART = "core.request_queue.fcfs"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_milestones(tmp_path_factory.mktemp("learn") / "milestones")


@pytest.fixture
def here(root, tmp_path, monkeypatch) -> Path:
    """An empty current folder; the milestones are those of tests/learn_exercises.py."""
    for module in (exercise_module, workspace, learn_progress):
        monkeypatch.setattr(module, "milestones_dir", lambda: root)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def learn(*args: str, code: int = 0, stdin: str | None = None) -> str:
    """What `folovllm learn ARGS` prints; stderr, too."""
    result = CliRunner().invoke(app, ["learn", *args], input=stdin)
    assert result.exit_code == code, result.output
    return result.output


def solve(here: Path, source: str = SOLVED, name: str = "queue") -> Path:
    learn("m2")
    path = here / f"work/m2/{name}.py"
    path.write_text(source)
    return path


def recorded(here: Path) -> list[dict]:
    return [json.loads(line) for line in (here / "work/.results.jsonl").read_text().splitlines()]


# ---- the way through an exercise


def test_a_milestone_shows_its_goals_and_creates_its_files_once(here):
    output = learn("m2")
    assert "m2: Continuous batching" in output and "docs/learn/02" in output and "work/m2/queue.py (new)" in output
    assert "folovllm learn m2 check queue" in output
    (here / "work/m2/queue.py").write_text("mine")
    (here / "work/AGENTS.md").write_text("my rules")
    assert "(new)" not in learn("m2")
    assert (here / "work/m2/queue.py").read_text() == "mine" and (here / "work/AGENTS.md").read_text() == "my rules"


def test_the_rules_for_an_assistant_are_written(here):
    learn("m2")
    rules = (here / "work/AGENTS.md").read_text()
    assert "Write no code for an exercise that has not passed" in rules
    assert all(word in rules for word in ("simpler", "example", "hint", "choose for me"))


def test_where_am_i_and_what_comes_next(here):
    output = learn()
    assert "0 of 3 exercises passed" in output and "creates work/m2/queue.py" in output
    solve(here)
    assert "Next: m2/preempted" in learn("m2", "check", "queue")
    output = learn()
    assert "1 of 3 exercises passed" in output and "[x] queue" in output and "m2/preempted: In front" in output
    assert "1 of 1 exercises passed" in learn("--track", "fast") and "All done" in learn("--track", "fast")
    (here / "work/m2/queue.py").write_text(SOLVED + "\n")
    assert "[?] queue" in learn(), "the file has changed since it was checked"


def test_the_story_of_a_failure(here):
    path = solve(here, SOLVED.replace("popleft", "pop"))
    output = learn("m2", "check", "queue", code=1)
    assert f"m2/queue   {path.relative_to(here)}   yours: pop_request" in output
    for words in (
        " 1 contract  ok", " 2 unit      1/2", " 3 trace     skipped until 2 passes",
        "the_first_one_leaves_first: The request that waits longest is popped.",
        "after a, b and c were added, pop_request returned c, expected a",
        "SPEC R2.1: Running requests come first", "folovllm learn m2 hint queue (hint 1 of 3",
    ):  # fmt: skip
        assert words in output, output
    assert "Traceback" not in output and "| def the_first_one" not in output
    assert "| def the_first_one_leaves_first(mine: Mine) -> None:" in learn("m2", "check", "queue", "--why", code=1)
    path.write_text(SOLVED.replace("popleft", "poplft"))
    output = learn("m2", "check", "queue", code=1)
    assert "work/m2/queue.py, line 10, in pop_request: return self._requests.poplft()" in output


def test_an_untouched_file_is_no_failure_of_the_whole_check(here):
    learn("m2")
    output = learn("m2", "check", code=1)
    assert output.count("not begun") == 2
    assert "Not written yet: pop_request. work/m2/queue.py, line 11" in learn("m2", "check", "queue", code=1)
    solve(here)
    output = learn("m2", "check", code=1)
    assert "Passed. Think about this: Why is a list slow here?" in output and "m2/preempted   not begun" in output


def test_hints_come_one_layer_at_a_time(here):
    learn("m2")
    texts = [learn("m2", "hint", "queue") for _ in range(4)]
    assert [text.splitlines()[0] for text in texts[:3]] == [
        "Hint 1 of 3: Which end?", "Hint 2 of 3: A deque.", "Hint 3 of 3: popleft",
    ]  # fmt: skip
    assert "solution queue" in texts[2] and texts[3] == texts[2]
    assert [line["layer"] for line in recorded(here) if line["event"] == "hint"] == [1, 2, 3, 3]
    assert "3 hints" in learn("status")


@pytest.mark.parametrize(("answer", "right"), [("a", True), ("  A! ", True), ("b", False)])
def test_a_prediction_is_compared_with_what_the_engine_computes(here, answer, right):
    learn("m2")
    output = learn("m2", "predict", "queue", answer)
    assert "which is popped first?" in output and "The engine: a" in output and ("Right." in output) is right
    assert recorded(here)[-1]["right"] is right and recorded(here)[-1]["answer"] == answer


@pytest.mark.parametrize(
    ("answer", "right"), [("31 8", True), ("[31, 8]", True), ("31, 8, 7, 4", False), ("8 31", False)]
)
def test_only_the_first_line_of_the_engines_answer_is_compared(here, monkeypatch, answer, right):
    """Learners who answered [31, 8, 36] were told that they were wrong, because the explanation has numbers too."""
    checks = type("Checks", (), {"prediction": staticmethod(lambda: "[31, 8]\nThat is 7 * 4 + 3 and 2 * 4 + 0.")})
    monkeypatch.setattr(ask, "load_file", lambda path: checks)
    learn("m2")
    output = learn("m2", "predict", "queue", answer)
    assert "That is 7 * 4 + 3" in output and ("Right." in output) is right


@pytest.mark.parametrize(
    ("answer", "computed", "right"),
    [
        ("12288 and 1365", "12,288 bytes per token, and 1,365 blocks", True),
        ("12288", "12,288 bytes per token, and 1,365 blocks", False),
        (".5", "0.50 of float4", True),
        ("0.1353 and 1.1536", "0.135, 1.154", True),  # a rounded number may be given with more digits
        ("0.12 and 1.154", "0.135, 1.154", False),
        ("1.4", "1", False),
        ("0x63402715", "63402715", True),
        ("waiting, RUNNING and then it is refused", "WAITING -> RUNNING; refused", True),
        ("running, waiting, refused", "WAITING -> RUNNING; refused", False),
    ],
)
def test_answers_are_the_same_if_their_numbers_or_else_their_words_are(answer, computed, right):
    assert is_same_answer(answer, computed) is right


def test_a_prediction_can_be_typed_in_and_must_be_given(here):
    assert "Right." in learn("m2", "predict", "queue", stdin="a\n")
    assert "no answer: give it as an argument" in learn("m2", "predict", "queue", code=2, stdin="")


def test_the_solution_is_the_engines_source_with_a_diff_and_counts_as_help(here):
    solve(here, SOLVED.replace("return self._requests.popleft()", "'Mine.'\n        return self._requests.pop()"))
    output = learn("m2", "solution", "queue")
    assert "return self._requests.popleft()" in output and "-    return self._requests.pop()" in output
    assert "Mine." not in output, "the diff is about the code"
    solve(here)
    assert "Passed (assisted" in learn("m2", "check", "queue")
    assert "assisted" in learn("status")


def test_a_look_at_the_solution_after_passing_is_no_help(here):
    solve(here)
    learn("m2", "check", "queue")
    learn("m2", "solution", "queue")
    assert "m2/queue                 passed     1 check, solution seen" in learn("status")


def test_a_file_that_is_put_back_to_what_passed_counts_as_passed(here):
    solve(here)
    learn("m2", "check", "queue")
    solve(here, SOLVED.replace("popleft", "pop"))
    learn("m2", "check", "queue", code=1)
    solve(here)
    assert "[x] queue" in learn()


def test_the_last_hint_read_again_is_not_one_more(here):
    for _ in range(5):
        learn("m2", "hint", "queue")
    assert "3 hints" in learn("status")


def test_a_fault_is_told_before_what_is_not_written_yet(here, root, monkeypatch):
    """Who writes one method after the other must see what is wrong with the first one."""
    exercise = get_exercise("m2", "queue", root)
    results = [
        Result("unit", "later", NOT_WRITTEN, "m2/queue: pop_request", where="line 11, in pop_request"),
        Result("unit", "first", FAILED, "the first one is wrong", doc="It is right."),
        Result("unit", "second", FAILED, "the second one is wrong"),
    ]
    lines = "\n".join(story(exercise, Path("work/m2/queue.py"), results))
    assert "the first one is wrong" in lines and "Not written yet: pop_request." in lines
    assert "Also failing: second." in lines and "the second one is wrong" not in lines


def test_the_next_exercise_is_a_later_one_even_if_earlier_ones_were_left_out(tmp_path, monkeypatch, capsys):
    """Learners who began with m4 were sent to m0 when they had finished it."""
    monkeypatch.setattr(Record, "is_passed", lambda self, exercise: exercise.milestone == "m4")
    learn_progress.show_passed(get_exercise("m4", "merge_lse"), Record(tmp_path, []))
    assert "Next: m5/" in capsys.readouterr().out


def test_the_solution_is_shown_for_a_file_that_cannot_be_parsed(here):
    solve(here, "class Queue(:\n")
    assert "popleft" in learn("m2", "solution", "queue")


def test_reset_keeps_what_was_there(here):
    path = solve(here)
    for number in (1, 2):
        path.write_text(f"# try {number}")
        assert f"queue.py.old-{number}" in learn("m2", "reset", "queue")
        assert path.with_name(f"queue.py.old-{number}").read_text() == f"# try {number}"
    assert "NotImplementedError" in path.read_text()


def test_read_shows_what_to_write(here):
    assert "What to write." in learn("m2", "read", "queue")


def test_read_names_pages_from_where_the_learner_stands(here, monkeypatch):
    readme = exercise_module.get_exercise("m2", "queue").folder / "README.md"
    monkeypatch.setattr(Path, "read_text", read_text_of(readme, "[a page](../../../../docs/learn/02.md#a)"))
    assert f"[a page]({exercise_module.PACKAGE.parent}/docs/learn/02.md#a)" in learn("m2", "read", "queue")
    monkeypatch.setattr(learn_progress, "PACKAGE", here / "installed/folovllm")
    assert "[a page](https://github.com/folovllm/folovllm/blob/main/docs/learn/02.md#a)" in learn("m2", "read", "queue")


def read_text_of(path: Path, text: str):
    """Path.read_text, which finds `text` in one file."""
    original = Path.read_text
    return lambda self, **options: text if self == path else original(self, **options)


def test_status_log_and_report(here):
    assert "Nothing is recorded yet" in learn("log")
    solve(here, SOLVED.replace("popleft", "pop"))
    learn("m2", "check", "queue", code=1)
    learn("m2", "hint", "queue")
    learn("m2", "predict", "queue", "c")
    assert "m2/queue                 failing    1 check, 1 hint, prediction wrong" in learn("status")
    solve(here)
    learn("m2", "check", "queue")
    log = learn("log")
    for words in ("begin", "check: failed at unit", "hint 1", "predict: 'c' (wrong)", "check: passed"):
        assert words in log
    assert "wrote work/report.md" in learn("report")
    report = (here / "work/report.md").read_text()
    assert "Of 3 exercises, 1 passed unaided" in report and "| The queue (`m2/queue`) | passed |" in report
    assert "2 checks, 1 hint, prediction wrong" in report
    learn("report", "-o", "elsewhere/mine.md")
    assert (here / "elsewhere/mine.md").read_text() == report


def test_watch_checks_at_every_save_until_ctrl_c(here, monkeypatch):
    path = solve(here, SOLVED.replace("popleft", "pop"))
    pauses = iter(range(100))

    def pause(seconds: float) -> None:
        turn = next(pauses)
        if turn == 1:
            path.unlink()  # as editors do for a moment
        if turn == 2:
            path.write_text(SOLVED)
        if turn == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(learn_command.time, "sleep", pause)
    output = learn("m2", "check", "queue", "--watch", code=130)
    assert output.count("watching work/m2/queue.py; Ctrl-C ends") == 2
    assert "expected a" in output and "Passed." in output


# ---- every mistake is one clear line


MISTAKES = {
    "milestone": (["m99"], "unknown milestone 'm99'; the ladder has m0, m1"),
    "upper case": (["M3"], "did you mean 'm3'?"),
    "command": (["chekc"], "unknown command 'chekc'; write a milestone (folovllm learn m3) or one of status, log"),
    "exercise": (["m2", "check", "quee"], "no exercise 'quee' in m2; m2 has queue, preempted; did you mean 'queue'?"),
    "no exercises": (["m3", "check", "x"], "no exercise 'x' in m3; m3 has no exercises"),
    "no work yet": (["m2", "check", "queue"], "no file work/m2/queue.py; `folovllm learn m2` creates it; if you have"),
    "no work at all": (["m2", "check"], "there are no files of m2 in work/; `folovllm learn m2` creates them"),
    "reset nothing": (["m2", "reset", "queue"], "no file work/m2/queue.py"),
    "watch all": (["m2", "check", "--watch"], "--watch needs the exercise"),
    "track": (["--track", "slow"], "--track must be one of all, fast; got 'slow'"),
    "capstone": (["m7", "solution", "your_engine"], "is made of your other exercises"),
    "diff backwards": (["diff", "m3", "m2"], "m2 does not come after m3; write the earlier milestone first"),
    "diff unknown": (["diff", "m2", "m33"], "unknown milestone 'm33'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_that_names_the_fix(here, mistake):
    args, words = MISTAKES[mistake]
    output = learn(*args, code=2)
    assert output.startswith("error: ") and words in output and len(output.splitlines()) == 1
    assert not (here / "work").exists(), "a mistake creates nothing"


def test_a_deleted_file_is_created_again_by_the_milestone(here):
    solve(here).unlink()
    assert learn("m2", "check", "queue", code=2) == "error: no file work/m2/queue.py; `folovllm learn m2` creates it\n"
    assert "work/m2/queue.py (new)" in learn("m2")


@pytest.mark.parametrize("folder", ["sub", "work", "work/m2"])
def test_outside_the_folder_the_right_one_is_named(here, monkeypatch, folder):
    learn("m2")
    (here / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(here / folder)
    for args in (["m2"], ["m2", "check", "queue"], []):
        assert f"no folder work/ here, but there is one in {here}; run this there: cd {here}" in learn(*args, code=2)
    assert "0 of 3" in learn("--work", str(here / "work"))


def test_files_in_the_folder_for_temporary_files_are_not_above(here, monkeypatch):
    """A learner in /tmp is not the learner of a test below /tmp, and not that of a page that is being generated."""
    learn("m2")
    (here / "folovllm-page-x").mkdir()
    monkeypatch.setattr(workspace.tempfile, "gettempdir", lambda: str(here))
    monkeypatch.chdir(here / "folovllm-page-x")
    assert "work/m2/queue.py (new)" in learn("m2")


def test_the_first_milestone_sends_a_beginner_to_start_here(monkeypatch, tmp_path):
    """Its page, on the project's setup, says that it is to be read after 02."""
    monkeypatch.chdir(tmp_path)
    assert "00_start_here.md, then " in learn("m0") and "00_project_setup.md#the-states-of-a-request\n" in learn("m0")
    assert "docs/learn/01_basic_inference.md\n" in learn("m1")


def test_a_line_that_is_no_json_is_left_out_and_nothing_is_lost(here):
    solve(here)
    learn("m2", "check", "queue")
    record = here / "work/.results.jsonl"
    record.write_bytes(b"\xff\xfenot json\n" + record.read_bytes() + b'["no object"]\n{"event": "che')  # a cut write
    output = learn("status")
    assert "m2/queue                 passed" in output and "3 lines are not readable" in output
    learn("m2", "hint", "queue")
    assert "Hint" not in learn("log") and "hint 1" in learn("log"), "the new line is not lost with the cut one"


ODD_EVENTS = [
    {"event": "check", "exercise": "m2/queue", "passed": True},  # no time: `report` ended with KeyError
    {"time": "t", "event": "hint", "exercise": "m2/queue", "layer": {"a": 1}},  # `status` ended with TypeError
    {"time": 5, "event": [1], "exercise": ["x"]},
    {"time": "t", "event": "check", "exercise": "m2/queue", "levels": 5},
]


def test_events_that_were_edited_by_hand_are_left_out(here):
    learn("m2")
    record = here / "work/.results.jsonl"
    with record.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in ODD_EVENTS)
    for command in ("status", "log", "report"):
        assert "4 lines are not readable" in learn(command)


@pytest.mark.parametrize("command", [["learn", "m2", "race"], ["sim", "--num-requests", "1"]])
@pytest.mark.parametrize(("code", "words"), [("x = 1 / 0", "ZeroDivisionError: division"), ("exit(3)", "SystemExit")])
def test_a_file_that_raises_while_it_is_loaded_is_named_with_its_line(here, command, code, words):
    """A policy for the race and a part for the simulator ended with a traceback, or ended the program."""
    (here / "mine.py").write_text(f"a = 1\n{code}\n")
    option = ["--file", "mine.py"] if "race" in command else ["--part", "core.scheduler=mine.py:Mine"]
    result = CliRunner().invoke(app, [*command, *option])
    assert result.exit_code == 2 and f"mine.py, line 2: {words}" in result.output


def test_a_file_that_is_not_utf8_is_named(here):
    solve(here).write_bytes(b'x = "caf\xe9"\n')
    assert "work/m2/queue.py is not UTF-8 text; save it as UTF-8" in learn("m2", "check", "queue", code=1)


def test_a_work_folder_that_cannot_be_written_is_named(here):
    (here / "work").write_text("a file")
    assert "work is not a folder; rename that file" in learn("m2", code=2)
    (here / "work").unlink()
    (here / "work").mkdir()
    (here / "work/m2").write_text("a file")
    output = learn("m2", code=2)
    assert "cannot write work/m2" in output and "choose another with --work" in output


def test_a_read_only_work_folder_is_named(here, monkeypatch):
    """Root may write everywhere, so the refusal of the system is played."""
    solve(here)

    real_open = Path.open

    def refuse(path: Path, mode: str = "r", *args, **kwargs):
        if path.parts[0] != "work" or "r" in mode:
            return real_open(path, mode, *args, **kwargs)
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot write work/.results.jsonl: Permission denied; make the folder" in learn(
        "m2", "hint", "queue", code=2
    )
    (here / "work/m2/queue.py").unlink()
    assert "cannot write work/m2/queue.py: Permission denied; make" in learn("m2", code=2)


def test_a_record_that_is_a_folder_is_named(here):
    (here / "work/.results.jsonl").mkdir(parents=True)
    assert "cannot write work/.results.jsonl: Is a directory" in learn("m2", "hint", "queue", code=2)


# ---- help


@pytest.mark.parametrize("args", [[], ["m2"], ["m2", "check"], ["m2", "predict"], ["report"], ["diff"]])
def test_help_has_examples(args):
    output = learn(*args, "--help")
    assert "folovllm learn" in output.split("Options")[0].split("Usage")[1].split("\n", 1)[1]


def test_every_milestone_is_there():
    assert all(f" {rung} " in learn("--help") for rung in RUNG_IDS)


# ---- the engine made of your parts


def test_several_exercises_on_a_part_become_one_class(here):
    solve(here)
    solve(here, SOLVED_SECOND, "preempted")
    learn("m2", "check")
    parts = my_parts(here / "work")
    assert list(parts) == [PART]
    cls = load_part(PART, parts)
    assert {name for base in cls.__mro__[1:3] for name in vars(base)} >= {"pop_request", "prepend_request"}
    assert (here / "work/.mine/core_request_queue_fcfs.py").is_file()


def test_a_class_from_scratch_does_not_hide_behind_the_engines(here):
    """With another exercise on the part, a class that inherits is taken, because it needs the engine's methods."""
    methods = ["add_request", "prepend_request", "peek_request", "remove_requests", "__len__", "__iter__"]
    calls = ["append(*a)", "appendleft(*a)", "__getitem__(0)", "clear()", "__len__()", "__iter__()"]
    source = "from collections import deque\n\nclass Queue:\n    def __init__(self):\n        self.d = deque()\n"
    source += "".join(
        f"    def {m}(self, *a):\n        return self.d.{c}\n" for m, c in zip(methods, calls, strict=True)
    )
    source += "    def pop_request(self):\n        return self.d.popleft()\n"
    solve(here, source)
    learn("m2", "check", "queue")
    assert my_parts(here / "work") == {PART: f"{here}/work/m2/queue.py:Queue"}


def test_only_what_passes_as_it_is_now_counts(here):
    with pytest.raises(ValueError, match="no exercise in work/ has passed"):
        my_parts(Path("work"))
    path = solve(here)
    learn("m2", "check", "queue")
    assert my_parts(Path("work")) == {PART: "work/m2/queue.py:Queue"}
    path.write_text(SOLVED + "\n")
    with pytest.raises(ValueError, match="a file that has changed must be checked again"):
        my_parts(Path("work"))


def test_the_capstone_needs_every_part_and_runs_on_them(here):
    solve(here)
    learn("m2", "check", "queue")
    output = learn("m7", "check", "your_engine", code=1)
    assert "your engine still runs on borrowed parts; pass m2/preempted first" in output
    solve(here, SOLVED_SECOND, "preempted")
    learn("m2", "check", "preempted")
    output = learn("m7", "check")
    assert "m7/your_engine   every part is yours" in output and "Passed." in output
    assert "3 of 3 exercises passed" in learn() and "folovllm chat --mine" in learn()


@pytest.mark.parametrize("command", [["chat"], ["generate", "x"]])
def test_mine_without_a_passed_exercise_is_refused_before_the_model_is_loaded(here, command):
    result = CliRunner().invoke(app, [*command, "--mine"])
    assert result.exit_code == 2 and "no exercise in work/ has passed" in result.output


def test_mine_gives_the_engine_your_parts_and_an_explicit_part_wins(here, monkeypatch, capsys):
    from folovllm.entrypoints.commands.options import EngineOptions

    solve(here)
    learn("m2", "check", "queue")
    assert EngineOptions(mine=True).engine_args()["parts"] == {PART: "work/m2/queue.py:Queue"}
    assert f"your parts: {PART} (work/m2/queue.py:Queue)" in capsys.readouterr().err
    other = EngineOptions(mine=True, part=["core.scheduler=x.py:S", f"{PART}=y.py:Q"])
    assert other.engine_args()["parts"] == {PART: "y.py:Q", "core.scheduler": "x.py:S"}


def test_the_record_survives_two_writers(here):
    learn("m2")
    records = [read_record(here / "work") for _ in range(2)]
    threads = [
        threading.Thread(target=lambda r=r: [r.add("hint", "m2/queue", layer=1) for _ in range(20)]) for r in records
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = read_record(here / "work")
    assert record.unreadable == 0 and sum(line["event"] == "hint" for line in record.lines) == 40


# ---- what a rung adds


def test_diff_shows_switches_code_and_changes():
    output = learn("diff", "m2", "m3")
    assert "block_size" in output and "'max_model_len' -> 16" in output and "batching" not in output.split("m3,")[0]
    assert "folovllm/core/block_pool.py" in output and "BlockPool" in output
    two = learn("diff", "m2", "m4")
    assert "attention_backend" in two and "m3, Paged KV cache" in two and "m4, Flash attention" in two


# ---- pytest on your parts


PROBE = """
import pytest
from folovllm.parts import load_part
pytestmark = pytest.mark.m2

def test_it_is_mine():
    assert load_part("core.request_queue.fcfs").__name__ == "Queue"
"""
# pytest, once for each list of arguments. A process takes seconds to import torch, so all of them share one.
RUNS_OF_PYTEST = """
import json, sys
import pytest

for args in json.loads(sys.argv[1]):
    print(f"\\nexit code {pytest.main([*args, '-q', '-p', 'no:cacheprovider', '-p', 'tests.conftest']):d}", flush=True)
    print("-----", flush=True)
"""


def test_the_tests_run_on_a_part(here):
    """With this repository's own conftest.py, in a process of its own. What is left of a part that was refused would
    be seen in the run after it."""
    solve(here)
    (here / "test_probe.py").write_text(PROBE)
    (here / "pytest.ini").write_text("[pytest]\nmarkers = m2: a milestone\n")
    runs = [
        (["--part", f"{PART}=work/m2/nothing.py:Queue"], 4, "no file work/m2/nothing.py"),
        (["--part", "core.queue=work/m2/queue.py:Queue"], 4, "unknown part 'core.queue'"),
        ([], 1, "1 failed"),
        (["--part", f"{PART}=work/m2/queue.py:Queue"], 0, "1 passed"),
    ]
    command = [sys.executable, "-c", RUNS_OF_PYTEST, json.dumps([args for args, _, _ in runs])]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    printed = done.stdout.split("-----\n")
    assert len(printed) == len(runs) + 1, done.stdout
    for text, (_, code, words) in zip(printed, runs, strict=False):
        assert f"\nexit code {code}\n" in text and words in text, text


def test_mine_adds_the_engine_arguments_that_a_part_needs(here, root, monkeypatch, capsys):
    """A learner passed m1/kv_contiguous, which knows one page per request, and `chat --mine` failed at once."""
    from folovllm.entrypoints.commands.options import EngineOptions

    path = root / "m2/exercises/queue/exercise.toml"
    text = path.read_text()
    try:
        path.write_text(text + 'mine = { block_size = "max_model_len" }\n')
        solve(here)
        learn("m2", "check", "queue")
        assert my_engine_args(Path("work")) == {"block_size": "max_model_len"}
        assert EngineOptions(mine=True).engine_args()["block_size"] == "max_model_len"
        assert "they need: block_size=max_model_len" in capsys.readouterr().err
        assert EngineOptions(mine=True, engine_arg=["block_size=32"]).engine_args()["block_size"] == 32
        solve(here, SOLVED_SECOND, "preempted")  # a later exercise on the part, which needs nothing
        learn("m2", "check", "preempted")
        assert my_engine_args(Path("work")) == {}
    finally:
        path.write_text(text)
