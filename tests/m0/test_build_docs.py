"""The builder of the pages: links, included code, head and foot, glossary links, outputs of examples (R0.69)."""

import re
from pathlib import Path
from typing import Any

import pytest

from folovllm.learn import pages as learn_pages
from folovllm.learn.pages import (
    GENERATED,
    Page,
    examples_of,
    find_page,
    load_pages,
    minutes,
    num_words,
    run_example,
    with_outputs,
)
from tests.page_checks import ROOT, imports_tests
from tests.script_loader import load_script

pytestmark = pytest.mark.m0

builder = load_script("build_docs")
code = load_script("page_code")
glossary = load_script("page_glossary")
nav = load_script("page_nav")
symbols = load_script("page_symbols")
PAGE = ROOT / "docs/learn/a_page.md"  # is in no list and need not exist


def build(text: str) -> str:
    """The built text. A second run must change nothing."""
    built, problems = builder.build_page(text, PAGE)
    assert not problems, problems
    assert builder.build_page(built, PAGE)[0] == built
    return built


# ---- citations


def test_a_citation_becomes_a_link_with_its_line() -> None:
    line = symbols.line_of_anchor("folovllm/request.py#Request.num_tokens")
    assert "def num_tokens" in (ROOT / "folovllm/request.py").read_text(encoding="utf-8").splitlines()[line - 1]
    assert build("See [[folovllm/request.py#Request.num_tokens]].") == (
        f'See [`Request.num_tokens`](../../folovllm/request.py#L{line} "folovllm/request.py#Request.num_tokens").'
    )


def test_a_citation_of_vllm_leads_to_the_pinned_release() -> None:
    anchor = f"vllm@{symbols.PIN}:vllm/v1/core/block_pool.py#BlockPool"
    line = symbols.vllm_symbols()["vllm/v1/core/block_pool.py#BlockPool"]
    url = f"https://github.com/vllm-project/vllm/blob/{symbols.PIN}/vllm/v1/core/block_pool.py#L{line}"
    assert build(f"[[{anchor}]]") == f'[vLLM\'s `BlockPool`]({url} "{anchor}")'


def test_an_older_line_is_refreshed_and_own_words_stay() -> None:
    old = '[own `words`](x.py#L1 "folovllm/request.py#Request"), [a file](gone "folovllm/request.py")'
    built = build(old)
    assert "[own `words`](../../folovllm/request.py#L" in built
    assert '[a file](../../folovllm/request.py "folovllm/request.py")' in built


def test_code_and_comments_are_not_touched() -> None:
    text = "`[[folovllm/request.py#Request]]`\n\n```python\nx = [[folovllm/request.py]]  # arXiv:2309.06180\n```\n"
    assert build(text) == text
    assert build("H = [[4, 2], [2, 4]]") == "H = [[4, 2], [2, 4]]"


