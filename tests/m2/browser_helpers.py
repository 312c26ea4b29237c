"""Pages in headless Chromium, driven by their address and by scripts that a test appends. No other tool is needed."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from folovllm.trace.record import Trace
from folovllm.trace.view import render_view

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
DARK = "--blink-settings=preferredColorScheme=0"


class PageText(HTMLParser):
    """The text of a page: `parts[name]` has the texts of all elements with that id or data-part, one per pane."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: dict[str, list[str]] = {}
        self.attributes: dict[str, list[dict[str, str | None]]] = {}
        self._open: list[tuple[str, str | None]] = []  # (tag, part)
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        part = given.get("data-part") or given.get("id") or ("body" if tag == "body" else None)
        if any(tag == "template" for tag, _ in self._open):
            part = None
        if part:
            self.parts.setdefault(part, []).append("")
            self.attributes.setdefault(part, []).append(given)
        if tag not in ("meta", "input", "link", "br"):
            self._open.append((tag, part))
        self._add("\n" if tag in ("li", "tr", "dt", "p", "div") else " ")

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        self._add(data)

    def _add(self, text: str) -> None:
        for _, part in self._open:
            if part:
                self.parts[part][-1] += text

    def lines(self, part: str, pane: int = 0) -> list[str]:
        """The lines of a part without the spaces around them."""
        return [" ".join(line.split()) for line in self.parts[part][pane].splitlines() if line.strip()]


def chromium(tmp_path: Path, *args: str) -> str:
    """Returns what Chromium prints. Each run has a profile of its own, so that runs cannot disturb each other."""
    assert CHROMIUM is not None
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    run = subprocess.run([CHROMIUM, *FLAGS, profile, *args], capture_output=True, text=True, timeout=120, check=True)
    return run.stdout


def open_page(tmp_path: Path, html: str, fragment: str = "", script: str = "") -> PageText:
    """Opens a page from a file, runs `script` in it, and returns its text."""
    path = tmp_path / "page.html"
    path.write_text(html.replace("</body>", f"<script>{script}</script>\n</body>"), encoding="utf-8")
    return PageText(chromium(tmp_path, "--dump-dom", f"{path.as_uri()}#{fragment}"))


def open_view(tmp_path: Path, traces: Trace | Sequence[Trace], fragment: str = "", script: str = "") -> PageText:
    """Opens the viewer's page of one trace or two."""
    several = [traces] if isinstance(traces, Trace) else list(traces)
    return open_page(tmp_path, render_view(several, ["a.jsonl", "b.jsonl"][: len(several)]), fragment, script)


def evaluate(tmp_path: Path, trace: Trace, expression: str) -> Any:
    """Returns the value of a JavaScript expression in the viewer's page of `trace`, in which `model` is its model."""
    script = (
        'const answer = document.createElement("pre"); answer.id = "answer"; const model = models[0];'
        f"answer.textContent = JSON.stringify({expression}); document.body.append(answer);"
    )
    return json.loads(open_view(tmp_path, trace, script=script).parts["answer"][0])
