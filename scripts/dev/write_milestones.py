#!/usr/bin/env python3
"""Write what the milestone folders hold into their pages: the status table, and each milestone's list of things to do.

The places are marked `<!-- status -->` in milestones/README.md and `<!-- work -->` in milestones/mN/README.md.

    python scripts/dev/write_milestones.py            rewrite the pages
    python scripts/dev/write_milestones.py --check    exit code 1 if a page is not what the folders hold
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from folovllm.learn.exercise import ALL_PARTS, Exercise, find_exercises
from folovllm.learn.questions import load_questions
from folovllm.milestones import LADDER, Rung
from folovllm.sim.bench import load_bench

MILESTONES = Path(__file__).resolve().parents[2] / "milestones"
LEVELS = {1: "easy", 2: "medium", 3: "hard"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say which pages are out of date")
    check = parser.parse_args().check
    stale = {page: text for page, text in written_pages().items() if page.read_text(encoding="utf-8") != text}
    for page, text in stale.items():
        print(f"{'out of date' if check else 'rewritten'}: milestones/{page.relative_to(MILESTONES).as_posix()}")
        if not check:
            page.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


def written_pages() -> dict[Path, str]:
    """Every page that has a marked place -> its text, as it should be."""
    blocks = {MILESTONES / "README.md": ("status", status_table())}
    blocks |= {MILESTONES / rung.id / "README.md": ("work", work_of(rung)) for rung in LADDER}
    return {page: fill(page.read_text(encoding="utf-8"), *block) for page, block in blocks.items()}


def fill(text: str, name: str, content: str) -> str:
    """`text` with the block `name` replaced. Raises ValueError if the page has no such place."""
    block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not block.search(text):
        raise ValueError(f"no place <!-- {name} --> ... <!-- /{name} -->")
    return block.sub(lambda match: f"{match[1]}{content}{match[2]}", text)


def cases_of(rung: Rung) -> list[dict[str, Any]]:
    files = sorted((MILESTONES / rung.id).glob("cases/*/case.toml"))
    return [tomllib.loads(file.read_text(encoding="utf-8")) | {"folder": file.parent.name} for file in files]


def num_questions(rung: Rung) -> int:
    return sum(question.chapter == rung.id for question in load_questions().values())


# ---- milestones/README.md


def status_table() -> str:
    lines = [
        "| milestone | switches | exercises | cases | questions | bench | pages |",
        "|---|---|---|--:|--:|---|---|",
        *map(status_row, LADDER),
    ]
    return "\n".join(lines) + "\n"


def status_row(rung: Rung) -> str:
    manifest = tomllib.loads((MILESTONES / "manifest.toml").read_text(encoding="utf-8"))[rung.id]
    exercises, bench = find_exercises(rung.id), load_bench(MILESTONES / rung.id / "bench.toml")
    switches = [f"`{name}`" for name in rung.on]
    kinds = {"learn": "learn", "spec": "requirements", "dev": "dev log", "notebook": "notebook"}
    pages = [f"[{text}](../{manifest[kind]})" for kind, text in kinds.items() if kind in manifest]
    cells = (
        f"[{rung.id.upper()} {rung.title}]({rung.id}/README.md)",
        ", ".join(switches[:2] + ["..."] * (len(switches) > 2)) or "-",
        f"{len(exercises)} ({sum(e.minutes for e in exercises)} minutes)",
        str(len(cases_of(rung)) or "-"),
        str(num_questions(rung)),
        f"{len(bench.arms)} arms, {len(bench.claims)} claims",
        " · ".join(pages),
    )
    return f"| {' | '.join(cells)} |"


# ---- milestones/mN/README.md


def work_of(rung: Rung) -> str:
    """Exercises and case files of a milestone as a table, then the bench and the questions."""
    rows = [exercise_row(exercise) for exercise in find_exercises(rung.id)]
    rows += [case_row(case) for case in cases_of(rung)]
    table = ["| to do | what it is | minutes | level |", "|---|---|--:|---|", *rows, ""] if rows else []
    bench = load_bench(MILESTONES / rung.id / "bench.toml")
    claims = f"{len(bench.arms)} arms, {len(bench.claims)} claims"
    after = [
        f"- `folovllm learn {rung.id} bench`, [bench.toml](bench.toml) ({claims}): {lower_first(bench.title)}.",
        f"- `folovllm quiz {rung.id}`: {num_questions(rung)} interview questions, [questions.toml](questions.toml).",
    ]
    return "\n".join([*table, *after]) + "\n"


def exercise_row(exercise: Exercise) -> str:
    what = "every part that you wrote" if exercise.part == ALL_PARTS else f"`{exercise.subject}`"
    fast = ", fast track" if exercise.fast else ""
    return (
        f"| [{exercise.title}](exercises/{exercise.name}/README.md) | exercise: {what}, "
        f"`{exercise.command('check')}` | {exercise.minutes} | {LEVELS[exercise.level]}{fast} |"
    )


def case_row(case: dict[str, Any]) -> str:
    what = f"case file: `folovllm learn case {case['number']}`"
    return f"| [{case['title']}](cases/{case['folder']}) | {what} | {case['minutes']} | |"


def lower_first(title: str) -> str:
    """For a title in the middle of a sentence. E.g. "A KV cache" -> "a KV cache", but "GPTQ" stays."""
    return title if title[1:2].isupper() else title[0].lower() + title[1:]


if __name__ == "__main__":
    sys.exit(main())
