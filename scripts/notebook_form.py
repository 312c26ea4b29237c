"""The form of a notebook's questions: each is asked before the experiment, answered after it, and kept out of the code.

Milestone: M2. vLLM counterpart: none. Used by scripts/build_notebooks.py and tests/notebook_checks.py.
"""

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from folovllm.learn.notebook import MEASURE_AGAIN, NOT_OFFERED
from folovllm.learn.notebook_tasks import UNDONE

CALLS = {"ask": "ask", "answer": "ask", "your_turn": "task"}  # function of viz -> table of the file of questions
MAX_TEXT = 20  # characters: shorter texts of the file may occur in the code by chance


@dataclass(frozen=True)
class Call:
    """A call of viz.ask, viz.answer or viz.your_turn in a cell."""

    name: str
    identifier: str
    cell: int
    node: ast.Call


def problems_of_questions(notebook: Any, questions: Mapping[str, Any]) -> list[str]:
    """What is wrong with the questions and tasks of a notebook; with its outputs, too, if it has been executed."""
    trees = [(i, ast.parse(cell.source)) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    calls = [call for cell, tree in trees for call in calls_of(cell, tree)]
    problems = [*problems_of_use(calls, questions), *problems_of_order(calls, trees)]
    problems += problems_of_texts(trees, questions)
    asks = {call.cell for call in calls if call.name == "ask"}
    problems += [f"cell {i}: viz.ask needs a cell of its own" for i, tree in trees if i in asks and len(tree.body) > 1]
    shown = {i: str(cell.get("outputs", [])) for i, cell in enumerate(notebook.cells)}
    outputs = list(shown.values())
    if any(output != "[]" for output in outputs):
        tasks = [call for call in calls if call.name == "your_turn" and f"{UNDONE}." not in shown[call.cell]]
        problems += [f"the task {call.identifier} is not shown as not begun" for call in tasks]
    if any(NOT_OFFERED in output for output in outputs):
        problems.append("a computed answer is none of its options")
    if any(MEASURE_AGAIN in output for output in outputs):
        problems.append(f"it measured more than is possible: {MEASURE_AGAIN}")
    return problems


def calls_of(cell: int, tree: ast.AST) -> Iterator[Call]:
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "viz" and node.func.attr in CALLS:
            first = node.args[0] if node.args else None
            identifier = first.value if isinstance(first, ast.Constant) else ""
            yield Call(node.func.attr, str(identifier), cell, node)


def problems_of_use(calls: Sequence[Call], questions: Mapping[str, Any]) -> list[str]:
    """Each question is asked and answered once, and each task is set once."""
    problems = []
    for name, kind in CALLS.items():
        used = Counter(call.identifier for call in calls if call.name == name)
        wrong = [identifier for identifier in used if identifier not in questions[kind]]
        wrong_count = [identifier for identifier in questions[kind] if used[identifier] != 1]
        problems += [f"viz.{name}({identifier!r}) is not in the file of questions" for identifier in wrong]
        problems += [f"viz.{name}({identifier!r}) is called {used[identifier]} times" for identifier in wrong_count]
    return problems


def problems_of_order(calls: Sequence[Call], trees: Sequence[tuple[int, ast.Module]]) -> list[str]:
    """What an answer needs is computed between the question and the answer."""
    asked = {call.identifier: call.cell for call in calls if call.name == "ask"}
    problems = []
    for call in calls:
        if call.name != "answer" or call.identifier not in asked:
            continue
        asked_in = asked[call.identifier]
        if call.cell <= asked_in:
            problems.append(f"{call.identifier} is answered before it is asked")
        elif not is_computed_between(call, asked_in, trees):
            problems.append(f"what answers {call.identifier} is computed before it is asked")
    return problems


def is_computed_between(call: Call, asked_in: int, trees: Sequence[tuple[int, ast.Module]]) -> bool:
    """Whether the answer uses a name that gets its value after the question, or calls a function of the notebook."""
    computed = call.node.args[1]
    used = {node.id for node in ast.walk(computed) if isinstance(node, ast.Name)}
    called = {
        node.func.id for node in ast.walk(computed) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    new = {name for cell, tree in trees if asked_in < cell <= call.cell for name in names_bound(tree)}
    functions = {node.name for _, tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    return bool(used & new or called & functions)


def names_bound(tree: ast.Module) -> Iterator[str]:
    """The names that a cell gives a value to, those inside its functions left out."""
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            yield statement.name
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def problems_of_texts(trees: Sequence[tuple[int, ast.Module]], questions: Mapping[str, Any]) -> list[str]:
    """Texts of the file that stand in a cell, where a reader sees them too early."""
    texts = {text for entry in questions["ask"].values() for text in texts_of(entry) if len(text) > MAX_TEXT}
    problems = []
    for cell, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in texts:
                problems.append(f"cell {cell} has a text of the file of questions: {node.value!r}")
        if "viz.predict(" in ast.unparse(tree):
            problems.append(f"cell {cell} calls viz.predict, which is now viz.ask and viz.answer")
    return problems


def texts_of(entry: Mapping[str, Any]) -> Iterator[str]:
    yield from (entry["question"], entry["because"])
    yield from (option for option in entry.get("options", []) if isinstance(option, str))
