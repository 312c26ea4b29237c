"""`folovllm learn case`: real faults to diagnose, to show in a test and to mend (folovllm/learn/cases.py).

Milestone: M0. vLLM counterpart: none.
"""

import textwrap
from typing import Annotated

import typer

from folovllm.entrypoints.commands.learn_progress import mark
from folovllm.learn import cases
from folovllm.learn.case_grade import answered, grade_case, question_of
from folovllm.learn.cases import GRADED, QUESTIONS, Case, find_cases, get_case
from folovllm.learn.grade import FAILED, NOT_WRITTEN, Result
from folovllm.learn.record import Record, read_record

EXIT_FAILED = 1
WIDTH = 110
VERBS = ("check", "hint", "lesson")
WHAT = {"step": "the first wrong step", "cause": "the root cause", "test": "your test", "fix": "your fix"}


def case(
    ctx: typer.Context,
    number: Annotated[int | None, typer.Argument(metavar="[N]", help="The case; without it, the list.")] = None,
    verb: Annotated[str | None, typer.Argument(metavar=f"[{'|'.join(VERBS)}]", help="Default: open it.")] = None,
) -> None:
    """Find real faults of public engines: name the first wrong step and the cause, write the test, mend the part.

    \b
      folovllm learn case              the list
      folovllm learn case 3            the report; creates work/cases/03_*
      folovllm learn case 3 check      grade the answer, the test and the fix
      folovllm learn case 3 hint       a hint; the next call gives the next one
      folovllm learn case 3 lesson     what there is to learn from it
    """
    record = read_record(ctx.obj)
    if number is None:
        show_list(record)
        return
    chosen = get_case(number)
    if verb is None:
        show_report(chosen, record)
    elif verb == "check":
        raise typer.Exit(0 if check(chosen, record) else EXIT_FAILED)
    elif verb == "hint":
        layer, text = cases.next_hint(chosen, record)
        typer.echo(_wrapped(f"Hint {layer} of {len(chosen.hints)}: {text}"))
        if layer == len(chosen.hints):
            typer.echo(f"That was the last one. The whole story: {chosen.command('lesson')}")
    elif verb == "lesson":
        text, sources = cases.lesson(chosen, record)
        typer.echo("\n".join([_wrapped(text), "Where it was reported:", *(f"  {source}" for source in sources)]))
    else:
        raise ValueError(f"unknown verb {verb!r}; write one of {', '.join(VERBS)}, or none to open the case")


def show_list(record: Record) -> None:
    for chosen in find_cases():
        now = cases.state(chosen, record)
        about = f"{chosen.number:2}  {chosen.title:58} {chosen.milestone} {chosen.minutes:3} min"
        typer.echo(f"{mark(now)} {about}  {now}")
    typer.secho("Open one: folovllm learn case 1", dim=True)


def show_report(chosen: Case, record: Record) -> None:
    """The report, the learner's files, and how to look at the trace."""
    new = cases.open_case(chosen, record)
    trace = chosen.file(record.work, "trace.jsonl")
    typer.secho(
        f"Case {chosen.number}: {chosen.title}   ({chosen.milestone}, about {chosen.minutes} minutes)", bold=True
    )
    typer.echo(f"\n{_wrapped(chosen.report)}\n")
    typer.echo("The run:")
    for line in cases.described(chosen):
        typer.echo(_wrapped(line, "  "))
    typer.echo("\nYour files:")
    for name, what in (
        ("trace.jsonl", "what the engine did"),
        ("answer.toml", "(a) the first wrong step, and (b) the root cause"),
        ("test.py", "(c) a test that fails because of the fault"),
        ("fix.py", f"(d) the part with the fault, {chosen.part}, to be mended"),
    ):
        path = chosen.file(record.work, name)
        typer.echo(f"  {path!s:32} {what}{' (new)' if path in new else ''}")
    typer.echo("\nLook at the trace:")
    typer.echo(f"  folovllm trace show {trace} --step 0    one step; --step 1 is the next one")
    typer.echo(f"  folovllm trace view {trace}             a page to step through")
    typer.echo(f"  folovllm trace lint {trace}             which rule is broken, if it is one of the trace's")
    typer.echo(f"\nThen: {chosen.command('check')}     Stuck: {chosen.command('hint')}")


def check(chosen: Case, record: Record) -> bool:
    """Grades the four, prints which are right, and records it. Returns whether all are."""
    missing = [name for name in GRADED if not chosen.file(record.work, name).is_file()]
    if missing:
        raise ValueError(
            f"no file {chosen.file(record.work, missing[0])}; `folovllm learn case {chosen.number}` creates it"
        )
    typer.secho(f"Case {chosen.number}: {chosen.title}", bold=True)
    results = list(grade_case(chosen, record.work))
    right = answered(results)
    for question in QUESTIONS:
        typer.echo(f" {question:6} {'right' if right[question] else 'not yet':8} {WHAT[question]}")
        of_question = [result for result in results if question_of(result) == question]
        if first := next((result for result in of_question if result.status in (FAILED, NOT_WRITTEN)), None):
            _show_failure(first)
        elif not of_question:
            typer.echo(_indented("Not checked: the process that runs your code had ended by then. See above."))
    cases.add_check(chosen, record, [question for question in QUESTIONS if right[question]])
    if all(right.values()):
        typer.secho(f"Solved. What there is to learn from it: {chosen.command('lesson')}", fg="green")
    else:
        typer.secho(f"Stuck? {chosen.command('hint')}", dim=True)
    return all(right.values())


def _show_failure(result: Result) -> None:
    if result.status == NOT_WRITTEN:
        typer.echo(_indented(f"To do: {result.message}."))
        return
    if result.doc and question_of(result) == "fix":
        typer.echo(_indented(f"{result.check}: {result.doc}"))
    for line in result.message.split("\n"):
        typer.echo(_indented(line))
    if result.where:
        typer.echo(_indented(f"In your file, {result.where}"))


def _wrapped(text: str, indent: str = "") -> str:
    text = " ".join(text.split())
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=2 * indent, break_on_hyphens=False)


def _indented(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="     ", subsequent_indent="     ", break_on_hyphens=False)
