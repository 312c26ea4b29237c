"""Milestone folders are complete, the manifest agrees with them, and what each bench.toml claims is true.

A test about one milestone carries that milestone's marker.
"""

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.benchmarks.options import parse_options
from folovllm.benchmarks.serve.options import parse_options as parse_serve_options
from folovllm.entrypoints.cli import app
from folovllm.learn.exercise import find_exercises, milestones_dir
from folovllm.milestones import LADDER, RUNG_IDS
from folovllm.parts import PARTS
from folovllm.sim.bench import Bench, load_bench, run_bench
from folovllm.sim.claims import holds
from folovllm.sim.counting import COUNTERS, METRICS, TIMES
from tests.script_loader import load_script

ROOT = Path(__file__).parents[2]
MILESTONES = ROOT / "milestones"
MANIFEST: dict[str, dict[str, Any]] = tomllib.loads((MILESTONES / "manifest.toml").read_text(encoding="utf-8"))
EACH = pytest.mark.parametrize("rung_id", [pytest.param(r, marks=getattr(pytest.mark, r), id=r) for r in RUNG_IDS])
FILES = {"README.md", "SPEC.md", "demo.py", "bench.toml", "questions.toml", "exercises", "results"}


def bench_of(rung_id: str) -> Bench:
    return load_bench(MILESTONES / rung_id / "bench.toml")


# ---- folders


@EACH
def test_a_milestone_folder_is_complete(rung_id: str) -> None:
    missing = FILES - {path.name for path in (MILESTONES / rung_id).iterdir()}
    assert not missing, f"milestones/{rung_id} lacks {', '.join(sorted(missing))}"
    assert any((MILESTONES / rung_id / "results").iterdir()) and find_exercises(rung_id)


@EACH
def test_the_manifest_names_what_the_folder_holds(rung_id: str) -> None:
    entry = MANIFEST[rung_id]
    for key, name in (("bench", "bench.toml"), ("questions", "questions.toml"), ("exercises", "exercises")):
        assert entry[key] == f"milestones/{rung_id}/{name}"
    folder = MILESTONES / rung_id / "cases"
    named = entry.get("cases")
    assert named == (f"milestones/{rung_id}/cases" if folder.exists() else None), (
        f"the manifest names {named} as the cases of {rung_id}, but there is {folder if folder.exists() else 'none'}"
    )


@EACH
def test_the_manifest_names_the_parts_that_the_exercises_replace(rung_id: str) -> None:
    parts = {exercise.part for exercise in find_exercises(rung_id) if exercise.replaces_a_part}
    assert set(MANIFEST[rung_id]["parts"]) == parts <= set(PARTS), f"the exercises of {rung_id} replace {sorted(parts)}"


@EACH
def test_the_path_through_a_milestone_takes_the_minutes_that_it_says(rung_id: str) -> None:
    """And it leads through the demo, the bench, the exercise of the fast track, and the questions."""
    text = (MILESTONES / rung_id / "README.md").read_text(encoding="utf-8")
    path = re.search(r"\*\*(\d+) minutes\.\*\*\n(.*?)\n\n", text, re.DOTALL)
    assert path, "no '**90 minutes.**' with a numbered list"
    assert sum(map(int, re.findall(r"^\d+\. \((\d+)\)", path[2], re.MULTILINE))) == int(path[1])
    (fast,) = (exercise for exercise in find_exercises(rung_id) if exercise.fast)
    for stop in (f"{rung_id}/demo.py", f"learn {rung_id} bench", fast.command("check"), f"quiz {rung_id}"):
        assert stop in path[2], f"the path does not lead through {stop}"
    assert f"({fast.minutes})" in next(line for line in path[2].splitlines() if fast.command("check") in line)


@pytest.mark.m0
def test_start_here_says_how_long_the_plans_are() -> None:
    readmes = [MILESTONES / rung.id / "README.md" for rung in LADDER]
    minutes = [
        int(re.findall(r"^\*\*(\d+) minutes\.\*\*$", file.read_text(encoding="utf-8"), re.MULTILINE)[0])
        for file in readmes
    ]
    text = (ROOT / "docs/learn/00_start_here.md").read_text(encoding="utf-8")
    assert f"is a plan of {min(minutes)} to {max(minutes)} minutes" in text


@pytest.mark.m0
def test_generated_parts_of_the_pages_are_up_to_date() -> None:
    pages = load_script("write_milestones").written_pages()
    stale = [page.relative_to(ROOT) for page, text in pages.items() if page.read_text(encoding="utf-8") != text]
    assert len(pages) == 1 + len(LADDER)
    assert not stale, f"run python scripts/dev/write_milestones.py: {', '.join(map(str, stale))}"


