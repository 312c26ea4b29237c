"""`folovllm learn m2 race`: your scheduling policy against four others.

Milestone: M2. vLLM counterpart: none. The work is done in folovllm/learn/race.py, without torch.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from folovllm.learn.race import GPU, MODEL, OTHERS, RACE_SLO, Leaderboard, Policy, Run, begin, plot, policy_of, table
from folovllm.learn.race import race as run_race


def race(
    ctx: typer.Context,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE.py", help="Your policy. Default: work/m2/race.py.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Another seed makes other workloads of the same kinds.")] = 0,
    picture: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw the table.")] = None,
) -> None:
    """Let your scheduling policy race against four others on five workloads.

    \b
      folovllm learn m2 race                              creates work/m2/race.py the first time
      folovllm learn m2 race --file work/m2/preempt.py    a file with a scheduler or a queue
    """
    work: Path = ctx.obj or Path("work")  # what `folovllm learn --work` says
    path = file or work / "m2" / "race.py"
    if file is None and begin(path):
        typer.echo(f"created {path}: it admits in order of arrival. Change `rank` in it, and race again.\n")
    mine = policy_of(path)
    _show_rules(mine)
    runs = run_race(mine, seed, _show_progress)
    for line in table(runs):
        typer.echo(line)
    board = Leaderboard(work / ".race.jsonl")
    board.add(path, runs[mine.name], seed)
    _show_board(board, seed)
    if picture is not None:
        plot(runs, picture)
        typer.echo(f"\nwrote {picture}")


def _show_rules(mine: Policy) -> None:
    typer.echo("Goodput: requests per second that were served within the SLO (the limits that users accept).")
    typer.echo("Score: all requests served within it, divided by the time of all workloads together.")
    typer.echo(f"SLO: the first token after at most {RACE_SLO.ttft:g} s, no gap above {RACE_SLO.itl * 1e3:g} ms.")
    typer.echo(f"Simulated: {MODEL} on one {GPU}.\n")
    for policy in (mine, *OTHERS):
        typer.echo(f"  {policy.name:14} {policy.about}")
    typer.echo()


def _show_progress(run: Run) -> None:
    if sys.stderr.isatty():
        typer.secho(f"\r\033[K{run.policy.name} on {run.workload}", dim=True, err=True, nl=False)


def _show_board(board: Leaderboard, seed: int) -> None:
    if sys.stderr.isatty():
        typer.echo("\r\033[K", err=True, nl=False)
    typer.echo(f"\nYour best policies with seed {seed} ({board.path}):")
    for place, entry in enumerate(board.best(seed), start=1):
        typer.echo(
            f"  {place}. {entry['score']:.3f}  {entry['name']}, {entry['file']} {entry['hash']}, {entry['time']}"
        )
