"""The teaching material cannot lie about the code: citations resolve, requirements name live tests, examples run.

Nothing here knows a milestone by name: it reads folovllm/milestones.py and milestones/manifest.toml, so it holds for
rungs to come. Symbols are looked up in the syntax tree; nothing cited is imported.
"""

import ast
import re
import runpy
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from folovllm.learn.pages import Example, load_pages, num_words, run_example
from folovllm.milestones import LADDER, RUNG_IDS
from tests.page_checks import (
    FRONT_PAGES,
    LEARN_PAGES,
    MAX_WORDS,
    PAGES,
    ROOT,
    WORDS_PER_PICTURE,
    dead_links,
    imports_tests,
    problem_of_link,
    relative,
    runnable_examples,
    slug,
    text_of,
)
from tests.script_loader import load_script

pytestmark = pytest.mark.m0

symbols = load_script("page_symbols")
builder = load_script("build_docs")
DEMOS = sorted((ROOT / "milestones").glob("*/demo.py"))
SPECS = sorted((ROOT / "milestones").glob("*/SPEC.md"))
MANIFEST: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "milestones/manifest.toml").read_text(encoding="utf-8"))
PIN: str = symbols.PIN

REQUIREMENT = re.compile(r"^(?:- )?R(\d+)\.(\d+) (.+) — (.+)$")
TEST_ID = re.compile(r"(tests/[\w/]+\.py)::([\w:]+)")
MANIFEST_KEYS = {"title", "code", "tests", "learn", "dev", "spec", "demo", "vllm"}
MAX_LINES = {"README.md": 150, "SPEC.md": 120, "demo.py": 60}


def problem_of_anchor(anchor: str) -> str | None:
    """Returns why `path#Symbol`, `path` or `vllm@tag:path#Symbol` does not resolve, or None if it does."""
    try:
        symbols.line_of_anchor(anchor)
    except ValueError as error:
        return str(error)
    return None


def test_the_lookup_itself() -> None:
    """It finds what is there and misses what is not: functions, methods, fields, attributes, constants, re-exports."""
    assert problem_of_anchor("folovllm/request.py#Request.num_tokens") is None  # a property
    assert problem_of_anchor("folovllm/request.py#Request.num_computed_tokens") is None  # set in __init__
    assert problem_of_anchor("folovllm/outputs.py#EngineStats.num_steps") is None  # a dataclass field
    assert problem_of_anchor("folovllm/milestones.py#LADDER") is None
    assert problem_of_anchor("folovllm/hub/__init__.py#find_model") is None  # imported there
    assert problem_of_anchor("folovllm/csrc/reference_attention.cpp#KvCache.k_page") is None  # C++
    assert problem_of_anchor(f"vllm@{PIN}:vllm/v1/request.py#RequestStatus") is None
    for wrong in ("folovllm/request.py#Requests", "folovllm/request.py#Request.num_token", "folovllm/nothing.py"):
        assert problem_of_anchor(wrong) is not None
    assert problem_of_anchor("vllm@v0.0.1:vllm/v1/request.py#Request") is not None


# ---- pages


@pytest.mark.parametrize("page", [*FRONT_PAGES, *PAGES], ids=relative)
def test_citations_resolve(page: Path) -> None:
    """Both forms: [[path#Symbol]], and the link that build_docs.py makes of it."""
    links = load_script("page_links").Links(page.parent)
    links.written(text_of(page))
    assert not links.problems, f"{relative(page)}:\n  " + "\n  ".join(f"line {n}: {p}" for n, p in links.problems)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_pages_are_built(page: Path) -> None:
    """Lines of citations, included code, head and foot, links to the glossary and to arXiv are as of now."""
    built, problems = builder.build_page(text_of(page), page)
    assert not problems, problems
    assert built == text_of(page), f"{relative(page)} is out of date: run make docs (scripts/dev/build_docs.py)"