def test_arxiv_ids_become_links_once() -> None:
    assert build("(arXiv:2309.06180)") == "([arXiv:2309.06180](https://arxiv.org/abs/2309.06180))"
    assert build("[arXiv 2309.06180](https://x.org)") == "[arXiv 2309.06180](https://x.org)"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\n[[folovllm/request.py#Reqest]]", 2, "did you mean 'Request'"),
        ("[[folovllm/core/request.py]]", 1, "did you mean folovllm/request.py"),
        ("[[vllm@v0.0.1:vllm/v1/request.py#Request]]", 1, "must look like vllm@v"),
        (f"[[vllm@{symbols.PIN}:vllm/v1/core/block_pool.py#BlockPol]]", 1, "--vllm-source"),
        ("\n\n<!-- code: folovllm/request.py#Request.num_token -->\n<!-- /code -->", 3, "did you mean 'num_tokens'"),
        ("<!-- code: folovllm/request.py#Request lines=1..2 -->\n<!-- /code -->", 1, "cannot read"),
        (
            '<!-- code: folovllm/request.py#Request part="class"..."no such text" -->\n<!-- /code -->',
            1,
            "after that with",
        ),
        ("<!-- code: folovllm/request.py#Request -->", 1, "without its <!-- /code -->"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_changes_nothing(text: str, line: int, words: str) -> None:
    built, problems = builder.build_page(text, PAGE)
    assert built == text
    ((where, message),) = problems
    assert where == line and words in message


# ---- included code

MODULE = '''\
import functools


class Pool:
    """The pool."""

    @functools.cache
    def take(self, n: int) -> list[int]:
        """Takes blocks.

        All of them or none.
        """

        if n > 3:
            return []
        return [1, 2, 3][:n]
'''
CPP = """\
// take(3) { is a comment
int other() { return take("}"); }

// Takes.
template <typename T>
int take(T n) {
  if (n > 3) {
    return 0;
  }
  return n;  // "}"
}

struct Pool {
  int size() const { return 3; }
};
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two files, from which code is included."""
    for name, text in {"pool.py": MODULE, "pool.cpp": CPP}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    return tmp_path


def included(what: str, root: Path) -> list[str]:
    return code.included(f" {what} ", root).splitlines()


def test_a_function_with_its_decorator_and_without_its_docstring(sources: Path) -> None:
    lines = included("pool.py#Pool.take", sources)
    assert lines[:3] == ["```python", "@functools.cache", "def take(self, n: int) -> list[int]:"]
    assert lines[3] == "    if n > 3:"
    assert lines[-1] == "[`pool.py`, lines 7-16](pool.py#L7-L16)"
    assert '    """Takes blocks.' in included("pool.py#Pool.take docstring=yes", sources)


def test_a_part_of_a_function(sources: Path) -> None:
    lines = included('pool.py#Pool.take part="if n"..."return"', sources)
    assert lines == ["```python", "if n > 3:", "    return []", "```", "", "[`pool.py`, lines 14-15](pool.py#L14-L15)"]


def test_cpp_by_name_and_braces(sources: Path) -> None:
    lines = included("pool.cpp#take", sources)
    assert lines[:3] == ["```cpp", "template <typename T>", "int take(T n) {"]
    assert lines[-1].endswith("(pool.cpp#L5-L11)")
    assert included("pool.cpp#Pool.size", sources)[1] == "int size() const { return 3; }"


def test_a_page_shows_the_code_of_today() -> None:
    text = "<!-- code: folovllm/request.py#Request.num_tokens -->\nold\n<!-- /code -->\n"
    built = build(text)
    assert "old" not in built and "```python\n@property\ndef num_tokens" in built


# ---- glossary


def terms(**texts: Any) -> list[Any]:
    return [glossary.Term(name, name.replace("_", " "), page="", text="", **more) for name, more in texts.items()]


@pytest.mark.parametrize(
    ("text", "linked"),
    [
        ("Two blocks, one block.", "Two [blocks](g.md#block), one block."),
        ("A block table of blocks.", "A [block table](g.md#block_table) of [blocks](g.md#block)."),
        ("A block\ntable.", "A [block\ntable](g.md#block_table)."),
        ("# Block\n\n| block |\n\n`block`, [block](x.md), <!-- block -->", None),
        ("blocking, block-wise, unblock", None),
        ("A run of the engine, a trace run.", "A run of the engine, a [trace run](g.md#run)."),
        ("itl is no ITL", "itl is no [ITL](g.md#ITL)"),
        ("Block and BLOCK", "[Block](g.md#block) and BLOCK"),
        ("## References\n\nA block.\n", None),
        (
            "Time:\n\n    blocks / block table\n\n    of a block\n\nA block.",
            "Time:\n\n    blocks / block table\n\n    of a block\n\nA [block](g.md#block).",
        ),
    ],
)
def test_the_first_use_of_a_term_is_linked(text: str, linked: str | None) -> None:
    known = terms(block={}, block_table={}, ITL={}, run={"also": ("trace run",), "link": False})
    built = glossary.link_terms(text, known, "g.md")
    assert built == (linked or text)
    assert glossary.link_terms(built.replace("g.md", "../glossary.md"), known, "g.md") == built


def test_the_glossary_has_the_words_of_the_field() -> None:
    entries = {term.id: term for term in glossary.load_terms()}
    assert len(entries) >= 60
    assert {"token", "block-table", "slot-mapping", "online-softmax", "rtn", "rung"} <= set(entries)
    for term in entries.values():
        assert 5 <= len(term.text.split()) <= 60, term.id


READING_ORDER = load_pages()
TEXTS = {page.file: GENERATED.sub("", page.text()).replace("_", "-") for page in READING_ORDER}


def uses(file: str, form: str, emphasized: bool = False) -> bool:
    """Whether the page has the word, in prose or in code; if `emphasized`, whether it has it as **word** or *word*."""
    either = "|".join(re.escape(spelled) for spelled in (form, form.replace(" ", "-"), form.replace("_", "-")))
    word = rf"(?i:{either})(?:s|es)?"
    pattern = rf"\*\[?{word}\.?(?:\]\([^)]*\))?\*" if emphasized else rf"(?<![\w-]){word}(?!\w)"
    return re.search(pattern, TEXTS[file].replace("\n", " ")) is not None


@pytest.mark.parametrize("term", [term for term in glossary.load_terms() if term.page], ids=lambda term: term.id)
def test_the_page_of_a_word_has_the_word(term: Any) -> None:
    """'Explained in' leads to a page that uses the word, and to the first that sets it in bold or italics."""
    files = [page.file for page in READING_ORDER]
    assert term.page in files, "docs/data/pages.toml has no such page"
    assert any(uses(term.page, form) for form in term.forms), f"{term.page} has no {term.term!r}: leave page out"
    earlier = files[: files.index(term.page)]
    explained = [
        file for file in earlier if Path(file).stem not in term.not_on and uses(file, term.term, emphasized=True)
    ]
    assert not explained, f"{explained[0]} explains {term.term!r} before {term.page} does"


# ---- head and foot, times


def test_head_and_foot_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is not written yet (m9.md) is named without a link."""
    before = "[M1](01_basic_inference.md), [M9](m9.md)."
    listed = [
        Page("learn/01_basic_inference.md", "M1"),
        Page("learn/a_page.md", "M2", before, interview="m2", exercises="m2", notebooks=("03_scheduler_gantt",)),
        Page("learn/03_paged_kv_cache.md", "M3"),
    ]
    monkeypatch.setattr(nav, "load_pages", lambda: listed)
    pair = "<!-- nav --><!-- /nav -->"
    example = "```python\n# runs\nprint(1)\n```\n\n```text\n1\n```\n"
    built = build(f"# T\n\n{pair}\n\n{'word ' * 131}\n\n{example}\n{pair}\n")
    assert "*3 minutes: 2 to read, 1 to run the example (`folovllm docs run a_page`).*" in built
    assert "**Before this page:** [M1](01_basic_inference.md), M9." in built
    assert built.count("← [M1](01_basic_inference.md) · [all pages](../README.md) · [M3](03_paged_kv_cache.md) →") == 2
    assert "[notebook 03](../../notebooks/03_scheduler_gantt.ipynb)" in built
    assert "[exercises of M2](../../milestones/m2/README.md) · [interview questions](../interview/m2.md)" in built


def test_words_are_those_of_the_prose() -> None:
    text = '# A title\n\nTwo words, [a link](x.md "t") - `code`.\n\n```\nno = 1\n```\n\n| no |\n\n![no](x.png)\n'
    assert num_words(text) == 7
    assert minutes("word " * 260) == (2, 0)


def test_the_list_of_pages() -> None:
    entries = builder.tomllib.loads((ROOT / "docs/data/pages.toml").read_text(encoding="utf-8"))["page"]
    assert [page.file for page in load_pages()] == [e["file"] for e in entries if (ROOT / "docs" / e["file"]).is_file()]
    assert find_page("03").file == find_page("3").file == find_page("paged").file == "learn/03_paged_kv_cache.md"
    assert find_page("docs/learn/simulator.md").short == "simulator"
    with pytest.raises(ValueError, match="did you mean 'simulator'"):
        find_page("simulaton")


def test_every_learning_page_is_listed_once_and_names_what_exists() -> None:
    entries = builder.tomllib.loads((ROOT / "docs/data/pages.toml").read_text(encoding="utf-8"))["page"]
    files = [entry["file"] for entry in entries]
    assert len(set(files)) == len(files)
    assert {f"learn/{path.name}" for path in (ROOT / "docs/learn").glob("*.md")} <= set(files)
    for entry in entries:
        notebooks = [ROOT / f"notebooks/{name}.ipynb" for name in entry.get("notebooks", [])]
        assert all(path.is_file() for path in notebooks), entry


# ---- examples


def test_an_example_with_its_line_and_its_output() -> None:
    text = "# T\n\n```python\n# runs: greet\nprint('hi')\n```\n\n```text\nhi\n```\n\n```python\nnever()\n```\n"
    (example,) = examples_of(text)
    assert (example.number, example.line, example.output, example.title) == (1, 4, "hi\n", "greet")
    assert run_example(example, "page.md") == "hi\n"


def test_outputs_are_filled_in() -> None:
    """A missing text block is added, an old one replaced; an example that fails or prints nothing is named."""
    text = "```python\n# runs\nprint('new ')\n```\n\nProse.\n\n```python\n# runs\nprint(2)\n```\n\n```text\nold\n```\n"
    filled, _ = with_outputs(text, "page.md")
    assert [example.output for example in examples_of(filled)] == ["new\n", "2\n"]
    assert with_outputs(filled, "page.md") == (filled, [])
    assert "```text\nnew\n```\n\nProse." in filled
    silent = "```python\n# runs\nx = 1\n```\n\n```python\n# runs\nprint(1 / 0)\n```\n"
    unchanged, problems = with_outputs(silent, "page.md")
    assert unchanged == silent
    assert [line for line, _ in problems] == [2, 7]
    assert "prints nothing" in problems[0][1] and "ZeroDivisionError" in problems[1][1]


def test_a_failing_example_is_shown_with_the_line_of_the_page() -> None:
    (example,) = examples_of("# T\n\n```python\n# runs\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run_example(example, "page.md")
    entry = error.traceback[-1]
    assert (str(entry.frame.code.raw.co_filename), entry.lineno + 1) == ("page.md, example 1", 6)


def test_imports_of_tests_are_found() -> None:
    assert imports_tests("from tests.core_helpers import drive") and imports_tests("import tests")
    assert not imports_tests("from folovllm.learn import toy_engine  # not tests.x")


def test_an_installed_package_has_its_own_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(learn_pages, "PACKAGE", tmp_path / "folovllm")
    assert learn_pages.docs_dir() == tmp_path / "folovllm" / "_docs"
