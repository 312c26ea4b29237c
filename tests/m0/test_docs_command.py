"""`folovllm docs` as a reader types it: the list of pages, the list of examples, and examples run from any folder."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from folovllm.learn import pages as learn_pages
from tests.page_checks import ROOT

pytestmark = pytest.mark.m0

GOOD = "```python\n# runs: adds\nprint(1 + 1)\n```\n\n```text\n2\n```\n"
CHANGED = "```python\n# runs\nimport math\nvalue = math.sqrt(9)\nprint(value)\n```\n\n```text\n4.0\n```\n"
FAILING = "```python\n# runs\nprint('before')\nassert 1 == 2\n```\n\n```text\nbefore\n```\n"
LIST = """
[[page]]
file = "learn/00_start.md"
title = "Start"
[[page]]
file = "learn/00_setup.md"
title = "Setup"
[[page]]
file = "learn/01_first.md"
title = "First"
[[page]]
file = "learn/02_not_written_yet.md"
title = "Later"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with pages of its own, and an empty current folder."""
    docs = tmp_path / "folovllm/_docs"
    (docs / "learn").mkdir(parents=True)
    (docs / "data").mkdir()
    (docs / "data/pages.toml").write_text(LIST)
    texts = {"00_start": "word " * 130, "00_setup": "word " * 131, "01_first": f"# T\n\n{GOOD}\n{CHANGED}\n{FAILING}"}
    for name, text in texts.items():
        (docs / f"learn/{name}.md").write_text(text)
    monkeypatch.setattr(learn_pages, "PACKAGE", tmp_path / "folovllm")
    monkeypatch.chdir(tmp_path)
    return docs


def docs(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["docs", *args])
    assert result.exit_code == code, result.output
    return result.output


def test_the_pages_with_their_times(here: Path) -> None:
    lines = docs().splitlines()
    assert lines[:3] == [
        "00        Start (1 minute)",
        "00_setup  Setup (2 minutes)",
        "01        First (4 minutes, 3 examples)",
    ]
    assert "Later" not in "".join(lines)
    assert docs("list").splitlines() == lines


def test_a_number_is_not_shown_twice(here: Path) -> None:
    file = here / "data/pages.toml"
    file.write_text(file.read_text().replace('"First"', '"01 First"'))
    assert "01        First (4 minutes, 3 examples)" in docs()


@pytest.mark.parametrize("words", [["list", "01"], ["01"], ["m1"], ["1"], ["first"], ["docs/learn/01_first.md"]])
def test_the_examples_of_a_page(here: Path, words: list[str]) -> None:
    printed = docs(*words)
    assert "  1  line   4  adds\n" in printed
    assert "  2  line  13  value = math.sqrt(9)\n" in printed


def test_an_example_says_whether_the_page_is_right(here: Path) -> None:
    right = docs("run", "01", "1")
    assert "print(1 + 1)" in right and "\n  2\n" in right and "This is what the page shows." in right
    wrong = docs("run", "1", "2", code=1)
    assert "-4.0\n+3.0" in wrong


def test_a_failing_example_shows_its_own_lines_and_the_others_still_run(here: Path) -> None:
    printed = docs("run", "first", code=1)
    assert "1 of 3 examples" in printed
    assert "line 26, in <module>" in printed and "assert 1 == 2" in printed
    assert "It printed before:\nbefore\n" in printed
    assert "pages.py" not in printed


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run", "09"], "no page '09'; there are 00, 00_setup, 01"),
        (["run", "0x"], "no page '0x'; there are 00, 00_setup, 01\n"),
        (["run", "01_frist"], "did you mean '01_first'?"),
        (["lst", "01"], "no page 'lst'; there are 00, 00_setup, 01\n"),
        (["run", "00_"], "'00_' may be 00_start or 00_setup"),
        (["run", "01", "4"], "page 01 has examples 1 to 3, not 4"),
        (["run", "01", "0"], "page 01 has examples 1 to 3, not 0"),
        (["run", "01", "x"], "page 01 has examples 1 to 3, not x"),
        (["run", "01", "-1"], "page 01 has examples 1 to 3, not -1"),
        (["m0"], "page 00 has no examples"),
        (["list", "00"], "page 00 has no examples; these have some: 01"),
    ],
)
def test_a_mistake_gives_one_line_that_names_the_fix(here: Path, args: list[str], words: str) -> None:
    assert words in docs(*args, code=2)


def test_the_second_page_of_a_number_is_named(here: Path) -> None:
    (here / "learn/00_start.md").write_text(GOOD)
    assert "Another page has this number: folovllm docs list 00_setup" in docs("m0")
    assert "Another page" not in docs("00_start") and "Another page" not in docs("01")


def test_the_wheel_carries_the_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What hatch_build.py names, put where it says, is what an installed package reads."""
    names = ["hatchling", "builders", "hooks", "plugin", "interface"]
    for depth in range(len(names)):  # hatchling is only there while a wheel is built
        monkeypatch.setitem(sys.modules, ".".join(names[: depth + 1]), SimpleNamespace(BuildHookInterface=object))
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec and spec.loader
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    before = [(page.file, page.text()) for page in learn_pages.load_pages()]
    for path in hatch_build.carried(ROOT):
        copy = tmp_path / f"folovllm/_{path.relative_to(ROOT)}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    monkeypatch.setattr(learn_pages, "PACKAGE", tmp_path / "folovllm")
    assert [(page.file, page.text()) for page in learn_pages.load_pages()] == before
    assert (tmp_path / "folovllm/_milestones/manifest.toml").is_file()
