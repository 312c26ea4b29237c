"""What the tests of the pages share: which pages there are, their headings and links.

A learning page is in form if it has head and foot from docs/data/pages.toml, examples whose output stands below them,
and a picture per 600 words. `folovllm.learn.pages` finds the examples, scripts/dev/build_docs.py writes the rest.
"""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

from folovllm.learn.pages import FENCE, Example, examples_of

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "milestones").rglob("*.md")])
FRONT_PAGES = sorted(ROOT.glob("*.md"))  # README, CONTRIBUTING, ...
LEARN_PAGES = sorted((ROOT / "docs/learn").glob("*.md"))

MAX_WORDS = 3_000  # of prose
WORDS_PER_PICTURE = 600

LINK = re.compile(r"\]\(([^()\s]+)(?: \"[^\"]*\")?\)")
INLINE_CODE = re.compile(r"`[^`\n]*`")
HTML_ID = re.compile(r"<\w+[^>]*\s(?:id|name)=\"([^\"]+)\"")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(page: Path) -> str:
    return FENCE.sub("", text_of(page))


def runnable_examples() -> list[tuple[Path, Example]]:
    return [(page, example) for page in PAGES for example in examples_of(text_of(page))]


def imports_tests(code: str) -> bool:
    """Whether the code imports from tests/, which an installed package does not have."""
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.partition(".")[0] == "tests" for name in names)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading. E.g. "What `[]` means: a **trap**" -> "what--means-a-trap"."""
    heading = re.sub(r"!?\[((?:[^\[\]`]|`[^`]*`)*)\]\([^)]*\)", r"\1", heading)  # a link's text
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors_of(page: Path) -> frozenset[str]:
    """What may stand behind # in a link to the page. A heading that occurs again gets -1, -2, ..."""
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", without_code(page), re.MULTILINE)
    seen: Counter[str] = Counter()
    found = set(HTML_ID.findall(text_of(page)))
    for name in map(slug, headings):
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return frozenset(found)


def problem_of_link(page: Path, target: str) -> str | None:
    """Returns why a relative link does not lead anywhere, or None if it does."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path) if path else page
    if not file.exists():
        return f"there is no {target}"
    if not anchor:
        return None
    if file.suffix == ".md":
        return None if anchor in anchors_of(file.resolve()) else f"{path or page.name} has no heading #{anchor}"
    lines = [int(number) for number in re.findall(r"L(\d+)", anchor)]
    return None if lines and max(lines) <= len(text_of(file).splitlines()) else f"{path} has no {anchor}"


def dead_links(page: Path) -> list[str]:
    targets = LINK.findall(INLINE_CODE.sub("`", without_code(page)))
    relative_targets = [target for target in targets if not re.match(r"[a-z]+:", target)]
    return [problem for target in relative_targets if (problem := problem_of_link(page, target))]