@pytest.mark.m0
def test_a_page_without_the_place_for_a_block_is_named() -> None:
    fill = load_script("write_milestones").fill
    page = "a\n<!-- work -->\n{}<!-- /work -->\nb"
    assert fill(page.format("old\n"), "work", "new\n") == page.format("new\n")
    with pytest.raises(ValueError, match="no place <!-- work -->"):
        fill("nothing here", "work", "new\n")


@pytest.mark.m0
def test_the_page_of_the_exercises_shows_what_its_commands_print() -> None:
    """The way of a newcomer, from `folovllm learn m0` to a passed exercise, run in an empty folder."""
    script = load_script("write_exercises_page")
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.written_page(text) == text, "run python scripts/dev/write_exercises_page.py"
    for words in ("skipped until 2 passes", "Hint 1 of 3", "Passed. Think about this"):
        assert words in text


@pytest.mark.m0
def test_the_page_of_the_exercises_quotes_what_an_exercise_says() -> None:
    text = load_script("write_exercises_page").PAGE.read_text(encoding="utf-8")
    quotes = re.findall(r"<!-- quoted: (\S+) -->\n```text\n(.*?)```", text, re.DOTALL)
    assert quotes and all(lines in (ROOT / file).read_text(encoding="utf-8") for file, lines in quotes)


@pytest.mark.m0
def test_every_exercise_is_in_the_table_with_its_minutes() -> None:
    exercises = find_exercises()
    rows = load_script("write_exercises_page").table().splitlines()[2:-2]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [int(minutes) for _, _, minutes, _ in cells] == [exercise.minutes for exercise in exercises]
    bold = [name.startswith("**") for name, *_ in cells]
    assert bold == [exercise.fast for exercise in exercises] and sum(bold) == len(LADDER)
    assert all(f"[{exercise.id}](" in name for exercise, (name, *_) in zip(exercises, cells, strict=True))


# ---- benches


@EACH
def test_every_arm_of_a_bench_is_there_for_a_claim(rung_id: str) -> None:
    bench = bench_of(rung_id)
    used = {name for claim in bench.claims for name in re.findall(r"\((\w+)\)", claim)}
    assert used == set(bench.arms)
    assert any(claim.startswith("tokens(") for claim in bench.claims)


@EACH
def test_a_bench_names_commands_that_measure_the_real_engine(rung_id: str) -> None:
    commands = [shlex.split(command) for command in bench_of(rung_id).measure]
    assert commands
    for program, script, *arguments in commands:
        if program == "folovllm":  # a server, from outside
            assert (script, arguments[0]) == ("bench", "serve") and parse_serve_options(arguments[1:]).num_prompts
        else:
            assert (ROOT / script).is_file(), script
        if script.endswith("compare_perf.py"):
            assert parse_options(arguments).arms


@EACH
def test_the_command_prints_the_table_and_the_claims_which_hold(rung_id: str) -> None:
    result = CliRunner().invoke(app, ["learn", rung_id, "bench"])
    bench = load_bench(milestones_dir() / rung_id / "bench.toml")
    assert result.exit_code == 0, result.output
    for text in (*bench.metrics, *bench.arms, *bench.claims, *bench.measure, "trap:"):
        assert text in result.output
    assert "FAILS" not in result.output and result.output.count("\n holds  ") == len(bench.claims)


@pytest.mark.m2
def test_a_claim_that_does_not_hold_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (MILESTONES / "m2/bench.toml").read_text(encoding="utf-8")
    (tmp_path / "m2").mkdir()
    (tmp_path / "m2/bench.toml").write_text(text.replace("steps(m2) < steps(static)", "steps(m2) > steps(static)"))
    monkeypatch.setattr("folovllm.entrypoints.commands.learn_bench.milestones_dir", lambda: tmp_path)
    result = CliRunner().invoke(app, ["learn", "m2", "bench"])
    assert result.exit_code == 1 and "FAILS  steps(m2) > steps(static)" in result.output


