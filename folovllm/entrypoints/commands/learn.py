"""`folovllm learn`: exercises, one app per milestone, and what belongs to no milestone beside them.

Milestone: M0. vLLM counterpart: none. The work is done in folovllm/learn, without torch.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from folovllm.entrypoints.commands.learn_race import race
from folovllm.learn.exercise import Exercise, find_exercises, get_exercise
from folovllm.learn.grade import OK, Result
from folovllm.learn.record import read_record
from folovllm.learn.story import heading, story
from folovllm.learn.worker import grade_in_worker
from folovllm.milestones import LADDER, Rung

learn_app = typer.Typer(no_args_is_help=True, help="Write parts of the engine yourself, and have them checked.")
WORK = Path("work")

NameArgument = Annotated[str | None, typer.Argument(metavar="[EXERCISE]", help="E.g. block_pool; default: all.")]


def milestone_app(rung: Rung) -> typer.Typer:
    """`folovllm learn m3 ...`."""
    app = typer.Typer(invoke_without_command=True, help=f"{rung.title}: {rung.adds}.")

    @app.callback()
    def goals(ctx: typer.Context) -> None:
        if ctx.invoked_subcommand is None:
            begin(rung)

    @app.command("check")
    def check(
        exercise: NameArgument = None,
        why: Annotated[bool, typer.Option("--why", help="Also show the source of the check that failed.")] = False,
    ) -> None:
        """Check what you have written."""
        chosen = [get_exercise(rung.id, exercise)] if exercise else find_exercises(rung.id)
        passed = [check_one(e, why) for e in chosen if exercise or e.work_file(WORK).is_file()]
        raise typer.Exit(not (passed and all(passed)))

    if rung.id == "m2":
        app.command("race")(race)
    return app


for _rung in LADDER:
    learn_app.add_typer(milestone_app(_rung), name=_rung.id)


def begin(rung: Rung) -> None:
    """Creates the work files of a milestone; those that are there stay as they are."""
    for exercise in find_exercises(rung.id):
        path = exercise.work_file(WORK)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(exercise.skeleton, path)
        typer.echo(f"{exercise.name:20} {exercise.title:40} {path}")


def check_one(exercise: Exercise, why: bool) -> bool:
    """Grades one exercise and prints the story. Returns whether it passed."""
    path = exercise.work_file(WORK)
    if not path.is_file():
        raise ValueError(f"no file {path}; `folovllm learn {exercise.milestone}` creates it")
    typer.echo(heading(exercise, path))
    results: list[Result] = []

    def collected() -> Iterator[Result]:
        for result in grade_in_worker(exercise, path):
            results.append(result)
            yield result

    for line in story(exercise, path, collected(), why):
        typer.echo(line)
    read_record(WORK).add_results(exercise, path, results)
    return all(result.status == OK for result in results)
