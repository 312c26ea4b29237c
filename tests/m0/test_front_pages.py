"""README, docs/README and the pages beside it: their generated parts are as of now, and their commands work."""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from folovllm.config import EngineConfig, engine_arg_names
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.field_comments import field_comments
from folovllm.learn.pages import FENCE, load_pages, num_words
from folovllm.milestones import RUNG_IDS
from folovllm.sampling_params import SamplingParams
from tests.page_checks import ROOT, relative
from tests.script_loader import load_script

pytestmark = pytest.mark.m0

writer = load_script("write_front_pages")
shell = load_script("front_shell")
files = load_script("front_files")
reference = load_script("front_reference")
figures = load_script("draw_front_figures")
DOCS = ROOT / "docs"
LISTED = tomllib.loads((DOCS / "data/pages.toml").read_text(encoding="utf-8"))["front"]
FRONT = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
MAX_WORDS = 1_000  # written by hand, on one page
SHELLS = ("", "bash", "console")  # languages of blocks with commands
ELSEWHERE = {"glossary.md", "results.md", "interview_guide.md"}  # as long as their subject


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", writer.pages(), ids=relative)
def test_the_blocks_are_as_of_now(page: Path) -> None:
    assert writer.with_blocks(text_of(page), page.parent) == text_of(page), "run scripts/dev/write_front_pages.py"


def test_every_block_is_on_a_page() -> None:
    used = {match["name"] for page in writer.pages() for match in writer.BLOCK.finditer(text_of(page))}
    assert used == set(writer.BLOCKS)
    with pytest.raises(ValueError, match="unknown block 'nothing'; there are newcomer, "):
        writer.with_blocks("<!-- front: nothing -->\n<!-- /front -->\n", DOCS)


def test_the_list_of_front_pages_is_complete() -> None:
    named = [entry["file"] for entry in LISTED]
    assert sorted(named) == sorted([*(p.name for p in DOCS.glob("*.md") if p.name != "README.md"), "api/README.md"])
    assert all(set(entry) <= {"file", "title", "what", "topics"} for entry in LISTED)


def test_sizes() -> None:
    long = {p.name: num_words(text_of(p)) for p in FRONT if p.name not in ELSEWHERE}
    assert {name: words for name, words in long.items() if words > MAX_WORDS} == {}
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_the_index_by_topic_has_every_page_under_each_of_its_topics() -> None:
    rows = dict(line.strip("| ").split(" | ", 1) for line in writer.BLOCKS["topics"](DOCS).splitlines()[2:])
    for page in load_pages():
        assert [topic for topic in page.topics if f"({page.file})" not in rows[topic]] == []
    for entry in LISTED:
        assert [topic for topic in entry["topics"] if f"({entry['file']})" not in rows[topic]] == []


# ---- the quick reference


def test_every_argument_is_in_the_quick_reference() -> None:
    text = text_of(DOCS / "quick_reference.md")
    names = [*engine_arg_names(), *(field.name for field in dataclasses.fields(SamplingParams))]
    assert [name for name in names if f"\n| `{name}` | " not in text] == []
    assert '| `block_size` | `16` | M3 (off: `"max_model_len"`) |' in text, "the default of the newest engine"


def test_the_defaults_are_those_that_an_engine_has() -> None:
    """The table shows the arguments of the newest engine, and not the defaults of the dataclasses."""
    config = EngineConfig.from_args()
    for name, part in engine_arg_names().items():
        holder: Any = getattr(config, part) if part else config
        (field,) = (f for f in dataclasses.fields(holder) if f.name == name)
        assert reference.default_of(field) == reference.code(getattr(holder, name)), name


def test_an_argument_without_a_comment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "field_comments", lambda cls: field_comments(cls) | {"block_size": ""})
    with pytest.raises(ValueError, match="no comment behind block_size"):
        reference.engine_arguments(DOCS)


# ---- the project's structure


