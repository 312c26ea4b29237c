"""The mock interview: its plan and its report.

Milestone: M0. vLLM counterpart: none.
"""

import random
from collections.abc import Callable, Sequence
from datetime import datetime

from folovllm.learn.questions import Question
from folovllm.learn.quiz import Graded

# The parts of an interview with their shares of the time, and which questions fit a part.
PARTS = (("screen", 4), ("explain", 9), ("explain", 9), ("number", 4), ("debug", 7), ("design", 12))
MIN_MINUTES = 20
_FITS: dict[str, Callable[[Question], bool]] = {
    "screen": lambda q: q.level == "screen" and q.kind not in ("number", "design"),
    "explain": lambda q: q.kind == "explain" and q.level != "screen",
    "number": lambda q: q.kind == "number",
    "debug": lambda q: q.kind in ("debug", "code"),
    "design": lambda q: q.kind == "design",
}


def plan_mock(questions: Sequence[Question], minutes: int, rng: random.Random) -> list[tuple[Question, int]]:
    """Returns the questions of a mock interview with their minutes, which add up to `minutes`."""
    total = sum(share for _, share in PARTS)
    if minutes < MIN_MINUTES:
        raise ValueError(f"{minutes} minutes are too few for {len(PARTS)} questions; give it {MIN_MINUTES} or more")
    plan: list[tuple[Question, int]] = []
    spent = 0
    for i, (part, _) in enumerate(PARTS):
        chosen = {question.id for question, _ in plan}
        fitting = [q for q in questions if _FITS[part](q) and q.id not in chosen]
        if not fitting:
            raise ValueError(f"there is no question left for the part {part!r} of the interview; leave the chapter out")
        until = round(minutes * sum(share for _, share in PARTS[: i + 1]) / total)
        plan.append((rng.choice(fitting), until - spent))
        spent = until
    return plan


def mock_report(plan: Sequence[tuple[Question, int]], answers: Sequence[Graded], when: datetime) -> str:
    """Returns the report of a mock interview in Markdown: each answer, what it lacked, and what to read."""
    by_id = {graded.question.id: graded for graded in answers}
    total = sum(graded.score for graded in answers) / len(plan)
    verdict = "strong" if total >= 0.8 else "would pass" if total >= 0.6 else "not yet"
    lines = [
        f"# Mock interview, {when:%Y-%m-%d %H:%M}",
        "",
        f"{len(answers)} of {len(plan)} questions answered; score {100 * total:.0f} %: **{verdict}**.",
        "",
        "| question | kind | planned | used | score |",
        "|---|---|---|---|---|",
    ]
    for question, minutes in plan:
        g = by_id.get(question.id)
        result = "not asked | -" if g is None else f"{g.seconds / 60:.1f} min | {100 * g.score:.0f} %"
        lines.append(f"| {question.id} | {question.kind} | {minutes} min | {result} |")
    for graded in answers:
        if graded.missed:
            lines += ["", f"## {graded.question.id}: missed", "", *(f"- {point}" for point in graded.missed)]
            lines += ["", f"Read {', '.join(f'`{anchor}`' for anchor in graded.question.code)}."]
    return "\n".join(lines) + "\n"
