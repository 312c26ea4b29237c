"""The learning pages as data: their order, their words, their examples, and how an example is run.

Milestone: M0. vLLM counterpart: none. `folovllm docs`, scripts/dev/build_docs.py and the tests all use this file, so
they agree on what an example is: a Python block whose first line is `# runs`, with its output in a text block below it.
The pages are read from the repository if the package runs from a clone, and otherwise from the installed package.
"""

import contextlib
import io
import linecache
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.utils import did_you_mean

PACKAGE = Path(__file__).parents[1]
WORDS_PER_MINUTE = 130
MINUTES_PER_EXAMPLE = 1
NEAR = 0.7  # how similar a page's name is at least to what was typed, to be suggested

FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```[^\S\n]*$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(
    r"^```python\n(?P<code># runs\b.*?)^```[^\S\n]*\n(?:\n*```text\n(?P<output>.*?)^```[^\S\n]*$)?",
    re.MULTILINE | re.DOTALL,
)
# What a builder writes between two comments, e.g. <!-- nav --> ... <!-- /nav -->.
GENERATED = re.compile(r"<!-- (?P<kind>[a-z]+)\b[^\n]*? -->.*?<!-- /(?P=kind) -->", re.DOTALL)
NOT_PROSE = re.compile(
    r"<!--.*?-->"  # comments
    r"|^[^\S\n]*\|[^\n]*$"  # rows of tables
    r"|!\[[^\]]*\]\([^)]*\)"  # pictures
    r"|(?<=\])\([^()\s]+(?: \"[^\"]*\")?\)"  # targets of links; their text is read
    r"|</?\w+[^<>\n]*>",  # HTML tags
    re.MULTILINE | re.DOTALL,
)


def docs_dir() -> Path:
    """The folder docs/ of the clone that the package is in, or else the copy in the installed package."""
    of_clone = PACKAGE.parent / "docs"
    return of_clone if (of_clone / "data/pages.toml").is_file() else PACKAGE / "_docs"


@dataclass(frozen=True)
class Example:
    """One example of a page."""

    number: int  # from 1
    line: int  # of the page, where the code begins
    code: str
    output: str | None  # as it stands on the page, or None if no text block follows

    @property
    def title(self) -> str:
        """What stands behind `# runs`, or else the first line of code that is no import."""
        first, *rest = self.code.splitlines()
        after = first.removeprefix("# runs").strip(" :,-")
        lines = (line.strip() for line in rest)
        return after or next((line for line in lines if line and not re.match(r"import |from |#", line)), "")


@dataclass(frozen=True)
class Page:
    """One entry of docs/data/pages.toml."""

    file: str  # below docs/, e.g. "learn/03_paged_kv_cache.md"
    title: str
    before: str = ""  # what a reader should know, as Markdown
    milestone: str = ""
    interview: str = ""  # a chapter of docs/interview
    notebooks: tuple[str, ...] = ()
    exercises: str = ""  # the milestone whose exercises belong to the page
    topics: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        return Path(self.file).stem

    @property
    def short(self) -> str:
        """Its number. E.g. "03" for 03_paged_kv_cache.md, but "simulator" for simulator.md."""
        head = self.stem.partition("_")[0]
        return head if head[:1].isdigit() else self.stem

    @property
    def path(self) -> Path:
        return docs_dir() / self.file

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")


def load_pages(file: Path | None = None) -> list[Page]:
    """The pages in reading order, those that exist."""
    file = file or docs_dir() / "data/pages.toml"
    pages = [_page(entry, file) for entry in tomllib.loads(file.read_text(encoding="utf-8"))["page"]]
    return [page for page in pages if (file.parents[1] / page.file).is_file()]


