"""`folovllm quiz`: asks interview questions, holds a mock interview, and exports flash cards (milestone M0).

vLLM counterpart: none. The work is done in folovllm/learn, without torch.
"""

import random
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from folovllm.learn.cards import write_anki, write_tsv
from folovllm.learn.files import friendly_os_errors
from folovllm.learn.mock import mock_report, plan_mock
from folovllm.learn.questions import LANGS, Question, load_questions
from folovllm.learn.quiz import Boxes, Graded, Quiz, QuizEnded, in_order, select
from folovllm.utils import unknown_name_message

ANSWERS = Path("work/quiz.jsonl")
EXIT_INTERRUPTED = 130


def quiz(
    chapter: Annotated[
        str | None,
        typer.Argument(
            metavar="[CHAPTER|ID|export]", help="m0 to m10, design or drill, or the id of one question; default: all."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only number, predict, explain, code, debug or design questions.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many questions.")] = 10,
    due: Annotated[bool, typer.Option("--due", help="Only questions that are new or due again.")] = False,
    lang: Annotated[str, typer.Option(help="en or zh; what has no Chinese text comes in English.")] = "en",
    seed: Annotated[int | None, typer.Option(help="Draw the same questions and numbers again.")] = None,
    mock: Annotated[int | None, typer.Option(metavar="MINUTES", help="A mock interview, e.g. 45.")] = None,
    anki: Annotated[Path | None, typer.Option(help="With export: write an Anki package.")] = None,
    tsv: Annotated[Path | None, typer.Option(help="With export: write tab-separated values.")] = None,
) -> None:
    """Practise for interviews. Answers are kept in work/quiz.jsonl; what you missed comes again sooner.

    \b
      folovllm quiz m3                            ten questions on M3
      folovllm quiz m3-kv-bytes                   this question
      folovllm quiz --kind number --n 5           values to compute, with new numbers each time
      folovllm quiz --due                         what is to be repeated today
      folovllm quiz --mock 45                     a mock interview with a report
      folovllm quiz export --anki folovllm.apkg   flash cards
    """
    if lang not in LANGS:
        raise ValueError(unknown_name_message("language", lang, LANGS))
    questions = list(load_questions().values())
    if chapter == "export":
        if kind is not None or due or mock is not None:
            raise ValueError("export writes all questions; leave --kind, --due and --mock out")
        _export(questions, anki, tsv, lang)
        return
    if anki is not None or tsv is not None:
        raise ValueError("cards are written by `folovllm quiz export --anki FILE` or `--tsv FILE`; add the word export")
    chosen = select(questions, chapter, kind)
    boxes, rng = Boxes(ANSWERS), random.Random(seed)
    if boxes.num_unreadable:
        typer.echo(f"{ANSWERS}: {boxes.num_unreadable} lines cannot be read and do not count", err=True)
    session = Quiz(typer.echo, _ask, boxes, rng, lang)
    if mock is not None:
        if due:
            raise ValueError("a mock interview draws from all questions; leave --due or --mock out")
        _mock(session, plan_mock(chosen, mock, rng))
        return
    now = datetime.now().astimezone()
    if due:
        later = min(boxes.due_at(question.id) for question in chosen)
        chosen = [question for question in chosen if boxes.due_at(question.id) <= now]
        if not chosen:
            typer.echo(f"nothing is due; the next question is on {later.astimezone():%Y-%m-%d %H:%M}")
            return
    answers: list[Graded] = []
    interrupted = _collect(session, in_order(chosen, boxes, rng)[:n], answers)
    _summary(answers)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _ask(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None


def _collect(session: Quiz, questions: list[Question], answers: list[Graded], minutes: list[int] | None = None) -> bool:
    """Asks until the questions or the input end. Returns True if Ctrl-C ended it."""
    try:
        for graded in session.run(questions, minutes or ()):
            answers.append(graded)  # one by one: what was answered before Ctrl-C counts
    except QuizEnded:
        typer.echo()
    except KeyboardInterrupt:
        typer.echo()
        return True
    return False


def _summary(answers: list[Graded]) -> None:
    passed = sum(graded.passed for graded in answers)
    typer.echo(f"{passed} of {len(answers)} passed; kept in {ANSWERS}")
    if missed := [graded.question.id for graded in answers if not graded.passed]:
        typer.echo(f"again tomorrow: {', '.join(missed)}")


def _mock(session: Quiz, plan: list[tuple[Question, int]]) -> None:
    """Holds the interview and writes its report, also if it ends early."""
    typer.echo("The plan (keep the time yourself; the report compares it):")
    for question, minutes in plan:
        typer.echo(f"  {minutes:2} min  {question.kind}")
    answers: list[Graded] = []
    interrupted = _collect(session, [q for q, _ in plan], answers, [minutes for _, minutes in plan])
    if not answers:
        typer.echo("\nnothing was answered, so there is no report")
        raise typer.Exit(EXIT_INTERRUPTED if interrupted else 0)
    now = datetime.now().astimezone()
    report = mock_report(plan, answers, now)
    file = ANSWERS.parent / f"mock-{now:%Y%m%d-%H%M%S}.md"
    with friendly_os_errors():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(report, encoding="utf-8")
    typer.echo(f"\n{report}\nwritten to {file}")
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _export(questions: list[Question], anki: Path | None, tsv: Path | None, lang: str) -> None:
    if anki is None and tsv is None:
        raise ValueError("where to? add --anki FILE.apkg or --tsv FILE.tsv")
    for file, write in ((anki, write_anki), (tsv, write_tsv)):
        if file is not None:
            try:
                write(questions, file, lang)
            except OSError as error:
                raise ValueError(f"cannot write {file}: {error.strerror or error}; choose another file") from None
            typer.echo(f"wrote {len(questions)} cards to {file}")
