"""`folovllm quiz`: grading, memory, the mock interview, cards, and the generated pages (R0.59 to R0.61)."""

import dataclasses
import json
import random
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands import quiz as command
from folovllm.learn import cards
from folovllm.learn.mock import PARTS, mock_report, plan_mock
from folovllm.learn.questions import Question, load_questions
from folovllm.learn.quiz import INTERVALS, Boxes, Graded, in_order, parse_value, same_answer, select
from tests.script_loader import load_script

pytestmark = pytest.mark.m0

QUESTIONS = load_questions()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def use(monkeypatch: pytest.MonkeyPatch, *questions: Question) -> None:
    monkeypatch.setattr(command, "load_questions", lambda: {question.id: question for question in questions})


def quiz(*args: str, answers: str = "") -> Result:
    """Runs the command with `answers` on stdin, as from a pipe."""
    return CliRunner().invoke(app, ["quiz", *args], input=answers, env={"COLUMNS": "100"})


def kept() -> list[dict[str, Any]]:
    file = Path("work/quiz.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def number_question() -> Question:
    """One with a single value per variable: its answer is known."""
    question = QUESTIONS["m3-kv-bytes"]
    return dataclasses.replace(question, vars={name: choices[:1] for name, choices in question.vars.items()})


EXPLAIN = QUESTIONS["m3-zero-waste"]
PREDICT = dataclasses.replace(QUESTIONS["m0-legal-moves"])


# ---- grading


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("114,688", 114_688), ("112 KiB", 114_688), ("112Ki", 114_688), ("3.2 GB", 3.2e9), ("1.5e9", 1.5e9),
        ("7 ms", 7), ("350 tokens/s", 350), ("12 %", 12), ("2k", 2_000), ("989 TFLOP/s", 989e12), (".5", 0.5),
        ("many", None), ("", None), ("1.2.3", None),
    ],
)  # fmt: skip
def test_values_are_read(text: str, value: float | None) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("16 GB", "GB", 16), ("16", "GB", 16), ("16GB", "bytes", 16e9), ("16 GiB", "GB", 16 * 1.024**3),
        ("3350 GB/s", "GB/s", 3350), ("3.35 TB/s", "GB/s", 3350), ("989 TFLOP/s", "TFLOP/s", 989), ("0.6 s", "ms", 600),
        ("600 ms", "s", 0.6), ("12 %", "%", 12), ("2k", "tokens", 2_000), ("~16.", "GB", 16), ("3 times", "times", 3),
    ],
)  # fmt: skip
def test_values_come_in_the_unit_of_the_question(text: str, unit: str, value: float) -> None:
    """An interviewee writes "16 GB" where the question asks for GB; that is 16 and not 16e9."""
    assert parse_value(text, unit) == pytest.approx(value)


def test_answers_are_compared_by_words_and_numbers() -> None:
    assert same_answer("0, 1,1 1 0", "0 1 1 1 0") and same_answer("A:1", "a 1")
    assert not same_answer("1 0", "0 1") and not same_answer("?", "0")


@pytest.mark.parametrize(
    ("answers", "passed"),
    [("114688\n", True), ("112 KiB\n", True), ("114700\n", True), ("16384\n", False), ("?\n", False)],
)
def test_a_number_is_graded_with_its_tolerance(answers: str, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, number_question())
    result = quiz("m3", answers=answers)
    assert result.exit_code == 0 and [entry["passed"] for entry in kept()] == [passed]
    assert "114,688 bytes" in result.output and "Trap:" in result.output


def test_what_is_no_number_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, number_question())
    result = quiz(answers="lots\n114688\n")
    assert "'lots' is not a number" in result.output and kept()[0]["passed"]


def test_a_prediction_is_compared_with_the_computed_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, PREDICT)
    quiz(answers="\n0 1 1 1 0\n")  # Enter alone is no answer
    quiz(answers="1 1 1 1 0\n")
    assert [entry["passed"] for entry in kept()] == [True, False]