def _page(entry: dict[str, Any], file: Path) -> Page:
    unknown = set(entry) - set(Page.__dataclass_fields__)
    if unknown or not {"file", "title"} <= set(entry):
        names = ", ".join(Page.__dataclass_fields__)
        raise ValueError(f"{file.name}: a page has file and title, and of {names} what it needs; got {sorted(entry)}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Page(**values)


def name_of(page: Page) -> str:
    """What the reader types: the number, or the whole name if an earlier page has the same number."""
    first = next((other for other in load_pages() if other.short == page.short), page)
    return page.short if first == page else page.stem


def page_number(name: str) -> str:
    """E.g. "03" for "3" and "m3", "10" for "m10", and "04b" for "4b". Any other name as it is."""
    return re.sub(r"^m(?=\d\d)", "", re.sub(r"^m?(?=\d[a-z]?$)", "0", name.lower()))


def find_page(name: str) -> Page:
    """The page called "03", "3", "m3", "04b", "03_paged_kv_cache", "paged" or "docs/learn/03_paged_kv_cache.md".

    If two pages have the same number, the first in the reading order is meant. An unknown name raises ValueError, and
    so does a part of a name that several pages have.
    """
    pages = load_pages()
    wanted = Path(name).name.removesuffix(".md")
    if exact := [page for page in pages if wanted == page.stem or page_number(wanted) == page.short]:
        return exact[0]
    near = [page for page in pages if wanted and wanted in page.stem]
    if len(near) == 1:
        return near[0]
    if near:
        raise ValueError(f"{name!r} may be {' or '.join(page.stem for page in near)}")
    names = [name_of(page) for page in pages]
    hint = did_you_mean(wanted, [*names, *(page.stem for page in pages)], NEAR)
    raise ValueError(f"no page {name!r}; there are {', '.join(names)}{hint}")


# ---- reading a page


def examples_of(text: str) -> list[Example]:
    matches = enumerate(EXAMPLE.finditer(text), start=1)
    return [Example(i, text.count("\n", 0, m.start("code")) + 1, m["code"], m["output"]) for i, m in matches]


def prose_of(text: str) -> str:
    """A page without code, outputs, tables, pictures, and what builders write."""
    return NOT_PROSE.sub("", FENCE.sub("", GENERATED.sub("", text)))


def num_words(text: str) -> int:
    """Words of prose: whatever holds a letter or a digit between two spaces."""
    return sum(any(c.isalnum() for c in word) for word in prose_of(text).split())


def minutes(text: str) -> tuple[int, int]:
    """Minutes to read the prose, and minutes for the examples."""
    return math.ceil(num_words(text) / WORDS_PER_MINUTE), MINUTES_PER_EXAMPLE * len(examples_of(text))


def counted(number: int, word: str) -> str:
    """E.g. "1 minute", "2 minutes"."""
    return f"{number} {word}{'' if number == 1 else 's'}"


# ---- running an example


def run_example(example: Example, file: str) -> str:
    """Runs the example by itself, as a script, and returns what it printed. Its exceptions pass through.

    `file` is the page, for tracebacks. Lines are counted as in the page, and tracebacks show them.
    """
    name = f"{file}, example {example.number}"
    source = "\n" * (example.line - 1) + example.code
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(source, name, "exec"), {"__name__": "__main__", "__file__": name})
    except Exception as error:
        if printed.getvalue():
            error.add_note(f"It printed before:\n{printed.getvalue()}")
        raise
    return tidy(printed.getvalue())


def tidy(output: str) -> str:
    """Printed text as it stands on a page: no spaces at the ends of lines, one newline at the end."""
    lines = [line.rstrip() for line in output.rstrip().splitlines()]
    return "\n".join(lines) + "\n" if lines else ""


def with_outputs(text: str, file: str) -> tuple[str, list[tuple[int, str]]]:
    """The page with every example's text block as it is printed now, and (line, what is wrong) for those that fail."""
    examples, problems = iter(examples_of(text)), []

    def block(match: re.Match[str]) -> str:
        example = next(examples)
        try:
            printed = run_example(example, file)
        except Exception as error:  # any error of the page's own code
            problems.append((example.line, f"example {example.number}: {type(error).__name__}: {error}"))
            return match.group()
        if not printed:
            problems.append(
                (example.line, f"example {example.number} prints nothing: print what it found, then assert")
            )
            return match.group()
        end = "" if match["output"] is not None else "\n"
        return f"```python\n{match['code']}```\n\n```text\n{printed}```{end}"

    return EXAMPLE.sub(block, text), problems