@pytest.mark.m6
def test_a_wrong_prefix_index_gives_other_tokens() -> None:
    """The arms run on a model whose tokens depend on every K and V read, so equality of tokens says something."""
    bench = bench_of("m6")
    mutant = MILESTONES / "m6/exercises/longest_hit/mutants/stale_count.py"
    wrong = {**bench.arms["m6_small_cache"], "parts": {"core.prefix_index.hash": f"{mutant}:HashPrefixIndex"}}
    arms = run_bench(dataclasses.replace(bench, arms={"m5": bench.arms["m5"], "wrong": wrong}))
    assert not holds("tokens(wrong) == tokens(m5)", arms)


@pytest.mark.m4
def test_the_tile_of_the_bench_is_that_of_torch_flash() -> None:
    from folovllm.attention.backends.torch_flash import TorchFlashBackend

    tiles = [tuple(arm["tile"]) for arm in bench_of("m4").arms.values() if "tile" in arm]
    assert tiles == [(TorchFlashBackend.BLOCK_Q, TorchFlashBackend.BLOCK_KV)] * 2


@pytest.mark.m1
def test_without_a_cache_every_token_computes_all_before_it() -> None:
    """By hand: a prompt of 3 and an answer of 2. With a cache 3 + 1 tokens are computed, without it 3 + 4."""
    workload = {"num_requests": 1, "prompt": [3, 3], "output": [2, 2]}
    arms = {"m1": {}, "recompute": {"recompute": True}}
    found = run_bench(Bench("", workload, arms, (), (), {}, (), {"preset": "m1"}))
    assert (found["m1"]["computed_tokens"], found["recompute"]["computed_tokens"]) == (4, 7)
    assert found["m1"]["tokens"] == found["recompute"]["tokens"] and len(found["m1"]["tokens"][0]) == 5


# ---- claims

ARMS = {"a": {"steps": 3, "kv_util": 0.5, "tokens": ((1, 2),)}, "b": {"steps": 4, "kv_util": 0.25, "tokens": ((1, 3),)}}


@pytest.mark.m2
@pytest.mark.parametrize(
    ("claim", "result"),
    [
        ("steps(a) < steps(b)", True),
        ("steps(a) > steps(b)", False),
        ("2 < steps(a) < steps(b) <= 4", True),
        ("2 < steps(a) < steps(b) < 4", False),
        ("kv_util(a) == 2 * kv_util(b)", True),
        ("steps(b) - steps(a) != 1", False),
        ("steps(b) / 2 + 1 >= steps(a)", True),
        ("tokens(a) == tokens(a)", True),
        ("tokens(a) == tokens(b)", False),
        ("tokens(a) != tokens(b)", True),
    ],
)
def test_claims(claim: str, result: bool) -> None:
    assert holds(claim, ARMS) is result


@pytest.mark.m2
@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("steps(a)", "is no comparison; write e.g."),
        ("steps(a) / 0 > 1", "0 is 0, and nothing can be divided by it"),
        ("steps(a) <", "invalid syntax"),
        ("steps(a) in steps(b)", "is no comparison"),
        ("steps(c) < 3", "unknown arm 'c'"),
        ("step(a) < 3", "unknown metric 'step'; did you mean 'steps'"),
        ("seconds(a) < seconds(b)", "seconds is a modelled time; print it, but claim only counters"),
        ("tok_per_s(a) > 2 * tok_per_s(b)", "tok_per_s is a modelled time"),
        ("tokens(a) < tokens(b)", "there is no order between them"),
        ("tokens(a) + tokens(b) == 3", "neither a number nor metric"),
        ("__import__('os').getpid() > 0", "neither a number nor metric"),
        ("steps(a, b) < 3", "neither a number nor metric"),
        ("'steps' == 'steps'", "neither a number nor metric"),
        ("steps(a) ** 99 > 1", "neither a number nor metric"),
    ],
)
def test_what_is_no_claim_is_refused(claim: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        holds(claim, ARMS)


@pytest.mark.m2
def test_counters_and_times_are_told_apart() -> None:
    assert not COUNTERS.keys() & TIMES.keys() and METRICS.keys() == COUNTERS.keys() | TIMES.keys()


@pytest.mark.m2
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("trap = ", "traps = ", r"\[ledger\] must have hypothesis, wins, loses, control, trap"),
        ('metrics = ["steps"', 'metrics = ["step"', "unknown metric 'step'"),
        ("measure = ", "measures = ", "unexpected keyword argument 'measures'"),
        ("assert = [", "assert = []\nother = [", "unexpected keyword argument 'other'"),
        ('title = "', "title = ", "bench.toml: "),
    ],
)
def test_a_wrong_bench_file_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = (MILESTONES / "m2/bench.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "bench.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_bench(path)
    assert str(path) in str(error.value)
