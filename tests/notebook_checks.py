"""What is asked of every notebook, whatever its milestone: tests/m*/test_notebooks.py say which ones, and what else."""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt

from folovllm import viz

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import build_notebooks  # noqa: E402

MIN_PREDICTIONS = 3  # questions that a reader answers before the cell is run


def sources(*numbers: str) -> list[Path]:
    """The sources of notebooks "02", "05", ...; every one of them must be there."""
    found = [source for source in build_notebooks.sources() if source.stem[:2] in numbers]
    assert len(found) == len(numbers), (numbers, found)
    return found


@contextlib.contextmanager
def pictures_go_nowhere() -> Iterator[None]:
    with matplotlib.rc_context(), contextlib.suppress(ImportError):
        plt.switch_backend("Agg")
        yield
        plt.close("all")


def run_fast(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All code cells in one namespace, in the folder where a reader runs them; no kernel is started."""
    monkeypatch.chdir(ROOT / "notebooks")
    notebook = build_notebooks.read_source(source)
    build_notebooks.make_fast(notebook)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{source.name}, cell {number}", "exec"), namespace)


def check_tasks(source: Path, monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, str]) -> None:
    """Every task of a notebook accepts a right answer and rejects a wrong one.

    `answers` says what stands in the place of which text of a cell. Each text must occur once in the notebook.
    """
    text = source.read_text(encoding="utf-8")
    for undone, done in answers.items():
        assert text.count(undone) == 1, f"{source.name} has {undone!r} {text.count(undone)} times"
        text = text.replace(undone, done)
    verdicts: list[tuple[str, str, str]] = []
    shown = viz.your_turn

    def your_turn(title: str, answer: Any, expected: Any, hint: str = "") -> Any:
        wrong = (lambda *args: "wrong") if callable(answer) else "wrong"
        right = shown(title, answer, expected, hint)
        verdicts.append((title, repr(right), repr(shown(title, wrong, expected, hint))))
        return right

    monkeypatch.setattr(viz, "your_turn", your_turn)
    monkeypatch.chdir(ROOT / "notebooks")
    exec(compile(text.replace("FAST = False", "FAST = True"), source.name, "exec"), {"__name__": "__main__"})
    assert len(verdicts) == len(answers)
    for title, right, wrong in verdicts:
        assert f"\n{viz.PASSED}." in right and f"\n{viz.FAILED}." in wrong, (title, right, wrong)


def check_committed(source: Path) -> None:
    """The committed notebook is what its source builds, ran without errors, has pictures, and is not too large."""
    assert build_notebooks.disagreement(source) is None
    notebook = nbformat.read(build_notebooks.target_of(source), as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it was committed without its pictures"
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert build_notebooks.target_of(source).stat().st_size <= build_notebooks.MAX_BYTES


def check_asks(source: Path) -> None:
    code = [cell.source for cell in build_notebooks.read_source(source).cells if cell.cell_type == "code"]
    assert sum("viz.predict(" in cell for cell in code) >= MIN_PREDICTIONS
    assert "assert " in code[-1], "the last cell must check what the notebook claims"
