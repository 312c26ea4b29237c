"""Code on a page: the source of a symbol, taken from the file each time the pages are built, so it cannot drift.

Milestone: M0. vLLM counterpart: none.

    <!-- code: folovllm/core/block_pool.py#BlockPool.touch -->
    <!-- /code -->
    <!-- code: folovllm/core/block_pool.py#BlockPool docstring=yes -->        the docstring of the symbol stays
    <!-- code: folovllm/request.py#Request part="def append"..."return" -->   from a line with the first text to the
                                                                              next one after it with the second
"""

import ast
import os
import re
import textwrap
from pathlib import Path

from page_symbols import CPP, ROOT, cpp_lines, python_node

BLOCK = re.compile(r"^(?P<open><!-- code:(?P<what>.*?)-->)\n(?P<body>.*?)^<!-- /code -->", re.MULTILINE | re.DOTALL)
WHAT = re.compile(
    r'\s*(?P<path>[\w./-]+)#(?P<symbol>[\w.]+)(?P<docstring>\s+docstring=yes)?(?:\s+part="(?P<first>.+?)"\.\.\."(?P<last>.+?)")?\s*'
)


def fill_code(text: str, folder: Path) -> tuple[str, list[tuple[int, str]]]:
    """`text` of a page in `folder` with every code block as the source is now, and (line, what is wrong)."""
    problems: list[tuple[int, str]] = []

    def block(match: re.Match[str]) -> str:
        try:
            return f"{match['open']}\n{included(match['what'], folder)}<!-- /code -->"
        except ValueError as error:
            problems.append((text.count("\n", 0, match.start()) + 1, str(error)))
            return match.group()

    filled = BLOCK.sub(block, text)
    if text.count("<!-- code:") != len(BLOCK.findall(text)):
        problems.append((1, "a <!-- code: ... --> without its <!-- /code --> on a line of its own"))
    return filled, problems


def included(what: str, folder: Path) -> str:
    """The block for `path#symbol ...`: the source in a fence, and a link to its lines below. Raises ValueError."""
    match = WHAT.fullmatch(what)
    if not match:
        raise ValueError(f'cannot read <!-- code:{what}-->: write path#Symbol, docstring=yes, part="START"..."END"')
    path = ROOT / match["path"]
    if not path.is_file():
        raise ValueError(f"there is no {match['path']}")
    numbers = cpp_numbers(path, match["symbol"]) if path.suffix in CPP else python_numbers(path, **named(match))
    lines = path.read_text(encoding="utf-8").splitlines()
    if match["first"]:
        numbers = part_of(numbers, lines, match["first"], match["last"])
    code = textwrap.dedent("\n".join(lines[number - 1] for number in numbers))
    language = "cpp" if path.suffix in CPP else "python"
    link = f"{os.path.relpath(path, folder)}#L{numbers[0]}-L{numbers[-1]}"
    return f"```{language}\n{code}\n```\n\n[`{match['path']}`, lines {numbers[0]}-{numbers[-1]}]({link})\n"


def named(match: re.Match[str]) -> dict[str, object]:
    return {"symbol": match["symbol"], "docstring": match["docstring"] is not None}


def cpp_numbers(path: Path, symbol: str) -> list[int]:
    first, last = cpp_lines(path, symbol)
    return list(range(first, last + 1))


def python_numbers(path: Path, symbol: str, docstring: bool) -> list[int]:
    """The numbers of the symbol's lines, decorators included; without its docstring and the empty line after it."""
    node = python_node(path, symbol)
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    numbers = list(range(first, (node.end_lineno or node.lineno) + 1))
    body = getattr(node, "body", None)
    if docstring or not body or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return numbers
    if ast.get_docstring(node) is None or len(body) == 1:
        return numbers
    begin, end = body[0].lineno, body[0].end_lineno
    lines = path.read_text(encoding="utf-8").splitlines()
    end += not lines[end].strip()
    return [number for number in numbers if not begin <= number <= end]


def part_of(numbers: list[int], lines: list[str], first: str, last: str) -> list[int]:
    """The numbers from the first line that contains `first` to the next one after it that contains `last`."""
    begin = next((i for i, number in enumerate(numbers) if first in lines[number - 1]), None)
    if begin is None:
        raise ValueError(f'part: no line contains "{first}"')
    end = next((i for i in range(begin + 1, len(numbers)) if last in lines[numbers[i] - 1]), None)
    if end is None:
        raise ValueError(f'part: no line after that with "{first}" contains "{last}"')
    return numbers[begin : end + 1]
