"""Links of a page: citations of code with their lines, and arXiv ids.

Milestone: M0. vLLM counterpart: none.

    [[folovllm/request.py#Request]]          -> [`Request`](../../folovllm/request.py#L33 "folovllm/request.py#Request")
    [own words](x "folovllm/request.py")     -> [own words](../../folovllm/request.py "folovllm/request.py")
    arXiv:2309.06180                         -> [arXiv:2309.06180](https://arxiv.org/abs/2309.06180)

The title of a link keeps its anchor, so a later run finds the link again and refreshes its line.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from page_symbols import PIN, ROOT, line_of_anchor

from folovllm.learn.pages import GENERATED

VLLM_FILES = f"https://github.com/vllm-project/vllm/blob/{PIN}/"

ANCHOR = r"(?P<anchor>(?:vllm@[\w.]+:)?[A-Za-z_][\w-]*/[\w./-]*(?:#[\w.]+)?)"
CITATION = rf"\[\[{ANCHOR}\]\]"
TITLED = rf"(?<!!)\[(?P<text>(?:[^\[\]`]|`[^`]*`)*)\]\((?P<target>[^()\s]*) \"{ANCHOR}\"\)"
ARXIV = r"\barXiv[: ](?P<paper>\d{4}\.\d{4,5})\b"

# What no link is written into.
INDENTED = r"(?:\A|(?<=\n\n)) {4}[^\n]*(?:\n* {4}[^\n]*)*"  # a code block without ```
CODE = rf"^(?P<tick>```+).*?^(?P=tick)[^\S\n]*$|(?P<quote>`+)(?:(?!(?P=quote)).)+?(?P=quote)|{INDENTED}"
COMMENTS = rf"{GENERATED.pattern}|<!--.*?-->"  # what builders write, and their places
LINKS = r"!?\[(?:[^\[\]`]|`[^`]*`)*\]\((?:[^()\s]|\([^()\s]*\))*(?: \"[^\"]*\")?\)|<https?:[^<>\s]*>|</?\w+[^<>\n]*>"


def rewrite(text: str, pattern: str, change: Callable[[re.Match[str]], str], closed: str) -> str:
    """`text` with every match of `pattern` changed, except inside of what `closed` matches."""
    both = re.compile(f"(?P<closed>{closed})|(?:{pattern})", re.MULTILINE | re.DOTALL)
    return both.sub(lambda match: match.group() if match["closed"] is not None else change(match), text)


class Links:
    """Writes the links of the pages in one folder; `problems` collects (line, what is wrong)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[tuple[int, str]] = []

    def written(self, text: str) -> str:
        """`text` with citations as links, the lines of older links as they are now, and arXiv ids linked."""
        text = rewrite(text, TITLED, self._titled, closed=f"{COMMENTS}|{CODE}")
        text = rewrite(text, CITATION, self._cited, closed=f"{COMMENTS}|{CODE}|{LINKS}")
        paper = "[{0}](https://arxiv.org/abs/{1})"
        return rewrite(text, ARXIV, lambda m: paper.format(m.group(), m["paper"]), f"{COMMENTS}|{CODE}|{LINKS}")

    def _cited(self, match: re.Match[str]) -> str:
        path, _, symbol = match["anchor"].partition("#")
        name = f"`{symbol or path.rpartition(':')[2]}`"
        return self._link(f"vLLM's {name}" if path.startswith("vllm@") else name, match)

    def _titled(self, match: re.Match[str]) -> str:
        return self._link(match["text"], match)

    def _link(self, text: str, match: re.Match[str]) -> str:
        anchor = match["anchor"]
        try:
            return f'[{text}]({target_of(anchor, self.folder)} "{anchor}")'
        except ValueError as error:
            self.problems.append((match.string.count("\n", 0, match.start()) + 1, f"[[{anchor}]]: {error}"))
            return match.group()


def target_of(anchor: str, folder: Path) -> str:
    """Where a link goes from a page in `folder`. Raises ValueError if the anchor does not resolve."""
    line = line_of_anchor(anchor)
    path = anchor.partition("#")[0]
    base = VLLM_FILES + path.partition(":")[2] if path.startswith("vllm@") else os.path.relpath(ROOT / path, folder)
    return f"{base}#L{line}" if line else base
