"""Blocks of docs/README.md: the three paths with their times, milestones, guides, topics, statistics.

Milestone: M0. vLLM counterpart: none. The pages come from docs/data/pages.toml, the times from the pages themselves
(folovllm/learn/pages.py), from the exercises and from what each notebook says.
"""

import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from folovllm.learn.exercise import find_exercises
from folovllm.learn.pages import WORDS_PER_MINUTE, examples_of, load_pages, minutes, name_of, num_words
from folovllm.milestones import LADDER, Rung

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LIST: dict[str, Any] = tomllib.loads((DOCS / "data/pages.toml").read_text(encoding="utf-8"))
BESIDE = ("00_project_setup", "exercises", "simulator", "vllm_traces")  # learning pages that the newcomer may skip
THOUSAND = 1000


def link(text: str, target: Path, folder: Path) -> str:
    return f"[{text}]({os.path.relpath(target, folder)})"


def table(head: str, rows: Iterable[Iterable[str]], right: str = "") -> str:
    """Markdown with the columns of `head` (split at |), of which those in `right` (by number) hold numbers."""
    columns = [column.strip() for column in head.split("|")]
    marks = ["--:" if str(i) in right.split() else "---" for i in range(len(columns))]
    lines = [columns, *map(list, rows)]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], f"|{'|'.join(marks)}|", *text[1:]]) + "\n"


def duration(total: int) -> str:
    """E.g. "40 min", "3 h 20"."""
    hours, rest = divmod(total, 60)
    return f"{hours} h {rest:02}" if hours else f"{rest} min"


# ---- times


def page_minutes(file: Path) -> int:
    return sum(minutes(file.read_text(encoding="utf-8")))


def notebook_minutes(name: str) -> int:
    """What the notebook says of itself, e.g. "*15 minutes. ..." in its first cell, or else counted like a page."""
    text = (ROOT / f"notebooks/src/{name}.py").read_text(encoding="utf-8")
    said = re.search(r"\b(\d+) minutes", text.partition("\n# %%\n")[0])
    if said:
        return int(said[1])
    prose = "\n".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    return round(num_words(prose) / WORDS_PER_MINUTE) + len(re.findall(r"^# %%", text, re.MULTILINE))


def existing(notebooks: Iterable[str]) -> list[str]:
    return [name for name in notebooks if (ROOT / f"notebooks/{name}.ipynb").is_file()]


# ---- the three paths


def newcomer(folder: Path) -> str:
    """The learning pages in their order, each with the notebooks and exercises that no page before it has."""
    rows, total, seen = [], [0, 0, 0], set[str]()
    for page in load_pages():
        if page.stem in BESIDE:
            continue
        books = [name for name in existing(page.notebooks) if name not in seen]
        tasks = find_exercises(page.milestone) if page.milestone and page.milestone not in seen else []
        times = [
            page_minutes(page.path), sum(map(notebook_minutes, books)), sum(task.minutes for task in tasks)
        ]  # fmt: skip
        total = [a + b for a, b in zip(total, times, strict=True)]
        rows.append((
            link(page.title, page.path, folder),
            str(times[0]),
            ", ".join(f"{notebook_link(name, folder)} ({notebook_minutes(name)})" for name in books),
            exercises_cell(page.milestone, folder) if tasks else "",
            f"`folovllm quiz {page.milestone}`" if tasks else "",
        ))  # fmt: skip
        seen |= {page.milestone, *books}
    rows.append(("all", *map(duration, total), ""))
    return table("page | minutes | notebook (minutes) | exercises (minutes) | quiz", rows, right="1")


def notebook_link(name: str, folder: Path) -> str:
    return link(name[:2], ROOT / f"notebooks/{name}.ipynb", folder)


def exercises_cell(milestone: str, folder: Path) -> str:
    tasks = find_exercises(milestone)
    text = link(f"{len(tasks)} of {milestone}", ROOT / f"milestones/{milestone}/README.md", folder)
    return f"{text} ({sum(task.minutes for task in tasks)})"


def developer(folder: Path) -> str:
    return steps_of("developer", folder)


def interview(folder: Path) -> str:
    return steps_of("interview", folder)


