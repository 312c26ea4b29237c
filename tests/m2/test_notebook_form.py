"""The checks of a notebook's form can fail: a notebook that keeps all rules, broken in one place at a time.

Milestone: M2. vLLM counterpart: none. The checks themselves: tests/notebook_checks.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from folovllm.learn.notebook import MEASURE_AGAIN, NOT_OFFERED
from tests import notebook_checks
from tests.notebook_checks import problems_of_questions

pytestmark = pytest.mark.m2

(SOURCE,) = notebook_checks.sources("03")
TARGET = notebook_checks.build_notebooks.target_of(SOURCE)


def cell_with(notebook: Any, text: str, kind: str) -> Any:
    return next(cell for cell in notebook.cells if cell.cell_type == kind and text in cell.source)


def without_tag(notebook: Any) -> None:
    next(cell for cell in notebook.cells if "given" in cell.metadata.get("tags", [])).metadata = {}


def prints_beside_its_question(notebook: Any) -> None:
    line = nbformat.v4.new_output("stream", name="stdout", text="2\n")
    cell_with(notebook, "viz.ask(", "code").outputs.append(line)


def rewritten(old: str, new: str, kind: str = "markdown") -> Callable[[Any], None]:
    def change(notebook: Any) -> None:
        cell = cell_with(notebook, old, kind)
        cell.source = cell.source.replace(old, new)

    return change


BROKEN = {
    "no minutes": (rewritten("minutes", "pages"), "how many minutes"),
    "no page": (rewritten("../docs/learn/", "../docs/"), "links no page"),
    "a dead link": (rewritten("02_continuous_batching.md", "02_nowhere.md"), "which does not exist"),
    "nothing next": (rewritten("Next: ", "Then "), "what is next"),
    "a task less": (rewritten("viz.your_turn(", "str(", "code"), "it has 2 tasks"),
    "a module of the tests": (
        rewritten("import random\n", "from tests.tiny_models import make_tiny\n", "code"),
        "no tests",
    ),
    "a picture before its question": (without_tag, "'More seats: when does it stop helping?' asks"),
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


QUESTIONS = {
    "ask": {
        "90.1": {
            "question": "How many steps does the batch take?",
            "options": [6, 8],
            "because": "It takes eight steps.",
        },
    },
    "task": {"90.t1": {"title": "a task"}},
}
ASK, RUN, ANSWER, TASK = (
    'viz.ask("90.1")',
    "steps = run()",
    'viz.answer("90.1", len(steps))',
    'viz.your_turn("90.t1", 1, 1)',
)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([ASK, RUN, ANSWER, TASK], None),
        ([ASK, "def count(): ...", 'viz.answer("90.1", count())', TASK], None),
        ([RUN, ASK, ANSWER, TASK], "what answers 90.1 is computed before it is asked"),
        ([ANSWER, ASK, RUN, TASK], "90.1 is answered before it is asked"),
        ([f"{RUN}\n{ASK}", RUN, ANSWER, TASK], "viz.ask needs a cell of its own"),
        ([ASK, RUN, TASK], "viz.answer('90.1') is called 0 times"),
        ([ASK, RUN, ANSWER, TASK, ASK], "viz.ask('90.1') is called 2 times"),
        ([ASK, RUN, ANSWER, TASK, 'viz.ask("90.2")'], "viz.ask('90.2') is not in the file of questions"),
        ([ASK, RUN, ANSWER], "viz.your_turn('90.t1') is called 0 times"),
        ([ASK, RUN, 'because = "It takes eight steps."', ANSWER, TASK], "cell 2 has a text of the file of questions"),
        ([ASK, RUN, ANSWER, TASK, "viz.predict()"], "calls viz.predict"),
    ],
)
def test_a_question_comes_before_what_answers_it(cells: list[str], said: str | None) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    problems = problems_of_questions(notebook, QUESTIONS)
    assert not problems if said is None else any(said in problem for problem in problems), problems


@pytest.mark.parametrize("shown", [NOT_OFFERED, MEASURE_AGAIN])
def test_a_run_that_contradicts_itself_is_not_published(shown: str) -> None:
    cells = [nbformat.v4.new_code_cell(cell) for cell in (ASK, RUN, ANSWER, TASK)]
    cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"it says: {shown}\n")]
    cells[3].outputs = [nbformat.v4.new_output("stream", name="stdout", text="To do.\n")]
    assert len(problems_of_questions(nbformat.v4.new_notebook(cells=cells), QUESTIONS)) == 1


def test_a_task_is_published_undone() -> None:
    cells = [nbformat.v4.new_code_cell(cell) for cell in (ASK, RUN, ANSWER, TASK)]
    cells[3].outputs = [nbformat.v4.new_output("stream", name="stdout", text="Passed.\n")]
    assert problems_of_questions(nbformat.v4.new_notebook(cells=cells), QUESTIONS) == [
        "the task 90.t1 is not shown as not begun"
    ]


def test_every_notebook_is_in_some_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].glob("m*/test_notebooks.py"))
    missing = [s.stem for s in notebook_checks.build_notebooks.sources() if f'"{s.stem[:2]}"' not in tests]
    assert not missing