def test_every_cited_symbol_of_vllm_is_known() -> None:
    """docs/data/vllm_symbols.json was read from vLLM's wheel. Pages, questions, cases and the manifest cite from it."""
    unknown = set(builder.cited_vllm()) - set(symbols.vllm_symbols())
    assert not unknown, f"{', '.join(sorted(unknown))}: run build_docs.py --vllm-source FOLDER"


COUNTERPART = re.compile(r"vLLM(?:'s)?\s+counterparts?(?::|\s+is)\s+(.+?)(?:\bLeft out:|\n\n|\Z)", re.DOTALL)
VLLM_PATH = re.compile(r"(?<![\w/:@.])vllm/\w+(?:/\w+)*(?:\.py)?")
NOT_IN_THE_WHEEL = re.compile(r"\b(?:csrc|cmake|tests)/|\bflash-attn\b")


def problem_of_counterpart(docstring: str, known: set[str]) -> str | None:
    """Returns what is wrong with the files of vLLM that a file's docstring names, or None.

    `known` are the files of vLLM's wheel that docs/data/vllm_symbols.json has, and the folders above them.
    """
    named = VLLM_PATH.findall(docstring)
    absent = [path for path in named if path not in known]
    if absent:
        return f"vLLM {PIN} has no {', '.join(absent)}; if it has, run build_docs.py --vllm-source FOLDER"
    match = COUNTERPART.search(docstring)
    if match and not (match[1].startswith("none") or VLLM_PATH.search(match[1]) or NOT_IN_THE_WHEEL.search(match[1])):
        return f"names no file of vLLM, and does not say 'none': {match[1].strip()}"
    return None


def files_and_folders(anchors: Iterable[str]) -> set[str]:
    files = {Path(anchor.partition("#")[0]) for anchor in anchors}
    return {path.as_posix() for file in files for path in (file, *file.parents)}


def test_counterparts_in_docstrings_exist() -> None:
    """Every file of the engine says which file of vLLM it corresponds to, at the pinned release, or 'none'."""
    known = files_and_folders(symbols.vllm_symbols())
    docstrings = {p: ast.get_docstring(symbols.syntax_tree(p)) or "" for p in sorted((ROOT / "folovllm").rglob("*.py"))}
    problems = {relative(p): problem_of_counterpart(text, known) for p, text in docstrings.items()}
    guilty = [f"{path}: {problem}" for path, problem in problems.items() if problem]
    assert not guilty, "\n  " + "\n  ".join(guilty)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("vLLM counterpart: vllm/v1/request.py. Left out: much.", None),
        ("vLLM counterpart: none; vllm/v1/request.py is the nearest.", None),
        ("vLLM counterpart: the lines of vllm/v1/core.", None),  # a folder
        ("vLLM counterpart: csrc/cpu/attention.cpp.", None),
        ("vLLM counterparts: vllm/v1/request.py and\nvllm/v1/requests.py.", "has no vllm/v1/requests.py"),
        ("vLLM counterpart: none.\n\nSee vllm/nothing.py.", "has no vllm/nothing.py"),
        ("vLLM counterpart: the scheduler. Left out: vllm/v1/core.", "names no file"),
        ("vLLM's counterpart is\n`Request`.", "names no file"),
        ("It is like folovllm/request.py, and like vllm/request.py.", "has no vllm/request.py"),
    ],
)
def test_wrong_counterparts_are_found(text: str, wrong: str | None) -> None:
    problem = problem_of_counterpart(text, files_and_folders(["vllm/v1/request.py#Request", "vllm/v1/core/x.py"]))
    assert problem is None if wrong is None else wrong in (problem or "")


