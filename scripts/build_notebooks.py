"""Build the notebooks: notebooks/src/NN_name.py (py:percent) -> notebooks/NN_name.ipynb, executed, with its pictures.

Milestone: M1 (grows with the notebooks). vLLM counterpart: none. No network, no weights, no GPU.

    python scripts/build_notebooks.py               build and execute all of them
    python scripts/build_notebooks.py --only 03     one of them; --only 00,03 two
    python scripts/build_notebooks.py --fast        with fewer repetitions (FAST = True in the cell tagged "parameters")
    python scripts/build_notebooks.py --check       write nothing: sources and committed notebooks must agree, and every
                                                    notebook must execute without an error in fast mode

The texts of questions and tasks are in notebooks/src/questions_NN.toml (folovllm/learn/notebook.py says how). A build
fails if a question comes after what answers it (scripts/notebook_form.py).

The source is what one edits and reviews; the .ipynb is what GitHub shows. The result depends on the source alone: cell
ids are counted, not drawn, and no time stamps are kept.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from notebook_form import problems_of_questions

from folovllm.learn.notebook import read_questions

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "notebooks" / "src"
TARGETS = ROOT / "notebooks"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TIMEOUT_S = 120
MAX_BYTES = 400_000  # a notebook is read on a web page


class NotebookProblem(Exception):
    """Something the author has to repair; its text says what."""


def sources() -> list[Path]:
    return sorted(SOURCES.glob("[0-9][0-9]_*.py"))


def target_of(source: Path) -> Path:
    return TARGETS / f"{source.stem}.ipynb"


def read_source(source: Path) -> Any:
    """The notebook of a source, not executed, the same object for the same text."""
    parsed = jupytext.read(source, fmt="py:percent")
    cells = []
    for number, cell in enumerate(parsed.cells):
        metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        cells.append(make(cell.source, metadata=metadata, id=f"cell-{number:02}"))
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def make_fast(notebook: Any) -> None:
    """Set FAST = True in the cell tagged "parameters"."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1 or "FAST = False" not in cells[0].source:
        raise NotebookProblem('needs exactly one cell tagged "parameters" with the line FAST = False')
    cells[0].source = cells[0].source.replace("FAST = False", "FAST = True")


def execute(notebook: Any, name: str) -> None:
    """Run all cells in a fresh kernel, in the folder where a reader would run them."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    client = NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(TARGETS)}},
        on_cell_executed=lambda cell, cell_index, execute_reply: _progress(name, cell_index + 1, len(notebook.cells)),
    )  # fmt: skip
    try:
        client.execute()
    except CellExecutionError as error:
        raise NotebookProblem(f"a cell failed:\n{error}") from None
    finally:
        print(file=sys.stderr)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})


def _progress(name: str, done: int, total: int) -> None:
    print(f"\r  {name}: cell {done} of {total}", end="", file=sys.stderr, flush=True)


def check_questions(source: Path, notebook: Any) -> None:
    problems = problems_of_questions(notebook, read_questions(source.stem[:2]))
    if problems:
        raise NotebookProblem("; ".join(problems))


def disagreement(source: Path) -> str | None:
    """How the committed notebook differs from its source. Returns None if it is what the source builds."""
    target = target_of(source)
    if not target.is_file():
        return f"{target.name} does not exist"
    wanted, there = read_source(source).cells, nbformat.read(target, as_version=4).cells
    if len(wanted) != len(there):
        return f"{target.name} has {len(there)} cells, {source.name} has {len(wanted)}"
    for number, (a, b) in enumerate(zip(wanted, there, strict=True)):
        if (a.cell_type, a.source, a.metadata, a.id) != (b.cell_type, b.source, b.metadata, b.id):
            return f"cell {number} of {target.name} is not that of {source.name}"
    return None


def build(source: Path, fast: bool) -> Path:
    notebook = read_source(source)
    check_questions(source, notebook)
    committed_sources = [cell.source for cell in notebook.cells]
    if fast:
        make_fast(notebook)
    execute(notebook, source.stem)
    for cell, text in zip(notebook.cells, committed_sources, strict=True):
        cell.source = text  # fast or not, the notebook shows its source
    check_questions(source, notebook)  # now with its outputs
    text = nbformat.writes(notebook) + "\n"
    if str(ROOT) in text or '"name": "stderr"' in text:
        raise NotebookProblem("an output holds a folder of this machine, or a warning: silence its cause")
    if len(text.encode()) > MAX_BYTES:
        raise NotebookProblem(f"{len(text.encode()):,} bytes are more than {MAX_BYTES:,}: smaller or fewer pictures")
    target_of(source).write_text(text, encoding="utf-8")
    return target_of(source)


def check(source: Path) -> str:
    problem = disagreement(source)
    if problem:
        raise NotebookProblem(f"{problem}: run python scripts/build_notebooks.py --only {source.stem[:2]}")
    notebook = read_source(source)
    make_fast(notebook)
    execute(notebook, source.stem)
    return "agrees and runs"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build and execute the notebooks, or check them.")
    parser.add_argument("--check", action="store_true", help="write nothing; compare and execute in fast mode")
    parser.add_argument("--fast", action="store_true", help="fewer repetitions")
    parser.add_argument("--only", default="", help="numbers, such as 03 or 00,03")
    args = parser.parse_args(argv)
    numbers = [n.strip() for n in args.only.split(",") if n.strip()]
    unknown = set(numbers) - {source.stem[:2] for source in sources()}
    if unknown:
        parser.error(f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(s.stem for s in sources())}")
    chosen = [source for source in sources() if not numbers or source.stem[:2] in numbers]
    failures = 0
    for source in chosen:
        start = time.monotonic()
        try:
            done = check(source) if args.check else _size(build(source, args.fast))
            print(f"{source.stem}: {done}, {time.monotonic() - start:.1f} s")
        except NotebookProblem as problem:
            failures += 1
            print(f"{source.stem}: {problem}")
    return 1 if failures else 0


def _size(path: Path) -> str:
    return f"{path.relative_to(ROOT)}, {path.stat().st_size / 1000:.0f} kB"


if __name__ == "__main__":
    sys.exit(main())
