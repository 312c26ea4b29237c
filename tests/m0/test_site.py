"""The site that mkdocs makes of the pages: navigation, links into the repository, and a strict build (R0.73)."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.page_checks import ROOT, anchors_of, slug
from tests.script_loader import load_script

pytestmark = pytest.mark.m0

hooks = load_script("mkdocs_hooks")
REPO = "https://example.org/repo"


@pytest.mark.parametrize(
    ("markdown", "shown"),
    [
        (
            '[`Request`](../../folovllm/request.py#L3 "folovllm/request.py#Request")',
            f'[`Request`]({REPO}/blob/main/folovllm/request.py#L3 "folovllm/request.py#Request")',
        ),
        ("[m3](../../milestones/m3)", f"[m3]({REPO}/tree/main/milestones/m3)"),
        ("[a](../glossary.md#token), ![b](img/x.png), [c](#here), [d](https://x.org/y)", None),
        ("`](../../README.md)`", None),
        ("Three ways:\n- one\n- two", "Three ways:\n\n- one\n- two"),
        ("- one\n  more\n- two\n\n1. a\n1. b", None),
        ("```text\na:\n- b\n<details>\n```", None),
        (
            "<details><summary>Answers</summary>\n\n1. A\n</details>",
            "<details markdown><summary>Answers</summary>\n\n1. A\n</details>",
        ),
    ],
)
def test_a_page_is_changed_where_the_site_needs_it(markdown: str, shown: str | None) -> None:
    assert hooks.for_the_site(markdown, ROOT / "docs/learn/03_paged_kv_cache.md", REPO) == (shown or markdown)


def test_the_navigation_has_every_page_once() -> None:
    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [f for value in (entry.values() if isinstance(entry, dict) else entry) for f in files(value)]

    docs = ROOT / "docs"
    assert sorted(files(hooks.navigation())) == sorted(p.relative_to(docs).as_posix() for p in docs.rglob("*.md"))


def test_headings_have_the_anchors_of_github() -> None:
    for heading in ("Order of freeing", "What <code>[]</code> means: a trap!", "M3 — the cache"):
        assert hooks.github_slug(heading, "-") == slug(re.sub(r"</?code>", "`", heading))
    assert "block-table" in anchors_of(ROOT / "docs/glossary.md")


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra [docs]; make site installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "learn/03_paged_kv_cache.html").read_text(encoding="utf-8")
    assert 'class="codehilite"' in page and '<a href="../glossary.html#' in page
    assert "/blob/main/folovllm/core/block_pool.py#L" in page
    loaded = re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"(https?://[^\"]+)\"", page)
    assert not loaded, "the site must load nothing from other hosts"
