"""The quiz: chooses questions, asks them, grades the answers and remembers them.

Milestone: M0. vLLM counterpart: none.

Every answer is one line appended to work/quiz.jsonl the moment it is graded, so that an interrupted quiz loses nothing.
Which question is due follows from these lines alone (Leitner boxes): an answer that passes moves its question one box
up, and one that fails moves it back to the first. A question of box b comes again after INTERVALS[b] days.
"""

import json
import random
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from folovllm.learn.questions import Question
from folovllm.utils import unknown_name_message

INTERVALS = (0, 1, 2, 4, 8, 16)  # days, by box; box 0: never asked
WIDTH = 100
GIVE_UP = ("?", "skip")


class QuizEnded(Exception):
    """The input ended. What was answered is kept."""


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
        self.num_unreadable = 0
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                entry = json.loads(line)
                self._count(entry["id"], entry["passed"], datetime.fromisoformat(entry["at"]))
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
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry) + "\n")
        self._count(graded.question.id, graded.passed, at)


def select(questions: Iterable[Question], chapter: str | None, kind: str | None) -> list[Question]:
    """Returns the questions of a chapter and a kind. Raises ValueError with what there is if there are none."""
    questions = list(questions)
    chapters = list(dict.fromkeys(question.chapter for question in questions))
    if chapter is not None and chapter not in chapters:
        raise ValueError(unknown_name_message("chapter", chapter, chapters))
    questions = [question for question in questions if chapter in (None, question.chapter)]
    kinds = sorted({question.kind for question in questions})
    if kind is not None and kind not in kinds:
        raise ValueError(f"{unknown_name_message('kind', kind, kinds)}; there is: {', '.join(kinds)}")
    return [question for question in questions if kind in (None, question.kind)]


def in_order(questions: Sequence[Question], boxes: Boxes, rng: random.Random) -> list[Question]:
    """Returns the questions with the due ones first, those of a low box before those of a high one, else at random."""
    shuffled = rng.sample(list(questions), len(questions))
    now = datetime.now(UTC)
    return sorted(shuffled, key=lambda q: (boxes.due_at(q.id) > now, boxes.box.get(q.id, 0)))


# ---- one question


class Quiz:
    """Asks questions through two functions: `say` shows a text, `ask` returns a line, or None when the input ends."""

    def __init__(
        self, say: Callable[[str], None], ask: Callable[[str], str | None], boxes: Boxes, rng: random.Random, lang: str
    ) -> None:
        self._say, self._ask_line, self.boxes, self.rng, self.lang = say, ask, boxes, rng, lang

    def run(self, questions: Sequence[Question], minutes: Sequence[int] = ()) -> Iterator[Graded]:
        """Asks one question after the other and yields each answer when it is kept. A mock interview has `minutes`."""
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
        if line is None:
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
            text = self._line(f"your answer in {unit}, like 1.5e9, 24 Gi or 350 (? to give up): ")
            if text in GIVE_UP:
                return None
            if (value := parse_value(text)) is not None:
                return value
            self._say(f"{text!r} is not a number; write one like 114688, 112 KiB or 1.5e9")

    def _words(self) -> str:
        while not (text := self._line("your answer (? to give up): ")):
            pass  # Enter alone is no answer
        return text

    def _grade_rubric(self, question: Question, values: dict[str, Any]) -> tuple[bool, float, tuple[str, ...]]:
        """Shows a good answer and lets the learner mark the points that their own one had."""
        self._line("\nAnswer aloud, or in a line here; then press Enter: ")
        self._show_answer(question, values)
        points = [question.text(point.text, values, self.lang) for point in question.points]
        for number, point in enumerate(question.points, 1):
            self._say(wrapped(f"  {number}. {points[number - 1]}{' (a must)' if point.must else ''}", "     "))
        met = self._marks(len(points))
        passed = all(number in met for number, point in enumerate(question.points, 1) if point.must)
        missed = tuple(text for number, text in enumerate(points, 1) if number not in met)
        return passed, len(met) / len(points), missed

    def _marks(self, num_points: int) -> set[int]:
        while True:
            text = self._line("Which of these points did you make? (numbers, all or none): ").lower()
            if text in ("all", "none", "", *GIVE_UP):
                return set(range(1, num_points + 1)) if text == "all" else set()
            marks = re.findall(r"\d+", text)
            if re.fullmatch(r"[\d\s,]+", text) and all(1 <= int(mark) <= num_points for mark in marks):
                return {int(mark) for mark in marks}
            self._say(f"{text!r} names no points; write numbers from 1 to {num_points} like '1 3', all or none")

    def _show_answer(self, question: Question, values: dict[str, Any]) -> None:
        self._say("\n" + wrapped(question.text(question.say30, values, self.lang)))
        if question.say3min:
            self._say("\nIn three minutes:\n" + wrapped(question.text(question.say3min, values, self.lang)))
        self._say("\nTrap: " + wrapped(question.text(question.trap, values, self.lang)))
        self._say(f"Read: {', '.join(question.code)}\n")


def wrapped(text: str, indent: str = "") -> str:
    """Returns `text` in lines of at most WIDTH characters; empty lines separate paragraphs, as in the file."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(textwrap.fill(p, WIDTH, subsequent_indent=indent, replace_whitespace=True) for p in paragraphs)


_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_SCALES |= {f"{prefix}i": 1024.0**power for power, prefix in enumerate("kmgt", 1)}


def parse_value(text: str) -> float | None:
    """Returns the number in "114,688", "112 KiB", "3.2 GB", "1.5e9" or "7 ms", or None if there is none.

    A prefix scales bytes, FLOP, tokens or a bare number. Other units, like the ms of "7 ms", are the question's own.
    """
    match = re.fullmatch(r"([-+]?[\d,_]*\.?\d+(?:e[-+]?\d+)?)\s*([a-z%/ ]*)", text.strip().lower())
    if match is None:
        return None
    unit = re.fullmatch(r"([kmgtp]?i?)(?:b|bytes?|flops?|flop/s|b/s|bytes/s|tokens?)?", match[2].strip())
    scale = _SCALES.get(unit[1], 1.0) if unit else 1.0
    return float(match[1].replace(",", "").replace("_", "")) * scale


def same_answer(given: str, right: Any) -> bool:
    """Whether two answers have the same words and numbers in the same order, whatever stands between them."""
    given_words, right_words = (re.findall(r"\w+", str(text).lower()) for text in (given, right))
    return given_words == right_words
