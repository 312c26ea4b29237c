"""Notebooks 02 and 05: each runs in fast mode, checks itself, and is committed as its source builds it.

Milestone: M4. vLLM counterpart: none. The same for the other notebooks: tests/m2/test_notebooks.py.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
import torch
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import build_notebooks  # noqa: E402

pytestmark = pytest.mark.m4

NUMBERS = ("02", "05")
NOTEBOOKS = [pytest.param(source, id=source.stem) for source in build_notebooks.sources() if source.stem[:2] in NUMBERS]


@pytest.fixture(autouse=True)
def pictures_go_nowhere() -> Iterator[None]:
    with matplotlib.rc_context(), contextlib.suppress(ImportError):
        plt.switch_backend("Agg")
        yield
        plt.close("all")


def test_both_are_there() -> None:
    assert len(NOTEBOOKS) == len(NUMBERS)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_runs_and_its_asserts_hold(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All code cells in one namespace, in the folder where a reader runs them; no kernel is started."""
    monkeypatch.chdir(ROOT / "notebooks")
    notebook = build_notebooks.read_source(source)
    build_notebooks.make_fast(notebook)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    dtype = torch.get_default_dtype()
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{source.name}, cell {number}", "exec"), namespace)
    assert torch.get_default_dtype() is dtype, "it must leave torch as it found it"


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_the_committed_notebook_is_its_source(source: Path) -> None:
    assert build_notebooks.disagreement(source) is None
    notebook = nbformat.read(build_notebooks.target_of(source), as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it was committed without its pictures"
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert build_notebooks.target_of(source).stat().st_size <= build_notebooks.MAX_BYTES


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_asks_and_checks(source: Path) -> None:
    code = [cell.source for cell in build_notebooks.read_source(source).cells if cell.cell_type == "code"]
    assert sum("viz.predict(" in cell for cell in code) >= 3
    assert "assert " in code[-1], "the last cell must check what the notebook claims"
