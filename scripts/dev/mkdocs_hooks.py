"""What the site needs beside the pages: a navigation, links that leave docs/, and some of GitHub's Markdown.

Milestone: M0. vLLM counterpart: vLLM's docs/mkdocs/hooks. mkdocs calls the functions named on_...; the others import
nothing of it, so that tests can call them where it is not installed.
"""

import os
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from build_api import GROUPS
from page_links import CODE, LINKS, rewrite
from page_symbols import ROOT

DOCS = ROOT / "docs"
# A list right after a line of a paragraph, which GitHub shows as a list without an empty line between them.
TIGHT_LIST = re.compile(r"^(?P<text>(?!\s|[-*] |\d+\. |[#|><])[^\n]+\n)(?=(?:-|\*|1\.) )", re.MULTILINE)
CSS = """
/* Code, tables and pictures as wide as the page allows, and formulas that can be read. */
.wy-nav-content { max-width: 1120px; }
.rst-content img { max-width: 100%; border: 1px solid #e1e4e5; background: white; }
.rst-content code { color: #333; font-size: 85%; border: none; background: #f0f2f3; padding: 2px 4px; }
.rst-content a code { color: #2980b9; }
.rst-content pre code { background: none; padding: 0; font-size: 100%; }
.rst-content .codehilite { border: 1px solid #e1e4e5; background: #f8f8f8; margin: 0 0 24px; overflow-x: auto; }
.rst-content .codehilite pre { margin: 0; padding: 12px; font-size: 12.5px; line-height: 1.45; white-space: pre; }
.rst-content .headerlink { position: absolute; } /* it must not take a line of its own */
.rst-content details { margin-bottom: 24px; }
.rst-content summary { cursor: pointer; }
.rst-content table.docutils td, .rst-content table.docutils th, .rst-content table td { white-space: normal; }
"""


def on_config(config: Any) -> Any:
    """Gives the site its navigation, and headings the anchors that GitHub gives them."""
    config["nav"] = navigation()
    config["mdx_configs"].setdefault("toc", {})["slugify"] = github_slug
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the style sheet, with the colours of the code."""
    from mkdocs.structure.files import File
    from pygments.formatters import HtmlFormatter

    colours = HtmlFormatter(style="friendly").get_style_defs(".codehilite")
    files.append(File.generated(config, "site.css", content=f"{colours}\n{CSS}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return for_the_site(markdown, DOCS / page.file.src_uri, config["repo_url"])


# ---- navigation


def navigation() -> list[dict[str, Any]]:
    """All pages in groups: the learning pages in their order, guides, reference, interview, and how it was built."""
    entries = tomllib.loads((DOCS / "data/pages.toml").read_text(encoding="utf-8"))["page"]
    learn = [{entry["title"]: entry["file"]} for entry in entries if (DOCS / entry["file"]).is_file()]
    first, last = {"README.md"}, {"glossary.md", "results.md", "interview_guide.md"}
    api = [{group.title: f"api/{group.name}.md"} for group in GROUPS]
    guides = sorted(path.name for path in DOCS.glob("*.md") if path.name not in first | last)
    return [
        {"Documentation": "README.md"},
        {"Learn": learn},
        *([{"Guides": guides}] if guides else []),
        {"Reference": ["glossary.md", "results.md", {"API": ["api/README.md", *api]}]},
        {
            "Interviews": [
                {"How to prepare": "interview_guide.md"},
                *_pages("interview"),
                {"Talks": _pages("presentation")},
            ]
        },
        {"How it was built": _pages("dev")},
    ]


def _pages(folder: str) -> list[dict[str, str]]:
    """The pages of a folder with short titles. E.g. dev/milestone_3.md -> "M3", dev/gpu_status.md -> "GPU status"."""
    names = sorted(path.stem for path in (DOCS / folder).glob("*.md"))
    return [{_short_title(name): f"{folder}/{name}.md"} for name in names]


def _short_title(name: str) -> str:
    title = re.sub(r"^(?:milestone_|m)(?=\d)", "M", name).replace("_", " ").replace("gpu", "GPU")
    return title[0].upper() + title[1:]


# ---- Markdown


def for_the_site(markdown: str, page: Path, repo_url: str) -> str:
    """The page with links into the repository, Markdown in answers, and lists without an empty line before them."""
    markdown = rewrite(markdown, LINKS, lambda match: _leave_docs(match.group(), page, repo_url), CODE)
    return _outside_code(
        markdown, lambda text: TIGHT_LIST.sub(r"\g<text>\n", text.replace("<details>", "<details markdown>"))
    )


def _leave_docs(link: str, page: Path, repo_url: str) -> str:
    """A link to a file outside of docs/ leads to the repository. E.g. ](../../folovllm/x.py -> ](REPO/blob/main/..."""
    return re.sub(
        r"(?<=\]\()(?P<path>[^()\s#:]+)(?=[#)\s])", lambda match: _target(match["path"], page, repo_url), link
    )


def _target(path: str, page: Path, repo_url: str) -> str:
    file = Path(os.path.normpath(page.parent / path))
    if file.is_relative_to(DOCS) and not file.is_dir():
        return path
    return f"{repo_url}/{'tree' if file.is_dir() else 'blob'}/main/{file.relative_to(ROOT).as_posix()}"


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Applies `change` to the text between fenced blocks."""
    parts = re.split(r"(^```.*?^```[^\S\n]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def github_slug(heading: str, separator: str) -> str:
    """The anchor that GitHub gives a heading, which is what links on the pages name."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"<[^>]+>", "", heading).strip().lower()).replace(" ", "-")