@pytest.mark.parametrize(
    ("marks", "passed", "score"), [("all", True, 1.0), ("1 2", True, 0.5), ("3, 4", False, 0.5), ("none", False, 0.0)]
)
def test_an_explanation_is_graded_by_its_rubric(
    marks: str, passed: bool, score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The points 1 and 2 of this record are musts."""
    assert [point.must for point in EXPLAIN.points] == [True, True, False, False]
    use(monkeypatch, EXPLAIN)
    result = quiz(answers=f"my answer\n{marks}\n")
    assert (kept()[0]["passed"], kept()[0]["score"]) == (passed, score)
    assert "1. " in result.output and "(a must)" in result.output and "In three minutes:" in result.output


def test_marks_that_name_no_point_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, EXPLAIN)
    result = quiz(answers="my answer\n1 9\nfirst\nall\n")
    assert result.output.count("names no points; write numbers from 1 to 4") == 2 and kept()[0]["score"] == 1.0


def test_enter_alone_marks_nothing_and_giving_up_marks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Enter after the answer is a slip of the finger and does not fail the question."""
    use(monkeypatch, EXPLAIN)
    assert "names no points" in quiz(answers="my answer\n\nall\n").output and kept()[0]["score"] == 1.0
    assert "Which of these points" not in quiz(answers="?\n").output and kept()[1]["score"] == 0.0


# ---- what is kept


@pytest.mark.parametrize("word", ["q", "Quit", "exit"])
def test_q_ends_the_quiz_and_keeps_what_was_answered(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, number_question(), dataclasses.replace(number_question(), id="m3-other"))
    result = quiz(answers=f"114688\n{word}\n")
    assert result.exit_code == 0 and "1 of 1 passed" in result.output and len(kept()) == 1


def test_a_question_is_asked_by_its_id_and_names_its_follow_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, number_question(), EXPLAIN)
    result = quiz("M3-zero-waste", answers="my answer\nall\n")
    assert [entry["id"] for entry in kept()] == ["m3-zero-waste"]
    assert all(name in result.output for name in EXPLAIN.follow)
    assert "did you mean 'm3-zero-waste'" in quiz("m3-zero-wate").output


def test_a_mock_interview_without_an_answer_writes_no_report() -> None:
    result = quiz("--mock", "45", "--seed", "1", answers="q\n")
    assert "nothing was answered" in result.output and not list(Path("work").glob("mock-*"))


def test_input_that_ends_keeps_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, number_question(), EXPLAIN, PREDICT)
    result = quiz("--kind", "predict", answers="0 1 1 1 0\n")
    assert result.exit_code == 0 and "1 of 1 passed" in result.output
    result = quiz("--seed", "1", answers="")
    assert result.exit_code == 0 and "0 of 0 passed" in result.output and len(kept()) == 1


def test_ctrl_c_keeps_what_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, number_question(), dataclasses.replace(number_question(), id="m3-other"))
    lines = iter(["114688"])

    def interrupted(prompt: str = "") -> str:
        for line in lines:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    result = quiz()
    assert result.exit_code == 130 and len(kept()) == 1 and "1 of 1 passed" in result.output


def test_boxes_rise_with_right_answers_and_fall_with_wrong_ones(tmp_path: Path) -> None:
    boxes = Boxes(tmp_path / "work/quiz.jsonl")
    for passed, box in [(True, 1), (True, 2), (True, 3), (False, 1), (True, 2)]:
        boxes.keep(Graded(EXPLAIN, passed, 1.0, (), 3.0))
        again = Boxes(boxes.file)  # the file alone holds the state
        assert boxes.box[EXPLAIN.id] == again.box[EXPLAIN.id] == box
        assert again.due_at(EXPLAIN.id) - again.asked[EXPLAIN.id] == timedelta(days=INTERVALS[box])
    for _ in range(9):
        boxes.keep(Graded(EXPLAIN, True, 1.0, (), 3.0))
    assert boxes.box[EXPLAIN.id] == len(INTERVALS) - 1


def test_lines_that_cannot_be_read_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("work").mkdir()
    now = datetime.now(UTC).isoformat()
    good = json.dumps({"id": EXPLAIN.id, "passed": True, "at": now})
    Path("work/quiz.jsonl").write_text(f'{good}\n{{"id": "m3-ze\n[]\n{{"id": "x", "passed": true}}\n')
    use(monkeypatch, EXPLAIN)
    result = quiz("--due")
    assert "3 lines cannot be read" in result.output and "nothing is due; the next question is on" in result.output


def test_due_questions_come_first_and_low_boxes_before_high_ones(tmp_path: Path) -> None:
    boxes = Boxes(tmp_path / "quiz.jsonl")
    new, low, high, later = (dataclasses.replace(EXPLAIN, id=f"m3-{name}") for name in ("new", "low", "high", "later"))
    long_ago = datetime.now(UTC) - timedelta(days=99)
    boxes.box |= {low.id: 1, high.id: 4, later.id: 1}
    boxes.asked |= {low.id: long_ago, high.id: long_ago, later.id: datetime.now(UTC)}
    for seed in range(5):
        assert in_order([later, high, low, new], boxes, random.Random(seed)) == [new, low, high, later]


