"""What `folovllm learn` prints about progress: where you are, a milestone, status, log, report, and what a rung adds.

Milestone: M0. vLLM counterpart: none.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from folovllm.learn import cases
from folovllm.learn.exercise import ALL_PARTS, PACKAGE, Exercise, find_exercises, milestones_dir
from folovllm.learn.files import friendly_os_errors
from folovllm.learn.record import FILE, Named, Record, read_record
from folovllm.learn.story import wrapped
from folovllm.milestones import LADDER, Rung, fold, get_rung, rung_number

TRACKS = ("all", "fast")
MARKS = {
    "passed": "[x]",
    "solved": "[x]",  # a case
    "assisted": "[x]",
    "failing": "[-]",
    "changed": "[?]",
    "begun": "[ ]",
    "not begun": "[ ]",
}
LEGEND = "[x] passed   [?] changed since it was checked   [-] failing   [ ] to do"


def mark(state: str) -> str:
    """The box before an exercise or a case. E.g. "2 of 4" of the questions of a case are right: failing."""
    return MARKS.get(state, MARKS["failing"])


def show_next(record: Record, track: str = "all") -> None:
    """All exercises by milestone, and the next one with what to type."""
    exercises = [e for e in find_exercises() if track == "all" or e.fast]
    passed = [e for e in exercises if record.is_passed(e)]
    typer.secho(f"{len(passed)} of {len(exercises)} exercises passed", bold=True)
    for rung in LADDER:
        names = [f"{MARKS[record.state(e)]} {e.name}" for e in exercises if e.milestone == rung.id]
        if names:
            typer.echo(f" {rung.id}  {rung.title:20}  {'  '.join(names)}")
    typer.secho(LEGEND, dim=True)
    following = next((e for e in exercises if e not in passed), None)
    if following is None:
        typer.echo("\nAll done. Talk to your engine: folovllm chat --mine")
    else:
        typer.echo("\nNext:")
        _show_how_to_go_on(following, record)
    if found := cases.find_cases():
        num_solved = sum(mark(cases.state(case, record)) == "[x]" for case in found)
        typer.echo(f"\nFaults to find and to mend: {num_solved} of {len(found)} cases solved. folovllm learn case")
    _show_unreadable(record)


def _show_how_to_go_on(exercise: Exercise, record: Record) -> None:
    effort = f"about {exercise.minutes} minutes, difficulty {exercise.level} of 3"
    typer.echo(f"  {exercise.id}: {exercise.title} ({effort})")
    if record.state(exercise) == "not begun" and exercise.part != ALL_PARTS:
        typer.echo(f"  folovllm learn {exercise.milestone:<28} creates {exercise.work_file(record.work)}")
    typer.echo(f"  {exercise.command('read'):<43} what to write")
    typer.echo(f"  {exercise.command('predict'):<43} first say what the engine does")
    typer.echo(f"  {exercise.command('check'):<43} check it")


def show_milestone(rung: Rung, record: Record, new: list[Exercise]) -> None:
    """The goals of a milestone, its exercises, and where to begin."""
    typer.secho(f"{rung.id}: {rung.title}", bold=True)
    typer.echo(_goals(rung.id))
    exercises = find_exercises(rung.id)
    if not exercises:
        typer.echo(f"\n{rung.id} has no exercises.")
        return
    typer.echo("\nExercises:")
    for e in exercises:
        file = "" if e.part == ALL_PARTS else f"{e.work_file(record.work)}{' (new)' if e in new else ''}"
        typer.echo(f" {MARKS[record.state(e)]} {e.name:20} {e.title:36} {e.minutes:3} min  {file}")
    following = next((e for e in exercises if not record.is_passed(e)), None)
    if following is None:
        typer.echo(f"\nAll of {rung.id} passed. What comes next: folovllm learn")
        return
    typer.echo("\nBegin with:")
    _show_how_to_go_on(following, record)


def _goals(milestone: str) -> str:
    """The list of goals in the README of a milestone, and where its page is."""
    text = (milestones_dir() / milestone / "README.md").read_text(encoding="utf-8")
    found = re.search(r"\*\*Goals\.\*\*.*?(?=\n\n)", text, re.DOTALL)
    goals = found[0].replace("**Goals.** ", "").replace("**", "").replace("`", "") if found else ""
    entry = _manifest()[milestone]
    pages = ", then ".join(f"{pages_base()}{page}" for page in entry.get("read_first", [entry["learn"]]))
    return f"{goals}\nRead first: {pages}"


def _manifest() -> dict[str, Any]:
    path = milestones_dir() / "manifest.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def pages_base() -> str:
    """What stands before docs/learn/...: the folder of the clone, as seen from here, or else the public address."""
    root = PACKAGE.parent
    if not (root / "docs/learn").is_dir():
        return "https://github.com/folovllm/folovllm/blob/main/"
    return "" if root == Path.cwd() else f"{root}/"


def show_passed(exercise: Exercise, record: Record) -> None:
    """What follows an exercise that has just passed."""
    assisted = " (assisted: you have seen the solution)" if record.state(exercise) == "assisted" else ""
    typer.secho(wrapped(f"Passed{assisted}. Think about this: {exercise.after}"), fg="green")
    left = [e for e in find_exercises() if not record.is_passed(e)]
    here = exercise.milestone  # its other exercises come first, then those of later milestones, then what was left out
    following = min(
        left, key=lambda e: (e.milestone != here, rung_number(e.milestone) < rung_number(here)), default=None
    )
    if following is None:
        typer.echo("That was the last exercise. Talk to your engine: folovllm chat --mine")
    else:
        typer.echo(f"Next: {following.id}, {following.title}. folovllm learn {following.milestone}")


def _show_unreadable(record: Record) -> None:
    if record.unreadable:
        are = "line is" if record.unreadable == 1 else "lines are"
        typer.secho(f"{record.unreadable} {are} not readable in {record.work / FILE}, and left out", dim=True, err=True)


# ---- commands


def status(ctx: typer.Context) -> None:
    """List all exercises and cases: state, checks, hints, and whether the prediction was right."""
    record = read_record(ctx.obj)
    for of, state in _states(record):
        typer.echo(f" {mark(state)} {of.id:24} {state:10} {_counts(record, of)}")
    _show_unreadable(record)


def _states(record: Record) -> list[tuple[Exercise | cases.Case, str]]:
    """All exercises and cases, and the state of each."""
    return [
        *((exercise, record.state(exercise)) for exercise in find_exercises()),
        *((case, cases.state(case, record)) for case in cases.find_cases()),
    ]


def _counts(record: Record, exercise: Named) -> str:
    """E.g. "4 checks, 1 hint, prediction right, solution seen"."""
    words = []
    layers = {line.get("layer") for line in record.of(exercise, "hint")}  # the last one may be read again
    for number, word in ((len(record.of(exercise, "check")), "check"), (len(layers), "hint")):
        if number:
            words.append(f"{number} {word}{'s' if number > 1 else ''}")
    if predictions := record.of(exercise, "predict"):
        words.append("prediction right" if predictions[0].get("right") else "prediction wrong")
    seen = [f"{event} seen" for event in ("solution", "lesson") if record.of(exercise, event)]
    return ", ".join([*words, *seen])


def log(ctx: typer.Context) -> None:
    """List what you did, in order."""
    record = read_record(ctx.obj)
    for line in record.lines:
        typer.echo(f"{line.get('time', ''):19}  {line.get('exercise', '')!s:24}  {_described(line)}")
    if not record.lines:
        typer.echo("Nothing is recorded yet. Begin with: folovllm learn")
    _show_unreadable(record)


def _described(line: dict[str, object]) -> str:
    """E.g. "check: failed at property", "hint 2", "predict: '1, 2' (right)"."""
    event, levels, right = line.get("event"), line.get("levels"), line.get("right")
    if event == "check" and isinstance(levels, dict):
        bad = next(
            (f"{status} at {level}" for level, status in levels.items() if status != "ok"), "nothing was checked"
        )
        return "check: " + ("passed" if line.get("passed") else bad)
    if isinstance(right, list):  # of a case
        return f"check: {len(right)} of {len(cases.QUESTIONS)} right"
    if event == "hint":
        return f"hint {line.get('layer')}"
    if event == "predict":
        return f"predict: {line.get('answer')!r} ({'right' if line.get('right') else 'wrong'})"
    return str(event)


def report(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The file. Default: work/report.md.")] = None,
) -> None:
    """Write your progress as a Markdown file, e.g. to hand in.

    \b
      folovllm learn report -o report.md
    """
    record = read_record(ctx.obj)
    path = out or record.work / "report.md"
    with friendly_os_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_report(record), encoding="utf-8")
    typer.echo(f"wrote {path}")
    _show_unreadable(record)


def _report(record: Record) -> str:
    exercises = find_exercises()
    states = Counter(record.state(e) for e in exercises)
    done = f"Of {len(exercises)} exercises, {states['passed']} passed unaided, {states['assisted']} with help."
    lines = ["# FoloVLLM: my exercises", "", done]
    for rung in LADDER:
        of_rung = [e for e in exercises if e.milestone == rung.id]
        if of_rung:
            lines += _table(record, f"{rung.id}: {rung.title}", [(e, record.state(e)) for e in of_rung])
    if of_cases := [(case, cases.state(case, record)) for case in cases.find_cases()]:
        lines += _table(record, "Cases", of_cases)
    return "\n".join(lines) + "\n"


def _table(record: Record, title: str, states: Sequence[tuple[Exercise | cases.Case, str]]) -> list[str]:
    lines = ["", f"## {title}", "", "| | state | first passed | |", "|---|---|---|---|"]
    for of, state in states:
        first = next((line["time"] for line in record.of(of, "check") if line.get("passed")), "")
        lines.append(f"| {of.title} (`{of.id}`) | {state} | {first} | {_counts(record, of)} |")
    return lines


def diff(
    a: Annotated[str, typer.Argument(metavar="MILESTONE", help="E.g. m2.")],
    b: Annotated[str, typer.Argument(metavar="MILESTONE", help="E.g. m3.")],
) -> None:
    """Show what the second milestone adds to the first: engine arguments, parts, and the files to read.

    \b
      folovllm learn diff m2 m3
    """
    first, second = get_rung(a), get_rung(b)
    between = LADDER[LADDER.index(first) + 1 : LADDER.index(second) + 1]
    if not between:
        raise ValueError(f"{b} does not come after {a}; write the earlier milestone first")
    before = {} if first.id == "m0" else fold(first.id)
    typer.secho(f"Engine arguments, {a} -> {b}:", bold=True)
    changed = {name: value for name, value in fold(second.id).items() if not before or before[name] != value}
    for name, value in changed.items():
        typer.echo(f"  {name:24} {f'{before[name]!r} -> ' if before else ''}{value!r}")
    if not changed:
        typer.echo("  none: the engine is the same")
    manifest = _manifest()
    for rung in between:
        typer.secho(f"{rung.id}, {rung.title}: {rung.adds}", bold=True)
        parts = dict.fromkeys(e.part for e in find_exercises(rung.id) if e.replaces_a_part)
        typer.echo(f"  parts that you can write: {', '.join(parts) or 'none'}")
        typer.echo("  code: " + ", ".join(manifest[rung.id]["code"]))
        if changes := _changelog(rung):
            typer.echo(changes)


def _changelog(rung: Rung) -> str:
    """The section of CHANGELOG.md about a milestone; only a clone has that file."""
    path = PACKAGE.parent / "CHANGELOG.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(rf"^## {rung.id.upper()}:.*?\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1].rstrip() if found else ""
