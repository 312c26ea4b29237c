#!/usr/bin/env python3
"""Write docs/learn/exercises.md again: its table of all exercises, and what its commands really print.

Milestone: M0. vLLM counterpart: none.

The commands of the page run in their order, in an empty folder. A Python block whose first line is `# work/...` is
written to that file before the next command runs; `<!-- solve m0/request_states -->` writes the engine's own methods.

    python scripts/dev/write_exercises_page.py            rewrite the page
    python scripts/dev/write_exercises_page.py --check    exit code 1 if the page is not what the engine says
"""

import argparse
import inspect
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from folovllm.learn.contract import plain_function
from folovllm.learn.exercise import ALL_PARTS, Exercise, find_exercises, get_exercise

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/learn/exercises.md"
DIFFICULTIES = {1: "easy", 2: "medium", 3: "hard"}
TABLE = re.compile(r"(<!-- exercises -->\n).*?(<!-- /exercises -->)", re.DOTALL)
STEP = re.compile(
    r"^```python\n(?P<code># (?P<file>work/\S+)\n.*?)^```"
    r"|^```console\n(?P<session>.*?)^```"
    r"|<!-- solve (?P<solve>\S+) -->",
    re.MULTILINE | re.DOTALL,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say whether the page is out of date")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    written = written_page(text)
    if written == text:
        return 0
    print(f"{'out of date' if check else 'rewritten'}: {PAGE.relative_to(ROOT).as_posix()}")
    if not check:
        PAGE.write_text(written, encoding="utf-8")
    return int(check)


def written_page(text: str) -> str:
    """The page with the table and the output of its commands as they are now."""
    return with_output(TABLE.sub(lambda match: match[1] + table() + match[2], text))


# ---- the table


def table() -> str:
    exercises = find_exercises()
    rows = ["| exercise | you write | minutes | difficulty |", "|---|---|--:|---|", *map(_row, exercises)]
    fast = [exercise for exercise in exercises if exercise.fast]
    rows.append(f"| all {len(exercises)} | | {_duration(exercises)} | |")
    rows.append(f"| fast track, {len(fast)} in bold | | {_duration(fast)} | |")
    return "\n".join(rows) + "\n"


def _row(exercise: Exercise) -> str:
    methods = ", ".join(f"`{name}`" for name in exercise.write)
    yours = (
        "nothing: every part that you wrote, together"
        if exercise.part == ALL_PARTS
        else f"{methods} of `{exercise.subject}`"
    )
    name = f"[{exercise.id}](../../milestones/{exercise.milestone}/exercises/{exercise.name}/README.md)"
    difficulty = DIFFICULTIES[exercise.level] + (", torch" if exercise.torch else "")
    return f"| {f'**{name}**' if exercise.fast else name} | {yours} | {exercise.minutes} | {difficulty} |"


def _duration(exercises: list[Exercise]) -> str:
    """E.g. "16 h 20"."""
    hours, minutes = divmod(sum(exercise.minutes for exercise in exercises), 60)
    return f"{hours} h {minutes:02}"


# ---- the commands


def with_output(text: str) -> str:
    """`text` with the output of each command in its console blocks replaced by what the command prints now."""
    with tempfile.TemporaryDirectory(prefix="folovllm-page-") as folder:
        return STEP.sub(lambda match: _step(match, Path(folder)), text)


def _step(match: re.Match[str], folder: Path) -> str:
    if session := match["session"]:
        commands = re.findall(r"^\$ (.+)$", session, re.MULTILINE)
        return "```console\n" + "".join(f"$ {command}\n{printed(command, folder)}" for command in commands) + "```"
    if match["solve"]:
        exercise = get_exercise(*match["solve"].split("/"))
        (folder / "work" / f"{exercise.id}.py").write_text(solution(exercise), encoding="utf-8")
    else:
        (folder / match["file"]).write_text(match["code"], encoding="utf-8")
    return match[0]


def printed(command: str, folder: Path) -> str:
    """What `folovllm ...` prints in the folder. Paths are shown as in the root of a clone."""
    program, *args = shlex.split(command, comments=True)
    if program != "folovllm":
        raise ValueError(f"the page may run folovllm only; got {command!r}")
    result = subprocess.run(
        [sys.executable, "-m", "folovllm", *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "110"},
        text=True,
        capture_output=True,
        encoding="utf-8",
    )
    if result.stderr:
        raise ValueError(f"{command}: {result.stderr}")
    return result.stdout.replace(f"{ROOT}/", "")


def solution(exercise: Exercise) -> str:
    """A work file with the engine's own methods, as a learner might have written them."""
    reference = exercise.reference_class
    module = f"from {reference.__module__} import"
    methods = [inspect.getsource(plain_function(inspect.getattr_static(reference, name))) for name in exercise.write]
    body = "\n".join(textwrap.indent(textwrap.dedent(method), "    ") for method in methods)
    return (
        f"import {reference.__module__} as engine\n{module} {reference.__name__} as Reference\n\n"
        "globals().update({name: value for name, value in vars(engine).items() if not name.startswith('__')})\n\n\n"
        f"class {exercise.class_name}(Reference):\n{body}"
    )


if __name__ == "__main__":
    sys.exit(main())
