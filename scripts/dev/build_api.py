#!/usr/bin/env python3
"""Write docs/api: the public classes and functions of the package, from their signatures and docstrings.

Milestone: M0. vLLM counterpart: vLLM builds its API pages with a plugin of its documentation tool, which imports the
package. Here the source is only parsed, and the result is Markdown that GitHub shows as it is.

    python scripts/dev/build_api.py            write all pages, remove those that no group has
    python scripts/dev/build_api.py --check    exit code 1 if a page is not what the source says
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import page_files
from page_links import Links
from page_symbols import PIN, ROOT, syntax_tree, vllm_symbols

API = ROOT / "docs/api"
WIDTH = 100  # of a signature on one line
INDENTED = re.compile(r"((?:^ {4}.*\n(?:\n*(?=^ {4}))?)+)", re.MULTILINE)  # lines, with the empty ones between them

NOTE = "`scripts/dev/build_api.py` writes this page from the docstrings. All groups: [API](README.md)."


@dataclass(frozen=True)
class Group:
    """One page: its name, its title, and the files and folders of folovllm/ that it describes."""

    name: str
    title: str
    what: str
    paths: tuple[str, ...]

    def modules(self) -> list[Path]:
        """Its modules, those without a public name left out."""
        roots = [ROOT / "folovllm" / path for path in self.paths]
        files = [file for root in roots for file in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
        return [file for file in files if file.name != "__main__.py" and list(public(syntax_tree(file)))]


GROUPS = (
    Group(
        "llm",
        "LLM and SamplingParams",
        "what a program that uses FoloVLLM calls, with its arguments and outputs",
        (
            "entrypoints/llm.py",
            "entrypoints/start.py",
            "sampling_params.py",
            "outputs.py",
            "config.py",
            "milestones.py",
            "parts.py",
        ),
    ),
    Group(
        "engine", "Engine", "from prompts to requests, and from tokens to text", ("request.py", "engine", "executor")
    ),
    Group(
        "server",
        "Server",
        "the OpenAI-compatible API, its page, its metrics and its client",
        ("entrypoints/openai", "entrypoints/openai_client.py", "entrypoints/web", "metrics"),
    ),
    Group(
        "scale",
        "Several processes",
        "the shards of a model, what its ranks say to each other, and data sets on Ray",
        ("parallel.py", "communication_plan.py", "distributed", "data", "entrypoints/ray_serve.py"),
    ),
    Group("core", "Core", "scheduler, KV cache manager, block pool and prefix index; no torch", ("core",)),
    Group("worker", "Worker", "the batch, the block table and the run of the model", ("worker",)),
    Group(
        "model",
        "Model",
        "configuration, weights, layers, and what replaces them on a CPU",
        ("hf_config.py", "model_executor"),
    ),
    Group("attention", "Attention", "the layer, the backends and their operators", ("attention",)),
    Group("sample", "Sampling", "from logits to tokens", ("sample",)),
    Group("quantize", "Quantization", "the GPTQ quantizer", ("gptq_config.py", "quantize")),
    Group("trace", "Traces", "records of steps: writing, checking, comparing, showing", ("trace",)),
    Group("learn", "Learning", "exercises, checks, quiz, and the toy engine of the examples", ("learn",)),
    Group("sim", "Simulator", "the scheduler on a model of a machine", ("sim",)),
)


def main() -> int:
    return page_files.write_or_check(__doc__, pages, stale_pages)


def stale_pages(wanted: dict[Path, str]) -> list[Path]:
    return page_files.stale_pages(wanted, API.glob("*.md"))


def pages() -> dict[Path, str]:
    """Every page with its text."""
    made = {API / f"{group.name}.md": group_page(group) for group in GROUPS}
    made[API / "README.md"] = index_page()
    links = Links(API)
    written = {path: links.written(text) for path, text in made.items()}
    assert not links.problems, links.problems  # every symbol was found in its file a moment ago
    return written


def index_page() -> str:
    lines = ["# API", "", "The public classes and functions, one page per group of modules.", ""]
    lines += ["| group | what it holds | modules | classes and functions |", "|---|---|--:|--:|"]
    for group in GROUPS:
        modules = group.modules()
        count = sum(len(list(public(syntax_tree(module)))) for module in modules)
        lines.append(f"| [{group.title}]({group.name}.md) | {group.what} | {len(modules)} | {count} |")
    lines += ["", "Parameters and defaults of an engine: [`EngineConfig.from_args`](llm.md#engineconfig).", ""]
    return "\n".join([*lines, NOTE.partition(" All")[0].replace("this page", "these pages")]) + "\n"


def group_page(group: Group) -> str:
    lines = [f"# API: {group.title}", "", f"{group.what[0].upper()}{group.what[1:]}. {NOTE}"]
    for module in group.modules():
        lines += ["", *module_lines(module)]
    return "\n".join(lines) + "\n"


# ---- a module


def module_lines(path: Path) -> Iterator[str]:
    """The heading, the module's docstring, then its classes and functions in the order of the file."""
    tree = syntax_tree(path)
    file = path.relative_to(ROOT).as_posix()
    yield f"## {file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"
    yield from docstring_lines(tree)
    for node in public(tree):
        yield from class_lines(node, file) if isinstance(node, ast.ClassDef) else function_lines(node, file)


