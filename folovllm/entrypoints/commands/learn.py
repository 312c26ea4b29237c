"""`folovllm learn`: exercises, with one group of commands per milestone.

Milestone: M0. vLLM counterpart: none. The work is done in folovllm/learn, without torch; the lists are in
learn_progress.py.

    folovllm learn                 where am I, what next
    folovllm learn m3              goals and exercises of a milestone; creates work/m3/*.py
    folovllm learn m3 check ...    one function below per verb, in `milestone_app`
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from folovllm.entrypoints.commands import learn_progress as progress
from folovllm.entrypoints.commands.learn_bench import show_bench
from folovllm.entrypoints.commands.learn_case import case
from folovllm.entrypoints.commands.learn_race import race
from folovllm.learn import ask, workspace
from folovllm.learn.exercise import ALL_PARTS, Exercise, find_exercises, get_exercise
from folovllm.learn.grade import OK, Result
from folovllm.learn.mine import write_engine
from folovllm.learn.record import read_record
from folovllm.learn.story import heading, story, wrapped
from folovllm.learn.worker import grade_in_worker
from folovllm.milestones import LADDER, RUNG_IDS, Rung, get_rung

EXIT_FAILED = 1  # a check failed, or nothing could be checked
WATCH_SECONDS = 0.3

HELP = """{title}: {adds}.

