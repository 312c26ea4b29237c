#!/usr/bin/env python3
"""Write the interview pages from the question records, so that a page and the quiz never disagree.

docs/interview/CHAPTER.md             every question of m0 .. m7, the design questions and the number drills
docs/interview_guide.md               how to prepare, a plan of two weeks, an index by topic and level
docs/presentation/milestone_N.md      talk tracks of 3 and 10 minutes, from the spoken answers

python scripts/dev/build_interview.py            write all pages, remove those that no chapter has
python scripts/dev/build_interview.py --check    exit code 1 if a page is not what the records say
"""

import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import page_files
from page_links import Links

from folovllm.learn.questions import LEVELS, Question, load_questions

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FOLDERS = ("interview", "presentation")
BLOCK = re.compile(r"(<!-- interview: (\w+) -->\n).*?(<!-- /interview -->)", re.DOTALL)
TALK = 4  # spoken answers in a talk: four of 30 seconds make 3 minutes, four of 3 minutes make 10, with the opening

TITLES = {
    "m0": "M0, models, configuration and architecture",
    "m1": "M1, basic inference",
    "m2": "M2, continuous batching",
    "m3": "M3, the paged KV cache",
    "m4": "M4, flash attention",
    "m5": "M5, chunked prefill",
    "m6": "M6, prefix caching",
    "m7": "M7, GPTQ",
    "m8": "M8, Serving",
    "m9": "M9, tensor and pipeline parallelism",
    "m10": "M10, scale-out",
    "design": "system design",
    "drill": "number drills",
}

# What to show instead of the first result plot: the ladder's contains m1, and the gain of m3 is memory and not speed.
PICTURES = {
    "m1": ROOT / "milestones/m4/results/compare_perf_A_cpu.png",
    "m3": ROOT / "docs/learn/img/03_kv_utilisation.png",
}

PAGE_NOTE = """\
{count} questions. Say your answer aloud before you open ours, because in an interview only what you can say without
reading counts. `folovllm quiz {chapter}` asks the same questions, draws new numbers and remembers what you missed.
`scripts/dev/build_interview.py` writes this page; the code below an answer asserts its numbers, and the tests run it.
How to prepare: [the guide](../interview_guide.md)."""

PRESENTATION_NOTE = """\
Two talk tracks, which `scripts/dev/build_interview.py` makes from the spoken answers of
[the interview questions](../interview/{name}.md). Say it in your own words, and draw while you speak. Background:
[milestones/{name}](../../milestones/{name}/README.md)."""


def main() -> int:
    return page_files.write_or_check(__doc__, lambda: pages(load_questions()), stale_pages)


def stale_pages(wanted: dict[Path, str]) -> list[Path]:
    return page_files.stale_pages(wanted, (path for folder in FOLDERS for path in (DOCS / folder).glob("*.md")))


def pages(questions: dict[str, Question]) -> dict[Path, str]:
    """Returns every generated page with its text."""
    chapters: dict[str, list[Question]] = defaultdict(list)
    for question in questions.values():
        chapters[question.chapter].append(question)
    made = {
        DOCS / "interview" / f"{name}.md": chapter_page(name, chosen, questions) for name, chosen in chapters.items()
    }
    made[DOCS / "interview_guide.md"] = guide_page(chapters)
    for name, chosen in chapters.items():
        if re.fullmatch(r"m\d+", name):
            made[DOCS / "presentation" / f"milestone_{name[1:]}.md"] = presentation_page(name, chosen, questions)
    return {path: with_links(text, path.parent) for path, text in made.items()}


def with_links(text: str, folder: Path) -> str:
    """The page with its citations as links to lines. One that does not resolve stays, and a test names its question."""
    return Links(folder).written(text)


# ---- one chapter


def chapter_page(name: str, chosen: list[Question], questions: dict[str, Question]) -> str:
    lines = [f"# Interview questions: {TITLES[name]}", "", PAGE_NOTE.format(count=len(chosen), chapter=name), ""]
    lines += ["| question | kind | level | topics |", "|---|---|---|---|"]
    lines += [f"| [{q.id}](#{q.id}) | {q.kind} | {q.level} | {', '.join(q.tags)} |" for q in chosen]
    for question in chosen:
        lines += ["", *question_lines(question, questions)]
    return "\n".join(lines) + "\n"


def question_lines(question: Question, questions: dict[str, Question]) -> list[str]:
    values = question.first_values()
    lines = [f"## {question.id}", "", paragraphs(question.text(question.q, values)), ""]
    lines += ["<details><summary>Answer</summary>", ""]
    lines += [f"**In 30 seconds.** {paragraphs(question.text(question.say30, values))}", ""]
    if question.say3min:
        lines += [f"**In 3 minutes.** {paragraphs(question.text(question.say3min, values))}", ""]
    lines += ["**A good answer has**", ""]
    lines += [
        f"- {one_line(question.text(point.text, values))}{' (a must)' if point.must else ''}"
        for point in question.points
    ]
    lines += ["", f"**Trap.** {paragraphs(question.text(question.trap, values))}", "", *evidence_lines(question)]
    if question.follow:
        links = ", ".join(link_to(questions[id_], question) for id_ in question.follow)
        lines += [f"**Next.** {links}", ""]
    return [*lines, "</details>"]


def evidence_lines(question: Question) -> list[str]:
    """Where the answer can be read, and how it is proved: code, sources, formula and check."""
    lines = [f"**Read.** {', '.join(f'[[{anchor}]]' for anchor in question.code)}", ""]
    lines += [f"**Sources.** {', '.join(source_link(source) for source in question.source)}", ""]
    if question.fact:
        lines += ["**Corrects** a claim that is found in public study material.", ""]
    if question.vars:
        lines += ["The quiz draws other values each time; this page shows the first of each variable.", ""]
    code = [*(f"{name} = {value}" for name, value in question.let.items())]
    if question.formula:
        code += [f"answer = {question.formula}  # {question.unit}"]
    code += [part.strip("\n") for part in (question.compute, question.check) if part]
    return [*lines, "The tests run:", "", "```python", "\n".join(code), "```", ""] if code else lines


