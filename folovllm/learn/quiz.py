"""The quiz: chooses questions, asks them, grades the answers and remembers them.

Milestone: M0. vLLM counterpart: none.

Every answer is one line appended to work/quiz.jsonl the moment it is graded, so that an interrupted quiz loses nothing.
Which question is due follows from these lines alone (Leitner boxes): an answer that passes moves its question one box
up, and one that fails moves it back to the first. A question of box b comes again after INTERVALS[b] days.
"""

import random
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from folovllm.learn.files import append_record, read_records
from folovllm.learn.questions import KINDS, LEVELS, Question
from folovllm.utils import unknown_name_message

INTERVALS = (0, 1, 2, 4, 8, 16)  # days, by box; box 0: never asked
WIDTH = 100
GIVE_UP = ("?", "skip")
END = ("q", "quit", "exit")


class QuizEnded(Exception):
    """The input ended, or the learner asked for the end. What was answered is kept."""


@dataclass(frozen=True)
class Graded:
    """One answer. `missed` are the points of the rubric that it lacked."""

    question: Question
    passed: bool
    score: float  # 0..1
    missed: tuple[str, ...]
    seconds: float


# ---- what was answered before


class Boxes:
    """The Leitner boxes, computed from the file of answers."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.box: dict[str, int] = {}
        self.asked: dict[str, datetime] = {}
        entries, self.num_unreadable = read_records(file)
        for entry in entries:
            try:
                self._count(entry["id"], entry["passed"], datetime.fromisoformat(entry["at"]).astimezone(UTC))
            except (ValueError, TypeError, KeyError):  # a line cut short by a crash, or edited by hand
                self.num_unreadable += 1

    def _count(self, id_: str, passed: bool, at: datetime) -> None:
        self.box[id_] = min(self.box.get(id_, 0) + 1, len(INTERVALS) - 1) if passed else 1
        self.asked[id_] = at

    def due_at(self, id_: str) -> datetime:
        asked = self.asked.get(id_)
        return datetime.min.replace(tzinfo=UTC) if asked is None else asked + timedelta(days=INTERVALS[self.box[id_]])

    def keep(self, graded: Graded) -> None:
        """Appends one answer to the file."""
        at = datetime.now(UTC)
        entry = {
            "at": at.isoformat(timespec="seconds"),
            "id": graded.question.id,
            "passed": graded.passed,
            "score": round(graded.score, 2),
            "seconds": round(graded.seconds),
        }
        append_record(self.file, entry)
        self._count(graded.question.id, graded.passed, at)


def select(questions: Iterable[Question], chapter: str | None, kind: str | None) -> list[Question]:
    """Returns the questions of a kind and a chapter, or the one with that id. Raises ValueError if there are none."""
    questions = list(questions)
    if chapter is not None:
        chapter = chapter.lower()
        known = list(dict.fromkeys(question.chapter for question in questions))
        if "-" in chapter:
            known = [question.id for question in questions]
        if chapter not in known:
            raise ValueError(unknown_name_message("question" if "-" in chapter else "chapter", chapter, known))
        questions = [question for question in questions if chapter in (question.chapter, question.id)]
    if kind is not None and kind not in KINDS:
        raise ValueError(unknown_name_message("kind", kind, KINDS))
    chosen = [question for question in questions if kind in (None, question.kind)]
    if not chosen:
        kinds = ", ".join(sorted({question.kind for question in questions}))
        raise ValueError(f"{chapter} has no questions of the kind {kind}; it has: {kinds}")
    return chosen


def in_order(questions: Sequence[Question], boxes: Boxes, rng: random.Random) -> list[Question]:
    """Returns the due questions first, and those of a low box before those of a high one, else at random.

    Among those that were never asked, short and basic ones come first, so a newcomer does not begin with the deepest.
    """
    shuffled = rng.sample(list(questions), len(questions))
    now = datetime.now(UTC)

    def rank(question: Question) -> tuple[bool, int, int]:
        box = boxes.box.get(question.id, 0)
        return boxes.due_at(question.id) > now, box, 0 if box else LEVELS.index(question.level)

    return sorted(shuffled, key=rank)


# ---- one question


class Quiz:
    """Asks questions through two functions: `say` shows a text, `ask` returns a line, or None when the input ends."""

    def __init__(
        self, say: Callable[[str], None], ask: Callable[[str], str | None], boxes: Boxes, rng: random.Random, lang: str
    ) -> None:
        self._say, self._ask_line, self.boxes, self.rng, self.lang = say, ask, boxes, rng, lang

    def run(self, questions: Sequence[Question], minutes: Sequence[int] = ()) -> Iterator[Graded]:
        """Asks one question after the other and yields each answer when it is kept. A mock interview has `minutes`."""
        self._say("Type ? to see the answer, q to end; what you have answered is kept.")
        for number, question in enumerate(questions, 1):
            time_limit = f" ({minutes[number - 1]} min)" if minutes else ""
            graded = self.pose(question, f"{number}/{len(questions)}{time_limit}")
            self.boxes.keep(graded)
            yield graded

    def pose(self, question: Question, heading: str) -> Graded:
        values = question.draw_values(self.rng)
        start = time.monotonic()
        self._say(f"\n{heading}  {question.id}  ({question.kind}, {question.level})\n")
        self._say(wrapped(question.text(question.q, values, self.lang)))
        grade = self._grade_value if question.kind in ("number", "predict") else self._grade_rubric
        passed, score, missed = grade(question, values)
        return Graded(question, passed, score, missed, time.monotonic() - start)

    def _line(self, prompt: str) -> str:
        line = self._ask_line(prompt)
        if line is None or line.strip().lower() in END:
            raise QuizEnded
        return line.strip()

    def _grade_value(self, question: Question, values: dict[str, Any]) -> tuple[bool, float, tuple[str, ...]]:
        """Compares a typed value with the computed one."""
        right = question.answer(values)
        is_number = question.kind == "number"
        if is_number:
            given = self._value(question.unit)
            passed = given is not None and abs(given - right) <= question.tolerance * abs(right)
            shown = f"{right:,.4g}" if isinstance(right, float) else f"{right:,}"
            off = "" if given is None or passed else f" You said {given:,.4g}, which is {given / right:.3g} times that."
            self._say(f"{'Right' if passed else 'No'}: {shown} {question.unit}.{off}")
        else:
            passed = same_answer(self._words(), right)
            self._say(f"{'Right' if passed else 'No'}: {right}")
        self._show_answer(question, values)
        points = [question.text(point.text, values, self.lang) for point in question.points]
        return passed, float(passed), () if passed else tuple(points)

    def _value(self, unit: str) -> float | None:
        while True:
            text = self._line(f"your answer in {unit}: ")
            if text in GIVE_UP:
                return None
            if (value := parse_value(text, unit)) is not None:
                return value
            self._say(f"{text!r} is not a number; write one like 350, 114,688, 112 KiB or 1.5e9")

    def _words(self) -> str:
        while not (text := self._line("your answer: ")):
            pass  # Enter alone is no answer
        return text

    def _grade_rubric(self, question: Question, values: dict[str, Any]) -> tuple[bool, float, tuple[str, ...]]:
        """Shows a good answer and lets the learner mark the points that their own one had."""
        given = self._line("\nAnswer aloud, or in a line here; then press Enter: ")
        self._show_answer(question, values)
        points = [question.text(point.text, values, self.lang) for point in question.points]
        for number, point in enumerate(question.points, 1):
            self._say(wrapped(f"  {number}. {points[number - 1]}{' (a must)' if point.must else ''}", "     "))
        met = set() if given in GIVE_UP else self._marks(len(points))
        passed = all(number in met for number, point in enumerate(question.points, 1) if point.must)
        missed = tuple(text for number, text in enumerate(points, 1) if number not in met)
        return passed, len(met) / len(points), missed

    def _marks(self, num_points: int) -> set[int]:
        while True:
            text = self._line("Which of these points did you make? (numbers, all or none): ").lower()
            if text in ("all", "none", *GIVE_UP):
                return set(range(1, num_points + 1)) if text == "all" else set()
            marks = re.findall(r"\d+", text)
            if re.fullmatch(r"[\d\s,]+", text) and all(1 <= int(mark) <= num_points for mark in marks):
                return {int(mark) for mark in marks}
            self._say(
                f"{text or 'Enter'!r} names no points; write numbers from 1 to {num_points} like '1 3', all or none"
            )

    def _show_answer(self, question: Question, values: dict[str, Any]) -> None:
        self._say("\n" + wrapped(question.text(question.say30, values, self.lang)))
        if question.say3min:
            self._say("\nIn three minutes:\n" + wrapped(question.text(question.say3min, values, self.lang)))
        self._say("\n" + wrapped("Trap: " + question.text(question.trap, values, self.lang)))
        self._say(wrapped(f"Read: {', '.join(question.code)}"))
        if question.follow:
            self._say(wrapped(f"Follow-up questions (folovllm quiz ID asks one): {', '.join(question.follow)}"))
        self._say("")


def wrapped(text: str, indent: str = "") -> str:
    """Returns `text` in lines of at most WIDTH characters; empty lines separate paragraphs, as in the file."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(textwrap.fill(p, WIDTH, subsequent_indent=indent, replace_whitespace=True) for p in paragraphs)


