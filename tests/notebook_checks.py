"""What is asked of every notebook, whatever its milestone: tests/m*/test_notebooks.py say which ones, and what else."""

import ast
import asyncio
import contextlib
import inspect
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
import pytest
from matplotlib import pyplot as plt

from folovllm import viz
from folovllm.learn.notebook import read_questions

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import build_notebooks  # noqa: E402
from notebook_form import problems_of_questions  # noqa: E402

MIN_PREDICTIONS = 3  # questions that a reader answers before the cell is run
SLOW = ("00", "01", "06", "07", "08", "09", "10")  # notebooks that take seconds for each other value of a knob
NUM_TASKS = 3  # cells in which the reader writes something that is checked


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


def run_fast(source: Path, monkeypatch: pytest.MonkeyPatch, turn: Mapping[str, str] | None = None) -> str:
    """Runs all code cells in one namespace, in the folder where a reader runs them; no kernel is started.

    `turn` gives other values to knobs, at the end of the cell that sets them. Returns what the cells have printed.
    """
    monkeypatch.chdir(ROOT / "notebooks")
    notebook = build_notebooks.read_source(source)
    build_notebooks.make_fast(notebook)
    for name, value in (turn or {}).items():
        (cell,) = [c for c in notebook.cells if re.search(rf"^(\w+, )*{name}(, \w+)* = ", c.source, re.MULTILINE)]
        cell.source += f"\n{name} = {value}"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), asyncio.Runner() as runner:
        for number, cell in enumerate(notebook.cells):
            if cell.cell_type == "code":
                run_code(cell.source, f"{source.name}, cell {number}", namespace, runner)
    return printed.getvalue()


def run_code(code: str, name: str, namespace: dict[str, Any], runner: asyncio.Runner) -> None:
    """Runs code that may have `await` outside of functions, as a notebook does. All cells share one event loop."""
    result = eval(compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace)
    if inspect.iscoroutine(result):
        runner.run(result)


def marks_of(number: str, marks: Mapping[str, pytest.MarkDecorator]) -> list[pytest.MarkDecorator]:
    slow = [pytest.mark.slow] if number in SLOW else []
    return [marks[number], *slow] if number in marks else slow


def turns_of(*numbers: str, marks: Mapping[str, pytest.MarkDecorator] | None = None) -> list[Any]:
    """Other values of the knobs of notebooks "02", "05", ...: with each of them, the notebook must run to its end."""
    return [
        pytest.param(
            source,
            turn,
            id=f"{source.stem[:2]}-{'-'.join(turn)}-{i}",
            marks=marks_of(source.stem[:2], marks or {}),
        )
        for source in sources(*numbers)
        for i, turn in enumerate(read_questions(source.stem[:2])["turn"])
    ]


def check_turned(source: Path, turn: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run_fast(source, monkeypatch, turn)
    assert "You have changed" in printed, "the last cell checks what holds for other knobs only"


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

    def your_turn(identifier: str, answer: Any, expected: Any) -> Any:
        wrong = (lambda *args: "wrong") if callable(answer) else "wrong"
        right = shown(identifier, answer, expected)
        verdicts.append((identifier, repr(right), repr(shown(identifier, wrong, expected))))
        return right

    monkeypatch.setattr(viz, "your_turn", your_turn)
    monkeypatch.chdir(ROOT / "notebooks")
    with asyncio.Runner() as runner:
        run_code(text.replace("FAST = False", "FAST = True"), source.name, {"__name__": "__main__"}, runner)
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
    """What a reader has to do, and in which order: the form of every notebook."""
    notebook = nbformat.read(build_notebooks.target_of(source), as_version=4)
    problems = form_problems(notebook, build_notebooks.target_of(source).parent)
    problems += problems_of_questions(notebook, read_questions(source.stem[:2]))
    assert not problems, f"{source.name}: " + "; ".join(problems)


def form_problems(notebook: Any, folder: Path) -> list[str]:
    """What is wrong with the form of an executed notebook that lies in `folder`."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    body, last = code[:-1], code[-1]
    num_predictions = sum("viz.ask(" in cell for cell in body)
    num_tasks = sum("viz.your_turn(" in cell for cell in body)
    rules = {
        f"{num_predictions} predictions are fewer than {MIN_PREDICTIONS}": num_predictions >= MIN_PREDICTIONS,
        f"it has {num_tasks} tasks, not {NUM_TASKS}": num_tasks == NUM_TASKS,
        "it does not show the engine's source": any("viz.source(" in cell for cell in body),
        "the last cell must check what the notebook claims": "assert " in last,
        "a reader has no tests.*": not any(
            re.search(r"^\s*(from|import) tests\b", cell, re.MULTILINE) for cell in code
        ),
    }
    wrong = [problem for problem, kept in rules.items() if not kept]
    return wrong + header_problems(notebook.cells[0].source, folder) + early_answers(notebook.cells)


def header_problems(header: str, folder: Path) -> list[str]:
    """The first cell says how long it takes, which page belongs to it, and what comes next."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", header)
    rules = {
        "its header does not say how many minutes it takes": re.search(r"\b\d+ minutes\b", header),
        "its header links no page of docs/learn": any(link.startswith("../docs/learn/") for link in links),
        "its header does not say what is next": "Next: " in header,
    }
    dead = [f"its header links {link}, which does not exist" for link in links if not (folder / link).exists()]
    return [problem for problem, kept in rules.items() if not kept] + dead


def early_answers(cells: Sequence[Any]) -> list[str]:
    """Predictions that come too late, as far as it can be told: behind the first picture or printed line of a section.

    Tables and source code may stand before a question, and so may a cell with the tag "given": it shows what the reader
    answers from. What a section shows after its first question may belong to that one.
    """
    problems, heading, shown, has_asked = [], "", False, False
    for cell in cells:
        if cell.cell_type == "markdown":
            if found := re.findall(r"^## (.*)$", cell.source, re.MULTILINE):
                heading, shown, has_asked = found[-1], False, False
            continue
        prints = any(o.output_type == "stream" or "image/png" in o.get("data", {}) for o in cell.outputs)
        if "viz.ask(" in cell.source and (prints or (shown and not has_asked)):
            problems.append(f"section {heading!r} asks for a prediction after something was drawn or printed")
        has_asked |= "viz.ask(" in cell.source
        shown |= prints and "given" not in cell.metadata.get("tags", [])
    return problems