\b
  folovllm learn {id}                    goals and exercises; creates work/{id}/*.py, overwrites nothing
  folovllm learn {id} check              check all that you have begun
  folovllm learn {id} check EXERCISE     check one; then hint, predict, solution or reset EXERCISE
  folovllm learn {id} bench              this milestone beside the one before it, in simulated time
"""


class LearnGroup(TyperGroup):
    """Refuses a name that is neither a command nor a milestone with the milestones there are."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            if len(args[0]) <= 3:  # "M3", "m42", "3"
                get_rung(args[0])
            others = ", ".join(name for name in self.commands if name not in RUNG_IDS)
            raise ValueError(f"unknown command {args[0]!r}; write a milestone (folovllm learn m3) or one of {others}")
        return super().resolve_command(ctx, args)


learn_app = typer.Typer(cls=LearnGroup, invoke_without_command=True)

NameArgument = Annotated[str, typer.Argument(metavar="EXERCISE", help="E.g. block_pool.")]
OptionalName = Annotated[str | None, typer.Argument(metavar="[EXERCISE]", help="E.g. block_pool; default: all.")]
TrackOption = Annotated[str, typer.Option("--track", metavar="all|fast", help="fast: one exercise per milestone.")]


@learn_app.callback()
def learn(
    ctx: typer.Context,
    work: Annotated[Path | None, typer.Option("--work", metavar="DIR", help="Where your files are.")] = None,
    track: TrackOption = "all",
) -> None:
    """Write parts of the engine yourself, and have them checked by the engine's own rules.

    \b
      folovllm learn                        where you are, and what comes next
      folovllm learn m3                     goals and exercises; creates the files
      folovllm learn m3 read block_pool     what to write, with an example
      folovllm learn m3 predict block_pool  first say what the engine does
      folovllm learn m3 check block_pool    check your file; --watch: at every save
      folovllm learn m3 hint block_pool     a hint; the next call gives the next one
      folovllm learn case                   real faults to find, test for and mend
      folovllm learn m2 race                your scheduling policy against others
      folovllm learn status                 all exercises, one per line
      folovllm chat --mine                  talk to an engine made of your parts
    """
    if track not in progress.TRACKS:
        raise ValueError(f"--track must be one of {', '.join(progress.TRACKS)}; got {track!r}")
    ctx.obj = workspace.find_work(work)
    if ctx.invoked_subcommand is None:
        progress.show_next(read_record(ctx.obj), track)


def milestone_app(rung: Rung) -> typer.Typer:
    """`folovllm learn m3 ...`: the verbs of one milestone."""
    app = typer.Typer(invoke_without_command=True)

    @app.callback(help=HELP.format(id=rung.id, title=rung.title, adds=rung.adds))
    def goals(ctx: typer.Context) -> None:
        if ctx.invoked_subcommand is None:
            new = workspace.create_files(rung.id, ctx.obj)
            progress.show_milestone(rung, read_record(ctx.obj), new)

    @app.command("read")
    def read(exercise: NameArgument) -> None:
        """Show what to write, with an example in numbers."""
        text = (get_exercise(rung.id, exercise).folder / "README.md").read_text(encoding="utf-8").rstrip()
        typer.echo(text.replace("](../../../../", f"]({progress.pages_base()}"))

    @app.command("check")
    def check(
        ctx: typer.Context,
        exercise: OptionalName = None,
        watch: Annotated[bool, typer.Option("--watch", help="Check again whenever the file is saved.")] = False,
        why: Annotated[bool, typer.Option("--why", help="Also show the source of the check that failed.")] = False,
    ) -> None:
        """Check what you have written. Exit code 1 if something is missing or wrong.

        \b
          folovllm learn m3 check
          folovllm learn m3 check block_pool --watch
        """
        if watch:
            if exercise is None:
                raise ValueError(f"--watch needs the exercise: folovllm learn {rung.id} check EXERCISE --watch")
            watch_one(get_exercise(rung.id, exercise), ctx.obj, why)
        elif exercise is not None:
            raise typer.Exit(0 if check_one(get_exercise(rung.id, exercise), ctx.obj, why) else EXIT_FAILED)
        else:
            raise typer.Exit(0 if check_all(rung.id, ctx.obj, why) else EXIT_FAILED)

    @app.command("hint")
    def hint(ctx: typer.Context, exercise: NameArgument) -> None:
        """Give the next hint of three: a question, the data structure, the step that people miss."""
        chosen = get_exercise(rung.id, exercise)
        layer, text = ask.next_hint(chosen, read_record(ctx.obj))
        typer.echo(wrapped(f"Hint {layer} of {len(chosen.hints)}: {text}"))
        if layer == len(chosen.hints):
            typer.echo(f"That was the last one. The engine's own source: {chosen.command('solution')}")

    @app.command("predict")
    def predict(
        ctx: typer.Context,
        exercise: NameArgument,
        answer: Annotated[str | None, typer.Argument(help="Your answer; asked for if it is not given.")] = None,
    ) -> None:
        """Say what the engine will do, before you write it; the engine then computes the answer.

        \b
          folovllm learn m3 predict block_pool "blocks 1 and 2"
        """
        chosen = get_exercise(rung.id, exercise)
        typer.echo(wrapped(chosen.predict))
        answer = answer or _asked("Your prediction")
        is_right, computed = ask.check_prediction(chosen, read_record(ctx.obj), answer)
        verdict = "Right." if is_right else f"You said {answer!r}. Find out why it differs before you write the code."
        typer.echo(wrapped(f"The engine: {computed}\n{verdict}"))

    @app.command("solution")
    def solution(ctx: typer.Context, exercise: NameArgument) -> None:
        """Show the engine's own source of your methods, and how yours differs. Before you pass, this counts as help."""
        chosen = get_exercise(rung.id, exercise)
        for text in ask.solution(chosen, read_record(ctx.obj), chosen.work_file(ctx.obj)):
            typer.echo(text)

    @app.command("reset")
    def reset(ctx: typer.Context, exercise: NameArgument) -> None:
        """Start again from the skeleton; your file is kept beside it."""
        chosen = get_exercise(rung.id, exercise)
        backup = workspace.reset(chosen, read_record(ctx.obj))
        typer.echo(f"{chosen.work_file(ctx.obj)} is the skeleton again; your file is now {backup}")

    @app.command("bench")
    def bench() -> None:
        """Compare this milestone with the one before it in simulated time, and test what it claims. No GPU, no weights.

        \b
          folovllm learn m3 bench
        """
        raise typer.Exit(0 if show_bench(rung) else EXIT_FAILED)

    if rung.id == "m2":
        app.command("race")(race)
    return app


# A command of one milestone (such as a race of schedulers in m2) goes into `milestone_app`; one of none goes here.
for _rung in LADDER:
    learn_app.add_typer(milestone_app(_rung), name=_rung.id)
learn_app.command("status")(progress.status)
learn_app.command("log")(progress.log)
learn_app.command("report")(progress.report)
learn_app.command("diff")(progress.diff)
learn_app.command("case")(case)


# ---- checking


def check_all(milestone: str, work: Path, why: bool) -> bool:
    """Checks all exercises of a milestone that have been begun. Returns whether all of the milestone pass."""
    exercises = find_exercises(milestone)
    begun = [e for e in exercises if e.part == ALL_PARTS or e.work_file(work).is_file()]
    if not begun:
        raise ValueError(f"there are no files of {milestone} in {work}/; `folovllm learn {milestone}` creates them")
    passed = []
    for exercise in exercises:
        if exercise not in begun or workspace.is_untouched(exercise, work):
            typer.echo(f"{exercise.id}   not begun")
            passed.append(False)
        else:
            passed.append(check_one(exercise, work, why))
    return all(passed)


def check_one(exercise: Exercise, work: Path, why: bool) -> bool:
    """Grades one exercise, prints the story and records the results. Returns whether it passed."""
    path = write_engine(exercise, work) if exercise.part == ALL_PARTS else workspace.work_file(exercise, work)
    record = read_record(work)
    typer.secho(heading(exercise, path), bold=True)
    results: list[Result] = []
    for line in story(exercise, path, _collected(grade_in_worker(exercise, path), results), why):
        typer.echo(line)
    record.add_results(exercise, path, results)
    passed = bool(results) and all(result.status == OK for result in results)
    if passed:
        progress.show_passed(exercise, record)
    return passed


def _collected(results: Iterator[Result], into: list[Result]) -> Iterator[Result]:
    for result in results:
        into.append(result)
        yield result


def watch_one(exercise: Exercise, work: Path, why: bool) -> None:
    """Checks at every save, until Ctrl-C."""
    path, seen = workspace.work_file(exercise, work), None
    while True:
        content = path.read_bytes() if path.is_file() else None  # None: an editor is replacing the file
        if content is not None and content != seen:
            seen = content
            check_one(exercise, work, why)
            typer.secho(f"watching {path}; Ctrl-C ends", dim=True)
        time.sleep(WATCH_SECONDS)


def _asked(question: str) -> str:
    """What the learner types, or the first line of what is piped in."""
    if sys.stdin.isatty():
        answer: str = typer.prompt(question)
        return answer
    answer = sys.stdin.readline().strip()
    if not answer:
        raise ValueError('no answer: give it as an argument after the name of the exercise, e.g. "1, 2"')
    return answer
