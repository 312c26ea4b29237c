"""The notebooks: each runs in fast mode, checks itself, and is committed as its source builds it."""

import contextlib
import sys
from pathlib import Path

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import build_notebooks  # noqa: E402

MILESTONE = {"00": pytest.mark.m1, "01": pytest.mark.m1, "03": pytest.mark.m2, "04": pytest.mark.m3}
NOTEBOOKS = [  # later milestones test their own
    pytest.param(source, id=source.stem, marks=MILESTONE[source.stem[:2]])
    for source in build_notebooks.sources()
    if source.stem[:2] in MILESTONE
]


@pytest.fixture(autouse=True)
def pictures_go_nowhere():
    with matplotlib.rc_context(), contextlib.suppress(ImportError):
        plt.switch_backend("Agg")
        yield
        plt.close("all")


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_runs_and_its_asserts_hold(source, monkeypatch):
    """All code cells in one namespace, in the folder where a reader runs them; no kernel is started."""
    monkeypatch.chdir(ROOT / "notebooks")
    notebook = build_notebooks.read_source(source)
    build_notebooks.make_fast(notebook)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{source.name}, cell {number}", "exec"), namespace)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_the_committed_notebook_is_its_source(source):
    assert build_notebooks.disagreement(source) is None
    notebook = nbformat.read(build_notebooks.target_of(source), as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it was committed without its pictures"
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert build_notebooks.target_of(source).stat().st_size <= build_notebooks.MAX_BYTES


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_asks_and_checks(source):
    code = [cell.source for cell in build_notebooks.read_source(source).cells if cell.cell_type == "code"]
    assert sum("viz.predict(" in cell for cell in code) >= 3
    assert "assert " in code[-1], "the last cell must check what the notebook claims"