@pytest.mark.parametrize("page", [*FRONT_PAGES, *PAGES], ids=relative)
def test_relative_links_exist(page: Path) -> None:
    dead = dead_links(page)
    assert not dead, f"{relative(page)}: {', '.join(dead)}"


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Order of freeing", "order-of-freeing"),
        ("What `[]` means: a trap!", "what--means-a-trap"),
        ("See [the pool](03.md#x) & `free_blocks`", "see-the-pool--free_blocks"),
        ("M3 — the cache", "m3--the-cache"),
    ],
)
def test_anchors_follow_the_rules_of_github(heading: str, anchor: str) -> None:
    assert slug(heading) == anchor


def test_contributing_names_files_that_exist() -> None:
    """Its recipes are lists of files; NAME and mN stand for what the reader adds."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"\b(?:folovllm|tests|scripts|docs|milestones)/[\w/]+\.\w+", text)
    absent = [path for path in named if not (ROOT / path).exists() and not re.search(r"NAME|mN", path)]
    assert len(named) > 30 and not absent, f"CONTRIBUTING.md names {', '.join(absent)}"


@pytest.mark.parametrize("page", [*FRONT_PAGES, *PAGES], ids=relative)
def test_tables_are_what_their_result_files_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert load_script("fill_results").fill(text, page.parent) == text, (
        f"{relative(page)} is out of date: run fill_results.py"
    )


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_line_numbers(page: Path) -> None:
    """Lines move with every commit; symbols are cited instead."""
    found = re.findall(r"\.(?:py|cpp|h|cu):\d+", page.read_text(encoding="utf-8"))
    assert not found, f"{relative(page)} cites line numbers ({', '.join(found)}): cite [[path#Symbol]]"


def test_no_paths_of_a_machine() -> None:
    files = [p for top in ("docs", "milestones") for p in (ROOT / top).rglob("*") if p.is_file()]
    pattern = re.compile(r"(?<![\w.~-])/(?:work|root|tmp|opt|home/\w+|Users/\w+)/\w")
    texts = {p: p.read_text(encoding="utf-8") for p in files if p.suffix in (".md", ".toml", ".py", ".json")}
    guilty = [f"{relative(p)}: {m.group()}..." for p, text in texts.items() for m in pattern.finditer(text)]
    assert not guilty, guilty


EXAMPLES = [pytest.param(p, e, id=f"{relative(p)}-{e.number}") for p, e in runnable_examples()]


def test_pages_have_examples_that_run() -> None:
    assert len(EXAMPLES) > 20


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_examples_run(page: Path, example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself, in any folder, and it prints what stands below it on the page."""
    monkeypatch.chdir(tmp_path)
    printed = run_example(example, page.name)
    assert printed, "an example prints what it found, and then asserts it"
    assert example.output is not None, "no ```text block follows: run build_docs.py --examples"
    assert printed == example.output, "the page shows another output: run build_docs.py --examples"
    assert not imports_tests(example.code), "readers have no tests/: use folovllm.learn.toy_engine"


@pytest.mark.parametrize("page", LEARN_PAGES, ids=relative)
def test_a_learning_page_is_in_form(page: Path) -> None:
    """It is in the list of pages, has head and foot, a picture for every 600 words, and is not too long."""
    assert page in {listed.path for listed in load_pages()}, "docs/data/pages.toml does not name it"
    text, words = text_of(page), num_words(text_of(page))
    assert re.match(r"# .+\n+<!-- nav -->", text), "no <!-- nav --> <!-- /nav --> below the title"
    assert text.rstrip().endswith("<!-- /nav -->"), "no <!-- nav --> <!-- /nav --> at the end"
    pictures = len(re.findall(r"^!\[", text, re.MULTILINE))
    assert pictures * WORDS_PER_PICTURE >= words, f"{pictures} pictures for {words} words"
    assert words <= MAX_WORDS


# ---- milestones