def link_to(question: Question, source: Question) -> str:
    page = "" if question.chapter == source.chapter else f"{question.chapter}.md"
    return f"[{question.id}]({page}#{question.id})"


def source_link(source: str, start: Path = DOCS / "interview") -> str:
    if source.startswith("arxiv:"):
        return f"[arXiv {source[6:]}](https://arxiv.org/abs/{source[6:]})"
    if source.startswith("vllm@"):
        return f"[[{source}]]"
    if source.startswith("https://"):
        return f"<{source}>"
    return f"[{source}]({os.path.relpath(ROOT / source.partition('#')[0], start)})"


# ---- the guide


def guide_page(chapters: dict[str, list[Question]]) -> str:
    everything = [question for chosen in chapters.values() for question in chosen]
    blocks = {"counts": counts_table(chapters, everything), "index": topic_index(everything)}
    text = (DOCS / "interview_guide.md").read_text(encoding="utf-8")
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match[2]]}\n{match[3]}", text)


def counts_table(chapters: dict[str, list[Question]], everything: list[Question]) -> str:
    facts = sum(question.fact is not None for question in everything)
    rows = [
        f"| [{TITLES[name]}](interview/{name}.md) | {len(chosen)} | {level_counts(chosen)} |"
        for name, chosen in chapters.items()
    ]
    total = f"| all, of which {facts} correct a public claim | {len(everything)} | {level_counts(everything)} |"
    return "\n".join([f"| chapter | questions | {' | '.join(LEVELS)} |", "|---|---|---|---|---|", *rows, total])


def level_counts(questions: list[Question]) -> str:
    return " | ".join(str(sum(question.level == level for question in questions)) for level in LEVELS)


def topic_index(questions: list[Question]) -> str:
    """Returns the topics that at least two questions share, with their questions by level."""
    by_tag: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        for tag in question.tags:
            by_tag[tag].append(question)
    lines = [f"| topic | {' | '.join(LEVELS)} |", "|---|---|---|---|"]
    for tag, chosen in sorted(by_tag.items()):
        if len(chosen) > 1:
            cells = [", ".join(guide_link(q) for q in chosen if q.level == level) or "-" for level in LEVELS]
            lines.append(f"| {tag} | {' | '.join(cells)} |")
    return "\n".join(lines)


def guide_link(question: Question) -> str:
    return f"[{question.id}](interview/{question.chapter}.md#{question.id})"


# ---- talk tracks


def presentation_page(name: str, chosen: list[Question], questions: dict[str, Question]) -> str:
    """A talk on one milestone: its problem and idea, then the spoken answers that come first in its file."""
    number = name[1:]
    spoken = [question for question in chosen if question.kind == "explain"]
    chosen = spoken[:TALK]
    lines = [f"# Presenting {TITLES[name]}", "", PRESENTATION_NOTE.format(number=number, name=name), ""]
    lines += ["## In 3 minutes", "", *opening(name), ""]
    for question in chosen:
        lines += [f"**{one_line(question.q['en'])}** {one_line(question.say30['en'])}", ""]
    lines += ["## In 10 minutes", "", *opening(name), ""]
    for question in chosen:
        lines += [f"**{one_line(question.q['en'])}**", "", paragraphs(question.say3min["en"]), ""]
    lines += [*plot_lines(name), "## They will ask", ""]
    follow = dict.fromkeys(id_ for question in chosen for id_ in question.follow)
    asked = [questions[id_] for id_ in follow if questions[id_] not in chosen]
    lines += [f"- [{q.id}](../interview/{q.chapter}.md#{q.id}): {what_is_asked(q)}" for q in asked]
    return "\n".join(lines) + "\n"


def opening(name: str) -> list[str]:
    """The paragraphs "Problem" and "Idea" of the milestone's README."""
    text = (ROOT / "milestones" / name / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\*\*(?:Problem|Idea)\.\*\* (.+?)(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 2, f"milestones/{name}/README.md has no Problem and Idea"
    return [found[0], "", found[1]]


def plot_lines(name: str) -> list[str]:
    """The milestone's result plot, or else a figure of its learning page, or else the one of the whole engine."""
    results = sorted((ROOT / "milestones" / name / "results").glob("*.png"))
    figures = sorted((DOCS / "learn" / "img").glob(f"{int(name[1:]):02}_*.png"))
    plots = [p for p in results if "compare_perf" in p.name] or [p for p in results if "groups" not in p.name]
    path = PICTURES.get(name) or [*plots, *figures, ROOT / "docs/img/architecture.png"][0]
    return ["## The picture to show", "", f"![{path.stem}]({os.path.relpath(path, DOCS / 'presentation')})", ""]


def what_is_asked(question: Question) -> str:
    """The last sentence of the question that ends with a question mark, or else the first sentence."""
    sentences = re.split(r"(?<=[.?])\s", one_line(question.text(question.q, question.first_values())))
    return ([s for s in sentences if s.endswith("?")] or sentences[:1])[-1]


# ---- text


def one_line(text: str) -> str:
    return " ".join(text.split())


def paragraphs(text: str) -> str:
    """A line per paragraph: a line that began with "- 1" inside a sentence would be a list in Markdown."""
    return "\n\n".join(one_line(paragraph) for paragraph in re.split(r"\n\s*\n", text.strip()))


if __name__ == "__main__":
    sys.exit(main())