def test_every_file_with_a_text_is_in_the_structure() -> None:
    text = text_of(DOCS / "project_structure.md")
    sources = [p for p in (ROOT / "folovllm").rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    absent = [relative(p) for p in sources if p.name != "__init__.py" and f"](../{relative(p)})" not in text]
    assert not absent


@pytest.mark.parametrize(
    ("head", "first", "counterpart"),
    [
        ("What it is. And more.\n\nMilestone: M1. vLLM counterpart: none.", "What it is.", "-"),
        (
            "Two\nlines: `a.py` too\n\nvLLM counterpart: none; it has b.py. No.",
            "Two lines: `a.py` too",
            "none; it has b.py",
        ),
        ("A\n\nvLLM counterpart: vllm/v1/nothing.py. Left out: x.", "A", "`vllm/v1/nothing.py`"),
        ("A | b\n\nMilestone: M1.", "A | b", "-"),
    ],
)
def test_heads_of_files(head: str, first: str, counterpart: str) -> None:
    assert files.first_sentence(head) == first
    assert files.counterpart(head) == counterpart


def test_a_known_file_of_vllm_is_a_link() -> None:
    url = "https://github.com/vllm-project/vllm/blob/v0.11.0/vllm/v1/request.py"
    assert files.counterpart("A\n\nvLLM counterpart: vllm/v1/request.py.") == f"[`vllm/v1/request.py`]({url})"


# ---- plans and pictures


def test_a_milestone_builds_on_earlier_ones_and_names_no_more_than_needed() -> None:
    needs = {rung: entry["needs"] for rung, entry in load_script("front_plan").manifest().items()}
    assert list(needs) == list(RUNG_IDS)
    below: dict[str, set[str]] = {}
    for rung in RUNG_IDS:
        assert all(RUNG_IDS.index(need) < RUNG_IDS.index(rung) for need in needs[rung])
        indirect = set[str]().union(*(below[need] for need in needs[rung]))
        assert not indirect & set(needs[rung]), f"{rung} names what its needs need themselves"
        below[rung] = indirect | set(needs[rung])
    assert all("m0" in below[rung] for rung in RUNG_IDS[1:])


def test_the_checklist_has_every_point_with_working_links() -> None:
    text = text_of(DOCS / "milestone_checklist.md")
    points = [line for spec in (ROOT / "milestones").glob("m*/SPEC.md") for line in text_of(spec).splitlines()]
    assert text.count("\n- [") == sum(line.startswith(("- [x]", "- [ ]")) for line in points) > 20
    assert load_script("front_plan").rebased("[a](../x.md#b), [c](https://d.e)", ROOT / "milestones/m3", DOCS) == (
        "[a](../milestones/x.md#b), [c](https://d.e)"
    )


@pytest.mark.parametrize("name", figures.FIGURES)
def test_pictures_show_the_data_of_today(name: str) -> None:
    """The hash in the PNG is that of the numbers, so a newer result file is seen."""
    from PIL import Image

    with Image.open(DOCS / f"img/{name}.png") as image:
        shown = image.info["Description"]
        assert image.width <= 900
    assert shown == figures.hash_of(figures.FIGURES[name][0]()), "run scripts/dev/draw_front_figures.py"


def test_a_tie_is_not_called_a_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    results = load_script("front_results")
    tie = {"arms": {"hf": {"modes": {"single": {"ratio": {"min": 0.9, "median": 1.2, "max": 1.4}}}}}}
    monkeypatch.setattr(results, "result", lambda file: tie)
    with pytest.raises(ValueError, match="tie"):
        results.ratio("hf", "single")


# ---- commands


def commands_on(page: Path) -> list[str]:
    """Every `folovllm ...` in a block of commands: shell blocks, console blocks, and blocks without a language."""
    blocks = [match["body"] for match in FENCE.finditer(text_of(page)) if match["language"] in SHELLS]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    found = [line.removeprefix(".venv/bin/") for line in lines]
    return [line.partition(" 2> ")[0].partition(" > ")[0] for line in found if line.startswith("folovllm ")]


def parse(command: str) -> None:
    """Finds the command and parses its options, without running it. Raises what the command line raises."""
    words = shlex.split(command, comments=True)[1:]
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="folovllm")
    while words and hasattr(group, "commands") and not words[0].startswith("-"):
        name, found, words = group.resolve_command(context, words)
        assert found is not None, command
        group, context = found, typer.Context(found, info_name=name, parent=context, **found.context_settings)
    group.make_parser(context).parse_args(list(words))