def steps_of(name: str, folder: Path) -> str:
    """A path of pages.toml: [[path]] with the steps {page, why}."""
    (path,) = (path for path in LIST["path"] if path["name"] == name)
    rows, total = [], 0
    for step in path["steps"]:
        file = (DOCS / step["page"]).resolve()
        if not file.is_file():  # not written yet
            continue
        total += page_minutes(file)
        rows.append((link(title_of(file), file, folder), str(page_minutes(file)), step["why"]))
    return table("page | minutes | why", [*rows, ("all", duration(total), "")], right="1")


def title_of(file: Path) -> str:
    """As pages.toml calls the page, or else its heading."""
    known = {DOCS / entry["file"]: entry["title"] for entry in [*LIST["page"], *LIST["front"]]}
    heading = re.search(r"^# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return known.get(file) or (heading[1] if heading else file.stem)


# ---- milestones


def milestones(folder: Path) -> str:
    head = "milestone | learn | notebook | exercises | interview | talk | requirements | dev log"
    return table(head, (milestone_row(rung, folder) for rung in LADDER))


def milestone_row(rung: Rung, folder: Path) -> list[str]:
    pages = [page for page in load_pages() if page.milestone == rung.id]
    books = dict.fromkeys(existing(name for page in pages for name in page.notebooks))
    at = ROOT / "milestones" / rung.id
    return [
        link(f"{rung.id.upper()} {rung.title}", at / "README.md", folder),
        ", ".join(link(name_of(page), page.path, folder) for page in pages),
        ", ".join(notebook_link(name, folder) for name in books) or "-",
        str(len(find_exercises(rung.id))),
        link("questions", DOCS / f"interview/{rung.id}.md", folder),
        link("10 minutes", DOCS / f"presentation/milestone_{rung.id[1:]}.md", folder),
        link("SPEC", at / "SPEC.md", folder),
        link("log", DOCS / f"dev/milestone_{rung.id[1:]}.md", folder),
    ]


# ---- guides, topics, statistics


def guides(folder: Path) -> str:
    """The front pages of pages.toml, each with what it holds."""
    rows = []
    for entry in LIST["front"]:
        file = DOCS / entry["file"]
        rows.append((link(entry["title"], file, folder), str(page_minutes(file)), entry["what"]))
    return table("page | minutes | holds", rows, right="1")


def topics(folder: Path) -> str:
    """Every topic with the pages that name it in pages.toml, in reading order."""
    found: dict[str, list[str]] = defaultdict(list)
    for page in load_pages():
        for topic in page.topics:
            found[topic].append(link(page.title, page.path, folder))
    for entry in LIST["front"]:
        for topic in entry.get("topics", ()):
            found[topic].append(link(entry["title"], DOCS / entry["file"], folder))
    return table("topic | pages", ((topic, ", ".join(found[topic])) for topic in sorted(found, key=str.lower)))


GROUPS = {
    "front pages and guides": ("README.md", "CONTRIBUTING.md", "docs/*.md"),
    "learning pages": ("docs/learn/*.md",),
    "milestones and requirements": ("milestones/*.md", "milestones/m*/*.md"),
    "texts of exercises": ("milestones/*/exercises/*/README.md",),
    "interview questions and talks": ("docs/interview/*.md", "docs/presentation/*.md"),
    "development logs": ("docs/dev/*.md",),
    "API (generated)": ("docs/api/*.md",),
}


def statistics(folder: Path) -> str:
    """Pages, words of prose (to the nearest thousand), pictures and examples, by group."""
    rows, sums = [], [0, 0, 0, 0]
    for group, patterns in GROUPS.items():
        texts = [p.read_text(encoding="utf-8") for pattern in patterns for p in sorted(ROOT.glob(pattern))]
        counts = [
            len(texts),
            sum(map(num_words, texts)),
            sum(len(re.findall(r"^!\[", text, re.MULTILINE)) for text in texts),
            sum(len(examples_of(text)) for text in texts),
        ]
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
        rows.append([group, *statistics_cells(counts)])
    rows.append(["all", *statistics_cells(sums)])
    return table("kind | pages | words | pictures | examples that run", rows, right="1 2 3 4")


def statistics_cells(counts: list[int]) -> list[str]:
    pages, words, pictures, examples = counts
    return [str(pages), f"{round(words / THOUSAND):,} thousand", str(pictures), str(examples)]