def test_a_newcomer_begins_with_the_basic_questions(tmp_path: Path) -> None:
    """What was never asked comes in the order of the levels; what was missed comes by its box, whatever its level."""
    boxes = Boxes(tmp_path / "quiz.jsonl")
    screen, core, deep = (dataclasses.replace(EXPLAIN, id=f"m3-{n}", level=n) for n in ("screen", "core", "deep"))
    for seed in range(5):
        assert in_order([deep, core, screen], boxes, random.Random(seed)) == [screen, core, deep]
    boxes.box |= dict.fromkeys([screen.id, core.id, deep.id], 1)
    boxes.asked |= dict.fromkeys([screen.id, core.id, deep.id], datetime.now(UTC) - timedelta(days=99))
    assert {in_order([deep, core, screen], boxes, random.Random(seed))[0].level for seed in range(20)} > {"deep"}


def test_a_seed_repeats_questions_and_numbers() -> None:
    first, second, other = (quiz("drill", "--n", "3", "--seed", seed, answers="?\n?\n?\n") for seed in ("7", "7", "8"))
    Path("work/quiz.jsonl").unlink()
    assert "3/3" in first.output
    again = quiz("drill", "--n", "3", "--seed", "7", answers="?\n?\n?\n")
    assert again.output == first.output != other.output and second.exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["m33"], "unknown chapter 'm33'; did you mean 'm3'?"),
        (["m3", "--kind", "numbers"], "unknown kind 'numbers'; did you mean 'number'?"),
        (["--lang", "fr"], "unknown language 'fr'"),
        (["export"], "add --anki FILE.apkg or --tsv FILE.tsv"),
        (["m3", "--tsv", "x.tsv"], "add the word export"),
        (["export", "--tsv", "no/folder/x.tsv"], "cannot write"),
        (["--mock", "3"], "3 minutes are too few for 6 questions; give it 20"),
    ],
)
def test_mistakes_are_named(args: list[str], message: str) -> None:
    result = quiz(*args)
    assert result.exit_code == 2 and message in result.output


def test_a_chapter_and_a_kind_choose() -> None:
    chosen = select(QUESTIONS.values(), "m3", "number")
    assert chosen and all((q.chapter, q.kind) == ("m3", "number") for q in chosen)


def test_chinese_is_shown_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, dataclasses.replace(EXPLAIN, q=EXPLAIN.q | {"zh": "真的没有浪费吗？"}))
    result = quiz("--lang", "zh", answers="\nall\n")
    assert "真的没有浪费吗？" in result.output and "The example uses only multiples" in result.output


# ---- mock interview


def interview_bank() -> Iterator[Question]:
    """One question for every part of an interview, with fixed numbers."""
    explain = dataclasses.replace(EXPLAIN, level="core")
    yield from (dataclasses.replace(explain, id=f"m3-explain-{i}") for i in range(2))
    yield dataclasses.replace(EXPLAIN, id="m3-screen")
    yield dataclasses.replace(number_question(), id="m3-number")
    yield dataclasses.replace(explain, id="m3-debug", kind="debug")
    yield dataclasses.replace(explain, id="design-x", kind="design", chapter="design")


@pytest.mark.parametrize("minutes", [20, 31, 45, 60, 90])
def test_the_plan_has_every_part_once_and_fills_the_time(minutes: int) -> None:
    plan = plan_mock(list(interview_bank()), minutes, random.Random(0))
    assert sum(m for _, m in plan) == minutes and all(m > 0 for _, m in plan)
    assert [q.kind for q, _ in plan] == ["explain", "explain", "explain", "number", "debug", "design"]
    assert len({q.id for q, _ in plan}) == len(PARTS)


def test_a_mock_interview_is_graded_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *interview_bank())
    result = quiz("--mock", "45", "--seed", "1", answers="a\nall\na\nall\na\n1 2\n114688\na\n3\na\nall\n")
    assert result.exit_code == 0, result.output
    assert "6/6 (12 min)  design-x" in result.output
    (report,) = Path("work").glob("mock-*.md")
    text = report.read_text(encoding="utf-8")
    assert text in result.output and "6 of 6 questions answered; score 79 %: **would pass**" in text
    assert "## m3-debug: missed" in text and "| design-x | design | 12 min |" in text
    assert len(kept()) == 6


def test_a_mock_interview_that_ends_early_has_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *interview_bank())
    quiz("--mock", "45", answers="a\nall\n")
    (report,) = Path("work").glob("mock-*.md")
    text = report.read_text(encoding="utf-8")
    assert "1 of 6 questions answered" in text and text.count("not asked | -") == 5


def test_a_report_of_nothing() -> None:
    plan = plan_mock(list(interview_bank()), 45, random.Random(0))
    assert "0 of 6 questions answered; score 0 %: **not yet**" in mock_report(plan, [], datetime.now(UTC))


# ---- cards


