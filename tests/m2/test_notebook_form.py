"""The checks of a notebook's form can fail: a notebook that keeps all rules, broken in one place at a time.

Milestone: M2. vLLM counterpart: none. The checks themselves: tests/notebook_checks.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests import notebook_checks

pytestmark = pytest.mark.m2

(SOURCE,) = notebook_checks.sources("00")
TARGET = notebook_checks.build_notebooks.target_of(SOURCE)


def cell_with(notebook: Any, text: str) -> Any:
    return next(cell for cell in notebook.cells if text in cell.source)


def without_tag(notebook: Any) -> None:
    next(cell for cell in notebook.cells if "given" in cell.metadata.get("tags", [])).metadata = {}


def prints_beside_its_question(notebook: Any) -> None:
    line = nbformat.v4.new_output("stream", name="stdout", text="2\n")
    cell_with(notebook, "viz.predict(").outputs.append(line)


def rewritten(old: str, new: str) -> Callable[[Any], None]:
    def change(notebook: Any) -> None:
        cell = cell_with(notebook, old)
        cell.source = cell.source.replace(old, new)

    return change


BROKEN = {
    "no minutes": (rewritten("minutes", "pages"), "how many minutes"),
    "no page": (rewritten("../docs/learn/", "../docs/"), "links no page"),
    "a dead link": (rewritten("00_start_here.md", "00_nowhere.md"), "which does not exist"),
    "nothing next": (rewritten("Next: ", "Then "), "what is next"),
    "a task less": (rewritten("viz.your_turn(", "str("), "it has 2 tasks"),
    "a module of the tests": (rewritten("import torch\n", "from tests.tiny_models import make_tiny\n"), "no tests"),
    "a picture before its question": (without_tag, "'The 12 stops' asks"),
    "an answer beside its question": (prints_beside_its_question, "asks for a prediction after"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_in_the_form_is_found(fault: str) -> None:
    change, said = BROKEN[fault]
    notebook = nbformat.read(TARGET, as_version=4)
    assert not notebook_checks.form_problems(notebook, TARGET.parent)
    change(notebook)
    problems = notebook_checks.form_problems(notebook, TARGET.parent)
    assert any(said in problem for problem in problems), problems


def test_every_notebook_is_in_some_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("m*/test_notebooks.py"))
    missing = [s.stem for s in notebook_checks.build_notebooks.sources() if f'"{s.stem[:2]}"' not in tests]
    assert not missing