_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_SCALES |= {f"{prefix}i": 1024.0**power for power, prefix in enumerate("kmgt", 1)}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_value(text: str, unit: str = "") -> float | None:
    """Returns the number in "114,688", "112 KiB", "~3.2 GB", "1.5e9" or "7 ms" in `unit`, or None if there is none.

    A number without a unit is in `unit`. Bytes, FLOP, tokens and times are converted: "16 GB" is 16 if the question
    asks for GB, and 16e9 if it asks for bytes. Any other word behind the number is taken as the question's own unit.
    """
    number = r"([-+]?(?:[\d,_]*\.?\d+|\d[\d,_]*\.)(?:e[-+]?\d+)?)"
    match = re.fullmatch(rf"~?\s*{number}\s*([a-z%/ ]*)", text.strip().lower())
    if match is None:
        return None
    value, given, wanted = float(match[1].replace(",", "").replace("_", "")), match[2].strip(), unit.lower()
    if given in ("", wanted):
        return value
    if given in _TIMES and wanted in _TIMES:
        return value * _TIMES[given] / _TIMES[wanted]
    return value * _scale(given) / _scale(wanted)


def _scale(unit: str) -> float:
    """Returns 1e9 for "gb", "gflop/s" or "g", 1024 for "kib", and 1 for a unit without a prefix."""
    match = re.fullmatch(r"([kmgtp]?i?)(?:b|bytes?|flops?|flop/s|b/s|bytes/s|tokens?)?", unit)
    return _SCALES.get(match[1], 1.0) if match else 1.0


def same_answer(given: str, right: Any) -> bool:
    """Whether two answers have the same words and numbers in the same order, whatever stands between them."""
    given_words, right_words = (re.findall(r"\w+", str(text).lower()) for text in (given, right))
    return given_words == right_words