def test_manifest_and_ladder_agree() -> None:
    assert set(MANIFEST) <= set(RUNG_IDS), "the manifest names a rung that the ladder does not have"
    missing = [rung.id for rung in LADDER if rung.built and rung.id not in MANIFEST]
    assert not missing, f"built rungs without an entry in milestones/manifest.toml: {missing}"
    titles = {rung.id: rung.title for rung in LADDER}
    assert {id_: entry["title"] for id_, entry in MANIFEST.items()} == {id_: titles[id_] for id_ in MANIFEST}


@pytest.mark.parametrize("rung_id", MANIFEST)
def test_manifest_entry(rung_id: str, pytestconfig: pytest.Config) -> None:
    entry = MANIFEST[rung_id]
    assert set(entry) >= MANIFEST_KEYS, f"{rung_id} lacks {sorted(MANIFEST_KEYS - set(entry))}"
    files = [
        *entry["code"],
        *(entry[k] for k in ("learn", "dev", "spec", "demo", "notebook") if k in entry),
    ]
    absent = [f for f in files if not (ROOT / f).exists()]
    assert not absent, f"{rung_id} names {', '.join(absent)}"
    for page in entry.get("read_first", []):
        assert (problem := problem_of_link(ROOT / "README.md", page)) is None, problem
    assert (ROOT / "milestones" / rung_id / "README.md").exists()
    markers = [line.partition(":")[0] for line in pytestconfig.getini("markers")]
    assert entry["tests"] in markers
    assert all(re.fullmatch(r"vllm/[\w/]+\.py#[\w.]+", symbol) for symbol in entry["vllm"])


@pytest.mark.parametrize("spec", SPECS, ids=relative)
def test_requirements_name_live_tests(spec: Path) -> None:
    lines = spec.read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if re.match(r"^(- )?R\d", line)]
    assert len(requirements) >= 5
    ids = []
    for line in requirements:
        match = REQUIREMENT.match(line)
        assert match, f"not of the form 'R1.2 Sentence. — tests/m1/test_x.py::test_y': {line}"
        rung, number, _, proof = match.groups()
        assert f"m{rung}" == spec.parent.name
        ids.append(int(number))
        tests = TEST_ID.findall(proof)
        assert tests, f"R{rung}.{number} names no test"
        for file, name in tests:
            assert (ROOT / file).is_file(), f"R{rung}.{number}: there is no {file}"
            assert not problem_of_anchor(f"{file}#{name.replace('::', '.')}"), f"R{rung}.{number}: {file} has no {name}"
    assert ids == sorted(set(ids)), "requirements are numbered upwards, each number once"


@pytest.mark.parametrize("rung_id", MANIFEST)
def test_every_test_file_of_a_rung_backs_a_requirement(rung_id: str) -> None:
    text = (ROOT / MANIFEST[rung_id]["spec"]).read_text(encoding="utf-8")
    files = [relative(f) for f in (ROOT / "tests" / rung_id).glob("test_*.py")]
    unclaimed = [f for f in files if f not in text]
    assert not unclaimed, f"{MANIFEST[rung_id]['spec']} has no requirement proved by {', '.join(unclaimed)}: add one"


ACCEPTED = re.compile(r"^## Accepted as done when\n\n(.+?)\Z", re.MULTILINE | re.DOTALL)
EVIDENCE = re.compile(r"`(?:python )?((?:milestones|scripts|docs|tests)/[\w./-]+)|\]\(([^()\s]+)\)")


@pytest.mark.parametrize("spec", SPECS, ids=relative)
def test_what_is_accepted_as_done_has_its_evidence(spec: Path) -> None:
    """A SPEC closes with what its requirements do not say: `[x]` with a command, page or result, `[ ]` if open."""
    section = ACCEPTED.search(spec.read_text(encoding="utf-8"))
    assert section, f"{relative(spec)} does not close with '## Accepted as done when'"
    for line in section[1].splitlines():
        assert re.match(r"- \[[x ]\] \S.+\.$", line), line
        assert line.startswith("- [ ]") or "`" in line or "](" in line, f"no evidence: {line}"
        named = [ROOT / path if path else spec.parent / link for path, link in EVIDENCE.findall(line)]
        absent = [str(path) for path in named if not path.exists()]
        assert not absent, f"{', '.join(absent)} does not exist: {line}"


