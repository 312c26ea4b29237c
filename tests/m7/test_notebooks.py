"""Notebook 08: it runs in fast mode, checks itself, asks, and is committed as its source builds it.

Milestone: M7. vLLM counterpart: none. The same for the other notebooks: tests/m2/test_notebooks.py.
"""

import contextlib
import sys
import warnings
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

pytestmark = pytest.mark.m7

SOURCE = ROOT / "notebooks" / "src" / "08_gptq.py"


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Pictures go nowhere; what the notebook does to threads and warnings ends with it."""
    threads = torch.get_num_threads()
    with matplotlib.rc_context(), warnings.catch_warnings(), contextlib.suppress(ImportError):
        plt.switch_backend("Agg")
        yield
        plt.close("all")
    torch.set_num_threads(threads)


def test_it_runs_and_its_asserts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """All code cells in one namespace, in the folder where a reader runs them; no kernel is started."""
    monkeypatch.chdir(ROOT / "notebooks")
    notebook = build_notebooks.read_source(SOURCE)
    build_notebooks.make_fast(notebook)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{SOURCE.name}, cell {number}", "exec"), namespace)


def test_the_committed_notebook_is_its_source() -> None:
    assert build_notebooks.disagreement(SOURCE) is None
    notebook = nbformat.read(build_notebooks.target_of(SOURCE), as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it was committed without its pictures"
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert build_notebooks.target_of(SOURCE).stat().st_size <= build_notebooks.MAX_BYTES


def test_it_asks_and_checks() -> None:
    code = [cell.source for cell in build_notebooks.read_source(SOURCE).cells if cell.cell_type == "code"]
    assert sum("viz.predict(" in cell for cell in code) >= 3
    assert "assert " in code[-1], "the last cell must check what the notebook claims"
