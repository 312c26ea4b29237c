"""Head and foot of a page: reading time, what to know before, the pages around it, and what to do after it.

Milestone: M0. vLLM counterpart: none. All of it comes from docs/data/pages.toml and from the page itself. A page has
`<!-- nav -->` `<!-- /nav -->` below its title, and the same pair at its end. The lists of docs/README.md are written by
front_index.py.
"""

import os
import re
from pathlib import Path

from page_symbols import ROOT

from folovllm.learn.pages import Page, counted, examples_of, load_pages, minutes, name_of

DOCS = ROOT / "docs"
NAV = re.compile(r"<!-- nav -->.*?<!-- /nav -->", re.DOTALL)


def fill_nav(text: str, file: Path) -> str:
    """`text` of the page `file` with its head and its foot; a page that has none, or is in no list, stays as it is."""
    pages = load_pages()
    page = next((page for page in pages if page.path == file), None)
    if page is None:
        return text
    blocks = iter([_head(page, pages, text), _foot(page, pages)])

    def block(match: re.Match[str]) -> str:
        return f"<!-- nav -->\n{next(blocks)}\n<!-- /nav -->"

    return NAV.sub(block, text, count=2)


def _entry(page: Page, file: Path) -> str:
    return f"[{page.title}]({os.path.relpath(page.path, file.parent)})"


def _head(page: Page, pages: list[Page], text: str) -> str:
    return f"{_time(page, text)}{_before(page)}\n\n{_around(page, pages)}"


def _time(page: Page, text: str) -> str:
    """E.g. "*21 minutes: 16 to read, 5 to run the 5 examples (`folovllm docs run 03`).*"."""
    reading, running = minutes(text)
    if not running:
        return f"*{counted(reading, 'minute')} to read.*"
    examples = examples_of(text)
    what = "the example" if len(examples) == 1 else f"the {len(examples)} examples"
    command = f"`folovllm docs run {name_of(page)}`"
    return f"*{counted(reading + running, 'minute')}: {reading} to read, {running} to run {what} ({command}).*"


def _before(page: Page) -> str:
    """What to know, with links to those pages only that are written already."""

    def link(match: re.Match[str]) -> str:
        return match.group() if (page.path.parent / match[2]).is_file() else match[1]

    before = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", link, page.before)
    return f" **Before this page:** {before}" if before else ""


def _around(page: Page, pages: list[Page]) -> str:
    """E.g. "← [M2](02.md) · [all pages](../README.md) · [M4](04.md) →"."""
    at = pages.index(page)
    before = [f"← {_entry(pages[at - 1], page.path)}"] if at else []
    after = [f"{_entry(pages[at + 1], page.path)} →"] if at + 1 < len(pages) else []
    return " · ".join([*before, f"[all pages]({os.path.relpath(DOCS / 'README.md', page.path.parent)})", *after])


def _foot(page: Page, pages: list[Page]) -> str:
    onward = _onward(page, page.path)
    return "\n\n".join([*(["**Go on:** " + " · ".join(onward)] if onward else []), _around(page, pages)])


def _onward(page: Page, file: Path) -> list[str]:
    """Links from `file` to what belongs to the page and exists."""
    wanted = [(f"notebook {name[:2]}", ROOT / f"notebooks/{name}.ipynb") for name in page.notebooks]
    if page.exercises:
        wanted.append((f"exercises of {page.exercises.upper()}", ROOT / f"milestones/{page.exercises}/README.md"))
    if page.milestone:
        wanted.append((f"requirements of {page.milestone.upper()}", ROOT / f"milestones/{page.milestone}/SPEC.md"))
    if page.interview:
        wanted.append(("interview questions", DOCS / f"interview/{page.interview}.md"))
    return [f"[{text}]({os.path.relpath(path, file.parent)})" for text, path in wanted if path.is_file()]
