"""diff: the first step that differs, each side's part of it, and a sentence of policy; and the command line."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.engine.core import EngineCore
from folovllm.entrypoints.commands.trace import trace_app
from folovllm.trace.diff import diff
from folovllm.trace.record import Trace
from tests.core_helpers import make_request
from tests.m2.test_trace import GOLDEN, small_pool_run
from tests.m2.test_trace_lint import last_come_first, skips_a_decode, too_many_seats
from tests.m2.trace_helpers import CarelessExecutor, record_run, six_requests, traced_core

pytestmark = pytest.mark.m2


def three_requests(path: Path, damage: Callable[[EngineCore], None] | None = None, **args: Any) -> Trace:
    """Two seats, three requests: a ends in step 1, and from step 2 on its seat is free; b ends in step 5."""
    core = traced_core(path, CarelessExecutor(), max_num_seqs=2, **args)
    if damage is not None:
        damage(core)
    lengths = (("a", 4, 2), ("b", 5, 6), ("c", 7, 3))
    return record_run(core, [make_request(name, n, max_tokens) for name, n, max_tokens in lengths])


def test_two_runs_of_the_same_engine_are_the_same_but_for_their_times(tmp_path: Path) -> None:
    a, b = (small_pool_run(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    assert a.steps[0]["t0"] != b.steps[0]["t0"] and a.steps != b.steps
    assert diff(a, b) is None


def test_continuous_against_static(tmp_path: Path) -> None:
    divergence = diff(three_requests(tmp_path / "a"), three_requests(tmp_path / "b", batching="static"))
    assert divergence is not None
    assert (divergence.step, divergence.a_only, divergence.b_only) == (2, ("c prefill 7",), ())
    assert str(divergence).splitlines() == [
        "first divergence at step 2: a-only (c prefill 7)",
        "a computed c, b let it wait while b ran",
        "config differs in batching: 'continuous' / 'static'",
    ]


def test_an_argument_that_one_side_does_not_know_is_no_difference(tmp_path: Path) -> None:
    """A trace of another engine, such as vLLM, names only the arguments that both engines have."""
    a, b = three_requests(tmp_path / "a"), three_requests(tmp_path / "b", batching="static")
    kept = ("batching", "max_num_seqs", "max_num_batched_tokens")
    b.header["config"] = {name: b.config[name] for name in kept}
    divergence = diff(a, b)
    assert divergence is not None and divergence.config == ("batching: 'continuous' / 'static'",)


def test_a_skipped_decode_is_called_that(tmp_path: Path) -> None:
    """The broken one gives r0 no token while others wait."""
    a = record_run(traced_core(tmp_path / "a", CarelessExecutor(), max_num_seqs=3), six_requests())
    broken = traced_core(tmp_path / "b", CarelessExecutor(), max_num_seqs=3)
    skips_a_decode(broken)
    divergence = diff(a, record_run(broken, six_requests()))
    assert divergence is not None and (divergence.a_only, divergence.b_only) == (("r0 decode 1",), ())
    assert (divergence.step, divergence.sentence) == (1, "a running decode was skipped: r0 in b")


def test_another_budget(tmp_path: Path) -> None:
    chunked: dict[str, Any] = {"enable_chunked_prefill": True, "max_num_batched_tokens": 8}
    divergence = diff(three_requests(tmp_path / "a"), three_requests(tmp_path / "b", **chunked))
    assert divergence is not None
    assert str(divergence).splitlines()[:2] == [
        "first divergence at step 0: a-only (b prefill 5); b-only (b prefill 4)",
        "the same requests, but b got 5 tokens in a and 4 in b",
    ]
    assert "enable_chunked_prefill: False / True" in divergence.config


def test_a_preemption_on_one_side_only(tmp_path: Path) -> None:
    """The same run with one block more: b is not preempted in step 1."""
    roomy = traced_core(tmp_path / "a", num_kv_blocks=7)
    a = record_run(roomy, [make_request("a", 7, max_tokens=5), make_request("b", 8, max_tokens=5)])
    divergence = diff(a, small_pool_run(tmp_path / "b"))
    assert divergence is not None and divergence.step == 1
    assert (divergence.a_only, divergence.b_only) == (("b decode 1",), ("preempt b",))
    assert divergence.sentence == "b preempted b, a did not"


def test_another_order(tmp_path: Path) -> None:
    divergence = diff(three_requests(tmp_path / "a"), three_requests(tmp_path / "b", last_come_first))
    assert divergence is not None and divergence.step == 0
    assert divergence.a_only == ("a prefill 4",) and divergence.b_only == ("c prefill 7",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda step: step["sched"][0].update(table=[9]), "the same work, in other blocks"),
        (lambda step: step["events"][-1][2].__setitem__(0, -1), "the same work, but other tokens came out"),
        (
            lambda step: step["queues"].update(running=[]),
            "the same work and tokens, but other requests wait, run or finish",
        ),
        (lambda step: step["pool"].update(free=99), "the same work and tokens, but other blocks are free"),
        (lambda step: step["sched"][0].update(start=1), "a starts at token 8 in a, at 1 in b"),
        (
            lambda step: step["events"].insert(0, ["add", "z", 1, 1, 0]),
            "the engines were not given the same requests, or not at the same step",
        ),
    ],
)
def test_what_differs_is_named(change: Callable[[Any], None], sentence: str, tmp_path: Path) -> None:
    a = small_pool_run(tmp_path / "a")
    b = copy.deepcopy(a)
    change(b.steps[2])
    divergence = diff(a, b)
    assert divergence is not None and (divergence.step, divergence.sentence) == (2, sentence)


def test_block_ids_do_not_count_between_caches_of_different_shape(tmp_path: Path) -> None:
    """m2 against m3: the same work, and nobody wants to read that contiguous tables differ from paged ones."""
    a, b = three_requests(tmp_path / "a", block_size="max_model_len"), three_requests(tmp_path / "b", block_size=4)
    assert a.steps[0]["sched"][1]["table"] == [2] and b.steps[0]["sched"][1]["table"] == [2, 3]
    assert diff(a, b) is None


def test_other_arrivals_come_first(tmp_path: Path) -> None:
    a = small_pool_run(tmp_path / "a")
    b = record_run(traced_core(tmp_path / "b", num_kv_blocks=5), [make_request("a", 6, max_tokens=5)])
    divergence = diff(a, b)
    assert divergence is not None and divergence.step == 0
    assert (divergence.a_only, divergence.b_only) == (("add a 7 5 0", "add b 8 5 0"), ("add a 6 5 0",))
    assert divergence.sentence == "the engines were not given the same requests, or not at the same step"


def test_a_trace_that_ends_early(tmp_path: Path) -> None:
    a = small_pool_run(tmp_path / "a")
    b = copy.deepcopy(a)
    del b.steps[6:]
    longer, shorter = diff(a, b), diff(b, a)
    assert longer is not None and shorter is not None
    assert str(longer) == "first divergence at step 6: a-only (b decode 1)\nb ends after 6 steps, a goes on"
    assert str(shorter) == "first divergence at step 6: b-only (b decode 1)\na ends after 6 steps, b goes on"


# ---- the command line


def run(*args: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(trace_app, [str(arg) for arg in args])
    assert result.exception is None or isinstance(result.exception, (SystemExit, ValueError))
    return result.exit_code, result.output or str(result.exception)


def test_lint_command(tmp_path: Path) -> None:
    code, output = run("lint", GOLDEN)
    assert code == 0 and re.fullmatch(r"9 steps, \d+ rules: all kept\n", output)
    path = tmp_path / "broken.jsonl"
    three_requests(path, too_many_seats)
    code, output = run("lint", path)
    assert code == 1 and output.startswith("step 0: seats: 3 requests run, the limit is 2\n")
    assert "2 x seats: at most max_num_seqs requests run" in output


def test_lint_command_says_when_a_trace_was_not_closed(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text("".join(GOLDEN.read_text().splitlines(keepends=True)[:4]))
    code, output = run("lint", path)
    assert code == 0 and output.startswith("3 steps") and "not closed" in output


def test_diff_command(tmp_path: Path) -> None:
    assert run("diff", GOLDEN, GOLDEN) == (0, "the same 9 steps\n")
    a, b = tmp_path / "a", tmp_path / "b"
    three_requests(a)
    three_requests(b, batching="static")
    code, output = run("diff", a, b)
    assert code == 1 and output.startswith("first divergence at step 2: a-only (c prefill 7)")


def test_show_command() -> None:
    code, output = run("show", GOLDEN, "--step", "4")
    assert code == 0 and output.startswith("step 4 at ") and "AA·A" in output
    code, output = run("show", GOLDEN, "--step", "99")
    assert code != 0 and "no step 99" in output