# ---- references

# What only this project's authors could open, or understand. A requirement (R3.18), a page or a public address is cited
# instead. Issues of other projects have three digits or more, or their project's name in front.
CLOSED_REFERENCES = (
    r"\b[Ss]pec,? [ABL]\d",
    r"\bB\d{1,2}, items?\b|\(B\d{1,2}[,)]",
    r"\bDESIGN(?:\.md)?\b|\bDEVELOPERS\.md\b",
    r"(?<!vLLM )(?<!vllm )\b[Ii]ssue \d{1,2}\b",
    r"\b(?:original|first) (?:plan|documents?)\b|\bsource documents?\b",
    r"\bdecision \d|\bthe specification\b",
    r"\b[Ss]itting\b",
    r"\bshared/(?:spec|cases|seeds|bench|tools)\b",
)
CLOSED = re.compile("|".join(CLOSED_REFERENCES))
REQUIREMENT_ID = re.compile(r"\bR[0-9]\.\d+\b")
WRITTEN = {".py", ".md", ".ipynb", ".toml", ".cpp", ".h"}
FOLDERS = ("folovllm", "tests", "scripts", "docs", "milestones", "notebooks")
TEXTS = sorted(
    [
        *(p for p in ROOT.iterdir() if p.is_file() and (p.suffix in WRITTEN or p.name == "Makefile")),
        *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in WRITTEN),
    ]
)


def problems_of_references(text: str, requirements: set[str]) -> list[str]:
    """References in `text` that a reader cannot open, and requirements that no SPEC has."""
    missing = [id_ for id_ in REQUIREMENT_ID.findall(text) if id_ not in requirements]
    return [match.group() for match in CLOSED.finditer(text)] + missing


def test_references_can_be_opened() -> None:
    """Every file that a person reads: no reference to documents or meetings that are not in this repository."""
    requirements = {id_ for spec in SPECS for id_ in REQUIREMENT_ID.findall(spec.read_text(encoding="utf-8"))}
    texts = {relative(p): p.read_text(encoding="utf-8") for p in TEXTS}
    guilty = {path: problems_of_references(text, requirements) for path, text in texts.items()}
    lines = [f"{path}: {', '.join(found)}" for path, found in guilty.items() if found]
    assert not lines, "cite a requirement (R3.18), a page or a public address instead:\n  " + "\n  ".join(lines)


@pytest.mark.parametrize(
    ("text", "found"),  # a ~ keeps this file free of what the test looks for
    [
        ("before all is written (sp~ec B5).", 1),
        ("(iss~ue 4, 1.2)", 1),
        ("DES~IGN section 5", 1),
        ("what the origi~nal plan said in the last sit~ting", 2),
        ("deci~sion 9 of the source docu~ments", 2),
        ("R99 is no id, R3.18 is one, R3~.999 is not", 1),
        ("vLLM issue 42, pytorch issue 194167, an AttentionSpec, an original planner, a B200", 0),
    ],
)
def test_closed_references_are_found(text: str, found: int) -> None:
    assert len(problems_of_references(text.replace("~", ""), {"R3.18"})) == found


@pytest.mark.parametrize(
    "file", [f for n in MAX_LINES for f in sorted((ROOT / "milestones").glob(f"m*/{n}"))], ids=relative
)
def test_sizes(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES[file.name]


@pytest.mark.parametrize("demo", DEMOS, ids=relative)
def test_demos_run(demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(isinstance(node, ast.Assert) for node in ast.walk(symbols.syntax_tree(demo))), (
        "a demo checks what it shows"
    )
    monkeypatch.setattr(sys, "argv", [str(demo)])
    runpy.run_path(str(demo), run_name="__main__")
    assert capsys.readouterr().out
