"""Where a symbol is in a source file, found in its text: nothing is imported, nothing is compiled.

Milestone: M0. vLLM counterpart: none. Python is looked up in the syntax tree, C++ by name and matching braces.
An anchor is `path#Symbol`, `path`, or `vllm@tag:path#Symbol`. For vLLM the lines are those of
docs/data/vllm_symbols.json, because its source is not in this repository.
"""

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path

from folovllm.utils import did_you_mean

ROOT = Path(__file__).resolve().parents[2]
PIN: str = tomllib.loads((ROOT / "docs/data/vllm_pin.toml").read_text(encoding="utf-8"))["vllm"]["tag"]
VLLM_SYMBOLS = ROOT / "docs/data/vllm_symbols.json"
CPP = (".cpp", ".h", ".cu")


def line_of_anchor(anchor: str) -> int | None:
    """The line that an anchor means, or None for a whole file. Raises ValueError that names the fix."""
    path, _, symbol = anchor.partition("#")
    if path.startswith("vllm@"):
        return line_in_vllm(path, symbol)
    if not (ROOT / path).exists():
        files = [p.relative_to(ROOT).as_posix() for p in (ROOT / path.split("/")[0]).rglob(Path(path).name)]
        raise ValueError(f"there is no {path}" + (f"; did you mean {', '.join(files)}?" if files else ""))
    return lines_of_symbol(ROOT / path, symbol)[0] if symbol else None


def line_in_vllm(path: str, symbol: str) -> int | None:
    if not path.startswith(f"vllm@{PIN}:vllm/"):
        raise ValueError(f"must look like vllm@{PIN}:vllm/path.py#Symbol")
    key = f"{path.partition(':')[2]}#{symbol}" if symbol else path.partition(":")[2]
    known = vllm_symbols()
    if key not in known:
        file = key.partition("#")[0]
        hint = did_you_mean(key, [k for k in known if k.startswith(file)])
        raise ValueError(
            f"{VLLM_SYMBOLS.name} has no {key}{hint}; if vLLM {PIN} defines it, run "
            "python scripts/dev/build_docs.py --vllm-source FOLDER_OF_THE_UNPACKED_WHEEL"
        )
    return known[key] if symbol else None


@cache
def vllm_symbols() -> dict[str, int]:
    """`vllm/path.py#Symbol` -> its line at the pinned release; a file alone has line 1."""
    symbols: dict[str, int] = json.loads(VLLM_SYMBOLS.read_text(encoding="utf-8"))["lines"]
    return symbols


def lines_of_symbol(path: Path, symbol: str) -> tuple[int, int]:
    """First and last line of a symbol in a file, decorators not counted. Raises ValueError with the nearest names."""
    if path.suffix in CPP:
        return cpp_lines(path, symbol)
    if path.suffix != ".py":
        raise ValueError(f"{path.name} is no Python or C++ file: cite it without #{symbol}")
    node = python_node(path, symbol)
    return node.lineno, node.end_lineno or node.lineno


# ---- Python


@cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names_defined(node: ast.AST) -> dict[str, ast.stmt | ast.expr]:
    """Names a module or class body defines by def, class, assignment or import; also what methods set on self."""
    found: dict[str, ast.stmt | ast.expr] = {}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[child.name] = child
        elif isinstance(child, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: child for alias in child.names}
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            names = (name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
            found |= {name.id: child for name in names if isinstance(name.ctx, ast.Store)}  # not the a of a.b = 1
        elif isinstance(child, ast.If | ast.Try):
            found |= names_defined(child)
    if isinstance(node, ast.ClassDef):
        attributes = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
        of_self = [a for a in attributes if isinstance(a.value, ast.Name) and a.value.id == "self"]
        found = {a.attr: a for a in reversed(of_self)} | found
    return found


def python_node(path: Path, symbol: str) -> ast.stmt | ast.expr:
    node: ast.AST = syntax_tree(path)
    for name in symbol.split("."):
        names = names_defined(node)
        if name not in names:
            raise ValueError(f"{path.name} defines no {symbol}{did_you_mean(name, names)}")
        node = names[name]
    assert isinstance(node, ast.stmt | ast.expr)
    return node


# ---- C++

DEFINITION = r"^[^\n;{{}}#/]*(?<![\w:.>]){name}\s*(?:\([^;{{}}]*\)[^;{{}}()]*(?::[^;]*?)?|(?::[^;{{}}]*)?){{"
NO_DEFINITION = re.compile(r"\b(if|for|while|return|else)\b|[=?(\[]")  # before a name that is only called
COMMENT_OR_TEXT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)


@cache
def cpp_code(path: Path) -> str:
    """The file with comments and texts blanked, so that braces in them do not count. Lines and columns stay."""
    text = path.read_text(encoding="utf-8")
    return COMMENT_OR_TEXT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def cpp_lines(path: Path, symbol: str) -> tuple[int, int]:
    """Lines of a function, method or struct of a C++ file, a template line above it included."""
    code, start, end = cpp_code(path), 0, len(cpp_code(path))
    for name in symbol.split("."):
        definition = re.compile(DEFINITION.format(name=re.escape(name)), re.MULTILINE)
        matches = definition.finditer(code, start, end)
        found = next((m for m in matches if not NO_DEFINITION.search(m.group().partition(name)[0])), None)
        if found is None:
            names = {a or b for a, b in re.findall(r"(?:struct|class) (\w+)|(\w+)\([^;{}]*\)[^;{}()]*\{", code)}
            raise ValueError(f"{path.name} defines no {symbol}{did_you_mean(name, names - {name})}")
        start, end = found.start(), closing_brace(code, found.end() - 1)
    first, last = code.count("\n", 0, start) + 1, code.count("\n", 0, end) + 1
    lines = code.splitlines()
    while first > 1 and re.match(r"\s*(template|\[\[|inline\b|static\b|__attribute__)[^;{}]*$", lines[first - 2]):
        first -= 1
    return first, last


def closing_brace(code: str, opening: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(code, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("a brace is never closed")
