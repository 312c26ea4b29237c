"""The API pages: every public name with its signature, its docstring and a link to its source (R0.72)."""

import ast

import pytest

import folovllm
from tests.page_checks import ROOT
from tests.script_loader import load_script

pytestmark = pytest.mark.m0

api = load_script("build_api")


def test_the_api_pages_are_what_the_source_says() -> None:
    stale = [path.name for path in api.stale_pages(api.pages())]
    assert not stale, f"{', '.join(stale)} out of date: run scripts/dev/build_api.py"


def test_what_users_import_is_on_the_pages() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    missing = [name for name in folovllm.__all__ if name[0] != "_" and f"### {name}\n" not in text]
    assert not missing


def test_every_package_of_the_engine_has_a_group() -> None:
    described = {path.partition("/")[0] for group in api.GROUPS for path in group.paths}
    left_out = {"benchmarks", "csrc", "hub"}  # tools and sources that no program imports
    packages = {path.parent.name for path in (ROOT / "folovllm").glob("*/__init__.py")}
    assert packages - described <= left_out


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f(self, a: int, b='x') -> 'Later': ...", ["def f(a: int, b='x') -> Later"]),
        ("def f(a, /, *, b: int = 1, **rest: int): ...", ["def f(a, /, *, b: int = 1, **rest: int)"]),
        ("def f(*names: str) -> None: ...", ["def f(*names: str) -> None"]),
        (
            f"def f({'a' * 60}: int, {'b' * 60}: int) -> int: ...",
            ["def f(", f"    {'a' * 60}: int,", f"    {'b' * 60}: int,", ") -> int"],
        ),
    ],
)
def test_a_signature_is_as_in_the_source(source: str, lines: list[str]) -> None:
    assert api.signature("def f", ast.parse(source).body[0]) == lines


def test_a_drawing_becomes_one_fence_and_vllms_file_a_link() -> None:
    docstring = "Text, if a < b and `a < b`.\nSee vllm/v1/core/block_pool.py.\n\n    a -> b\n\n      c\n\nMore."
    anchor = f"vllm@{api.PIN}:vllm/v1/core/block_pool.py"
    assert api.markdown(docstring) == (
        f'Text, if a &lt; b and `a < b`.\nSee [`vllm/v1/core/block_pool.py`](. "{anchor}").\n\n'
        "```text\na -> b\n\n  c\n```\n\nMore."
    )
