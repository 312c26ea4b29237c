"""The block of docs/project_structure.md: every file of the package with its first sentence and its vLLM counterpart.

Milestone: M0. vLLM counterpart: none. Both come from the text at the head of the file.
"""

import ast
import re
from pathlib import Path

from front_index import link, table
from page_links import VLLM_FILES
from page_symbols import vllm_symbols

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "folovllm"
SUFFIXES = {".py", ".cpp", ".h", ".js", ".css", ".html"}
UPSTREAM_FILE = re.compile(r"(?<![\w/`])(?:vllm|csrc|cmake|benchmarks)/[\w./{},*]*[\w/](?:#[\w.]+)?")


def files(folder: Path) -> str:
    """One table per folder. Files without a text, such as an empty __init__.py, are left out."""
    shown = shown_files()
    groups = {at: [file for file in shown if file.parent == at] for at in sorted({file.parent for file in shown})}
    return "\n".join(
        f"### {at.relative_to(ROOT).as_posix()}/\n\n{table_of(group, folder)}" for at, group in groups.items()
    )


def shown_files() -> list[Path]:
    found = (path for path in PACKAGE.rglob("*") if path.suffix in SUFFIXES and "__pycache__" not in path.parts)
    return sorted(path for path in found if head_of(path))


def table_of(group: list[Path], folder: Path) -> str:
    rows = []
    for file in group:
        head = head_of(file)
        rows.append((link(f"`{file.name}`", file, folder), cell(first_sentence(head)), counterpart(head)))
    return table("file | what it is | in vLLM", rows)


def head_of(file: Path) -> str:
    """The text at the head of a file: its docstring, or the comment that it begins with."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    if file.suffix in (".cpp", ".h", ".js"):
        lines = re.match(r"(?://[^\n]*\n)*", text)[0].splitlines()  # type: ignore[index]
        return "\n".join(line.removeprefix("//").strip() for line in lines)
    comment = re.search(r"/\*\s*(.*?)\s*\*/|<!--\s*(.*?)\s*-->|<title>(.*?)</title>", text, re.DOTALL)
    return next((part for part in comment.groups() if part), "") if comment else ""


def first_sentence(text: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`\"])", paragraph)[0]


def counterpart(head: str) -> str:
    """What stands behind "vLLM counterpart:", up to the end of the sentence; "-" if there is none."""
    said = re.search(r"vLLM counterparts?:\s*(.+?)(?=\n\s*\n|\Z)", head, re.DOTALL)
    if said is None:
        return "-"
    sentence = re.split(r"\.(?:\s|$)", " ".join(said[1].split()))[0]
    return "-" if sentence == "none" else UPSTREAM_FILE.sub(upstream, cell(sentence))


def upstream(match: re.Match[str]) -> str:
    """A file of vLLM: a link if docs/data/vllm_symbols.json knows it at the pinned tag, else its name as code."""
    path = match.group()
    if path in vllm_symbols() or any(symbol.startswith(f"{path}#") for symbol in vllm_symbols()):
        return f"[`{path}`]({VLLM_FILES}{path.partition('#')[0]})"
    return f"`{path}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


# ---- the rows


HOLDS = {
    0: "plain data: arguments, requests, outputs",
    1: "decisions: scheduler, KV cache, traces, simulator, engine core",
    2: "tensors: model, attention, sampling, kernels",
    3: "text and steps: from prompts to requests, from requests to a run of the model",
    4: "models: finding and fetching them",
    5: "what a user calls",
}


def rows(folder: Path) -> str:
    """The rows of tests/m0/test_architecture.py, where each module has its own."""
    source = (ROOT / "tests/m0/test_architecture.py").read_text(encoding="utf-8")
    (value,) = (
        node.value for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ROWS"
    )  # fmt: skip
    modules: dict[str, int] = ast.literal_eval(value)
    named = {row: [f"`{n.partition('.')[2]}`" for n, at in modules.items() if at == row and "." in n] for row in HOLDS}
    return table("row | holds | modules", ((str(row), holds, ", ".join(named[row])) for row, holds in HOLDS.items()))