def test_the_tsv_tells_anki_what_its_columns_are() -> None:
    result = quiz("export", "--tsv", "cards.tsv")
    lines = Path("cards.tsv").read_text(encoding="utf-8").splitlines()
    header, rows = lines[:5], [line.split("\t") for line in lines[5:]]
    assert header == ["#separator:tab", "#html:true", "#guid column:1", "#deck column:2", "#tags column:5"]
    assert len(rows) == len(QUESTIONS) and {len(row) for row in rows} == {5} and f"{len(rows)} cards" in result.output
    assert [row[0] for row in rows] == [f"folovllm-{id_}" for id_ in QUESTIONS]
    assert "{" not in next(row for row in rows if row[0] == "folovllm-m3-kv-bytes")[2]


class FakeGenanki(ModuleType):
    """The part of genanki that we call; records what it is given."""

    def __init__(self) -> None:
        super().__init__("genanki")
        self.decks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        makers = {
            "Model": lambda id_, name, **fields: SimpleNamespace(id=id_),
            "Note": lambda model, fields, guid, tags: SimpleNamespace(fields=fields, guid=guid, tags=tags),
            "guid_for": lambda *values: "|".join(values),
            "Package": lambda decks: SimpleNamespace(write_to_file=lambda file: self.decks.extend(decks)),
            "Deck": FakeDeck,
        }
        return makers[name] if name in makers else super().__getattribute__(name)


class FakeDeck:
    def __init__(self, id_: int, name: str) -> None:
        self.id, self.name, self.notes = id_, name, list[Any]()

    def add_note(self, note: Any) -> None:
        self.notes.append(note)


def test_anki_cards_keep_their_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second import must update the cards: the ids depend on nothing but the question's id and the chapter."""
    module = FakeGenanki()
    monkeypatch.setitem(sys.modules, "genanki", module)
    cards.write_anki(QUESTIONS.values(), Path("x.apkg"), "en")
    notes = {note.fields[2]: note for deck in module.decks for note in deck.notes}
    assert set(notes) == set(QUESTIONS)
    assert notes["m3-kv-bytes"].guid == "folovllm|m3-kv-bytes" and "number" in notes["m3-kv-bytes"].tags
    assert {deck.name: deck.id for deck in module.decks}["FoloVLLM::m3"] == cards.stable_id("FoloVLLM::m3") == 173903709
    assert all(" " not in tag for note in notes.values() for tag in note.tags)


def test_a_real_anki_package(tmp_path: Path) -> None:
    genanki = pytest.importorskip("genanki")
    cards.write_anki(QUESTIONS.values(), tmp_path / "x.apkg", "en")
    assert (tmp_path / "x.apkg").stat().st_size > 10_000 and genanki


def test_without_genanki_the_error_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genanki", None)
    result = quiz("export", "--anki", "x.apkg")
    assert result.exit_code == 2 and "pip install 'folovllm[interview]'" in result.output and "--tsv" in result.output


# ---- pages


def test_the_pages_are_what_the_records_say() -> None:
    script = load_script("build_interview")
    stale = [path.name for path in script.stale_pages(script.pages(QUESTIONS))]
    assert not stale, f"{', '.join(stale)} out of date: run scripts/dev/build_interview.py"


def test_a_changed_record_makes_its_page_stale() -> None:
    script = load_script("build_interview")
    changed = QUESTIONS | {EXPLAIN.id: dataclasses.replace(EXPLAIN, trap={"en": "Another trap."})}
    assert [path.name for path in script.stale_pages(script.pages(changed))] == ["m3.md"]
    wanted = script.pages(QUESTIONS)
    del wanted[script.DOCS / "interview" / "m3.md"]  # no chapter asks for the page any more
    assert [path.name for path in script.stale_pages(wanted)] == ["m3.md"]


def test_a_file_of_answers_that_was_damaged_loses_only_its_bad_lines(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 and a time without a zone ended the quiz."""
    file = tmp_path / "quiz.jsonl"
    good = b'{"id": "%s", "passed": true, "at": "2020-01-01T00:00:00"}\n' % EXPLAIN.id.encode()
    file.write_bytes(b'\xff\xfe\n[1]\n{"at": 5}\n' + good)
    boxes = Boxes(file)
    assert boxes.num_unreadable == 3 and boxes.box == {EXPLAIN.id: 1}
    assert boxes.due_at(EXPLAIN.id) < datetime.now(UTC)


def test_answers_that_cannot_be_kept_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").write_text("a file in the place of the folder")
    for args in (["--n", "1", "--kind", "number"], ["--mock", "45"]):
        result = CliRunner().invoke(app, ["quiz", *args], input="1\n" * 9)
        assert result.exit_code == 2 and "error: cannot write work" in result.output