@pytest.mark.parametrize("page", FRONT, ids=relative)
def test_commands_exist(page: Path) -> None:
    for command in commands_on(page):
        parse(command)


def test_commands_are_found_and_wrong_ones_refused() -> None:
    assert len(commands_on(ROOT / "README.md")) >= 10 and len(commands_on(DOCS / "getting_started.md")) >= 10
    for wrong in ("folovllm nothing", "folovllm generate --nothing", "folovllm trace nothing", "folovllm learn m99"):
        with pytest.raises(Exception, match=r"No such|unknown milestone"):
            parse(wrong)


def test_messages_of_the_machine_are_in_the_code() -> None:
    """The table of messages quotes what the Makefile and the package say."""
    table = text_of(DOCS / "getting_started.md").partition("| message |")[2]
    quoted = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    sources = [ROOT / "Makefile", *(ROOT / "folovllm").rglob("*.py")]
    said = "\n".join(text_of(path) for path in sources)
    assert len(quoted) >= 5 and [message for message in quoted if message not in said] == []


# ---- console blocks

TALK = """```python
# talk.py
import readline  # with it, the prompt goes to stdout
import sys

print("hello", file=sys.stderr)
while line := input("> "):
    print(line.upper())
```

```console
$ python talk.py{quiet}
> abc
old answer
> d e
```

```console
$ python -c "print(1.25, 's')"
$ python -c "raise SystemExit('no 0.5 ms')"
```
"""


@pytest.mark.parametrize(("quiet", "greeting"), [("", "hello\n"), (" 2> /dev/null", "")])
def test_console_blocks_are_run(quiet: str, greeting: str) -> None:
    """Files are written, a conversation is typed line by line, stderr is shown unless it is sent away."""
    written = shell.with_sessions(TALK.replace("{quiet}", quiet))
    assert f"$ python talk.py{quiet}\n{greeting}> abc\nABC\n> d e\nD E\n" in written
    assert "\n1.25 s\n$ python -c" in written and "\nno 0.5 ms\n```\n" in written
    assert shell.with_sessions(written).count("ABC") == 1


def test_a_program_that_says_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell, "PATIENCE", 1)
    with pytest.raises(ValueError, match="neither ended nor asked"):
        shell.with_sessions('```console\n$ python -c "input()"\n> x\n```\n')


def test_times_do_not_count_when_pages_are_compared() -> None:
    assert shell.same_but_for_times("took 1.25 s (schedule 0.12, rest)", "took 0.30 s (schedule 0.99, rest)")
    assert not shell.same_but_for_times("8 tokens, 1.25 s", "9 tokens, 1.25 s")
    assert not shell.same_but_for_times("version 0.1.0", "version 0.2.0")


def test_a_page_may_run_two_programs_only() -> None:
    with pytest.raises(ValueError, match="folovllm and python only"):
        shell.with_sessions("```console\n$ rm x\n```\n")
    with pytest.raises(ValueError, match="without a command"):
        shell.with_sessions("```console\nx\n```\n")


@pytest.mark.slow  # the answers are bf16: they hold on a processor like that of the pages
@pytest.mark.weights
@pytest.mark.parametrize("page", writer.SESSIONS)
def test_the_pages_show_what_their_commands_print(page: str) -> None:
    """With the real model, from the first answer of a newcomer to error messages."""
    text = text_of(ROOT / page)
    written = shell.with_sessions(text)
    assert shell.same_but_for_times(written, text), "run scripts/dev/write_front_pages.py --sessions"