def public(node: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions that `node` defines and whose names do not begin with an underscore."""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
            yield child


def class_lines(node: ast.ClassDef, file: str) -> Iterator[str]:
    """A class: its constructor or its fields, its docstring, and its methods."""
    yield from ["", f"### {node.name}", "", "```python", *class_head(node, file), "```"]
    yield from docstring_lines(node)
    yield from source_link(file, node.name)
    for method in public(node):
        if not isinstance(method, ast.ClassDef) and not is_variant(method):
            yield from function_lines(method, file, node.name)


def class_head(node: ast.ClassDef, file: str) -> list[str]:
    """E.g. "class BlockPool(num_blocks: int)", or the lines of the fields of a data class, comments included."""
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    decorators = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        return [*decorators, *signature(f"class {node.name}", init)]
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign | ast.Assign)]
    source = (ROOT / file).read_text(encoding="utf-8").splitlines()
    body = [line for field in fields for line in source[field.lineno - 1 : field.end_lineno]]
    return [*decorators, f"class {node.name}{f'({bases})' if bases else ''}:", *(body or ["    ..."])]


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, file: str, owner: str = "") -> Iterator[str]:
    name = f"{owner}.{node.name}" if owner else node.name
    yield from ["", f"{'####' if owner else '###'} {name}", "", "```python"]
    yield from [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    prefix = "async def " if isinstance(node, ast.AsyncFunctionDef) else "def "
    yield from [*signature(prefix + node.name, node), "```"]
    yield from docstring_lines(node)
    yield from source_link(file, name)


def source_link(file: str, symbol: str) -> list[str]:
    """The builder of links writes the target from the title."""
    return ["", f'[source](. "{file}#{symbol}")']


def is_variant(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is a setter or an overload, of which the documentation stands with the other definition."""
    return any(re.search(r"\.setter$|overload$", ast.unparse(decorator)) for decorator in node.decorator_list)


def signature(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The parameters without `self`, on one line if they fit, otherwise one per line."""
    arguments = parameters(node.args)
    returns = f" -> {annotation(node.returns)}" if node.returns and not name.startswith("class ") else ""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"]


def parameters(args: ast.arguments) -> list[str]:
    """Each parameter as it is written in the source, `self` and `cls` left out."""
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    parts = [parameter(arg, default) for arg, default in zip(positional, defaults, strict=True)]
    if args.posonlyargs:
        parts.insert(len(args.posonlyargs), "/")
    if args.vararg:
        parts.append(f"*{parameter(args.vararg, None)}")
    elif args.kwonlyargs:
        parts.append("*")
    parts += [parameter(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        parts.append(f"**{parameter(args.kwarg, None)}")
    return parts[1:] if positional and positional[0].arg in ("self", "cls") else parts


def parameter(arg: ast.arg, default: ast.expr | None) -> str:
    text = f"{arg.arg}: {annotation(arg.annotation)}" if arg.annotation else arg.arg
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if arg.annotation else f"{text}={ast.unparse(default)}"


def annotation(node: ast.expr) -> str:
    """A type, without the quotes of a name that is defined further down."""
    return str(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


# ---- docstrings


def docstring_lines(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The docstring as Markdown, with an empty line before it; nothing if there is none."""
    text = ast.get_docstring(node, clean=False)
    return ["", *markdown(inspect.cleandoc(text)).splitlines()] if text else []


def markdown(text: str) -> str:
    """Drawings and commands, which are indented, become fences; `<` is shown as it is; vLLM's files are linked.

    E.g. a paragraph "    a -> b" -> a fence with "a -> b".
    """
    pieces = INDENTED.split(text + "\n")  # prose and indented lines in turn
    fenced = [f"```text\n{textwrap.dedent(piece).rstrip()}\n```" for piece in pieces[1::2]]
    prose = [_prose(piece.strip("\n")) for piece in pieces[::2]]
    return "\n\n".join(part for pair in zip_longest(prose, fenced, fillvalue="") for part in pair if part)


def _prose(text: str) -> str:
    text = re.sub(r"(`[^`\n]*`)|<", lambda match: match[1] or "&lt;", text)
    return re.sub(r"(?<![\w/`:@])vllm/[\w/]+\.py(?:#[\w.]*\w)?", _vllm_link, text)


def _vllm_link(match: re.Match[str]) -> str:
    known = match.group() in vllm_symbols()
    return f'[`{match.group()}`](. "vllm@{PIN}:{match.group()}")' if known else match.group()


if __name__ == "__main__":
    sys.exit(main())
