"""The HTML viewer: what the page contains, and, in headless Chromium, what it shows.

The picture in docs/learn is made again with: python -m tests.m2.test_trace_view
"""

import dataclasses
import json
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from typer.testing import CliRunner

from folovllm.entrypoints.commands.trace import trace_app
from folovllm.executor.fake import FakeExecutor
from folovllm.learn.three_requests import EXAMPLES, example_core, example_request
from folovllm.learn.toy_engine import steps_of
from folovllm.request import Request
from folovllm.trace.diff import diff
from folovllm.trace.record import Trace, read_trace
from folovllm.trace.replay import Replay
from folovllm.trace.view import VIEWER, compact, render_view
from tests.core_helpers import make_request
from tests.m2.browser_helpers import DARK, chromium, evaluate, needs_browser, open_view
from tests.m2.test_trace import GOLDEN
from tests.m2.trace_helpers import record_run, six_requests, traced_core

pytestmark = pytest.mark.m2


def in_browser(test: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_browser:
        test = mark(test)
    return test


def data_of(page: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def shared_prefix_run(path: Path, **args: Any) -> Trace:
    """Five requests that begin alike, four seats, and a pool that preempts: chunks, hits, copies."""
    args = {"max_model_len": 48, "num_kv_blocks": 17, "max_num_seqs": 4, "max_num_batched_tokens": 12} | args
    core = traced_core(path, FakeExecutor(), enable_chunked_prefill=True, enable_prefix_caching=True, **args)
    prefix = list(range(18))
    return record_run(core, [make_request(f"r{i}", prefix + [100 + i] * (1 + 2 * i), 9) for i in range(5)], 200)


def long_run(path: Path, num_steps: int = 2000) -> Trace:
    """One request that runs in all steps, and up to 23 short ones beside it. The trace is cut while requests run."""
    core = traced_core(path, FakeExecutor(), max_model_len=2048, block_size=16, num_kv_blocks=257, max_num_seqs=24)
    core.add_request(make_request("always", 5, num_steps))
    rng = random.Random(0)
    for i in range(num_steps):
        if i % 4 == 0:
            core.add_request(make_request(f"request-{i}", rng.randint(5, 60), rng.randint(20, 150)))
        core.step()
    core.trace.close()
    return read_trace(path)


# ---- the page, without a browser


def test_the_page_needs_no_network() -> None:
    """One file: no address, no import, no source elsewhere. The policy in the page forbids the browser all of it."""
    page = render_view([read_trace(GOLDEN)], ["run.jsonl"])
    assert not re.findall(r"https?:|//cdn|\bsrc=|\bhref=|url\(|@import|\bimport\b|\bfetch\(|XMLHttpRequest", page)
    assert "default-src 'none'" in page and "$" + "data" not in page
    assert all(f"// {name}: " in page for name in ("model.js", "why.js", "draw.js", "page.js"))


def test_a_request_id_cannot_leave_its_place(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    trace = record_run(traced_core(tmp_path / "t.jsonl"), [make_request(evil, 5, max_tokens=2)])
    page = render_view([trace], [evil])
    assert "<script>alert" not in page
    assert data_of(page)["traces"][0]["steps"][0]["sched"][0]["req"] == evil


def test_what_the_page_can_replay_is_left_out(tmp_path: Path) -> None:
    trace = shared_prefix_run(tmp_path / "t.jsonl")
    records = compact(trace)
    assert not any("table" in entry for record in records for entry in record["sched"])
    assert "running" not in records[3]["queues"] or records[3]["queues"] != records[2]["queues"]
    trace.steps[4]["sched"][0]["table"] = [7, 7]  # the engine contradicts its events
    assert compact(trace)[4]["sched"][0]["table"] == [7, 7]
    assert trace.steps[4]["sched"][0]["table"] == [7, 7], "the trace itself is not changed"


def test_the_divergence_is_that_of_the_diff(tmp_path: Path) -> None:
    runs = [record_run(traced_core(tmp_path / f"{b}.jsonl", max_num_seqs=2, batching=b), six_requests())
            for b in ("continuous", "static")]  # fmt: skip
    found = data_of(render_view(runs, ["a", "b"]))["divergence"]
    assert found == json.loads(json.dumps(dataclasses.asdict(diff(*runs))))  # type: ignore[arg-type]
    assert data_of(render_view([runs[0], runs[0]], ["a", "b"]))["divergence"] is None


def test_the_commands_write_beside_the_trace(tmp_path: Path) -> None:
    trace = tmp_path / "run.jsonl"
    trace.write_bytes(GOLDEN.read_bytes())
    assert CliRunner().invoke(trace_app, ["view", str(trace)]).exit_code == 0
    assert data_of((tmp_path / "run.html").read_text())["traces"][0]["name"] == "run.jsonl"
    assert (
        CliRunner().invoke(trace_app, ["view", str(trace), str(GOLDEN), "-o", str(tmp_path / "two.html")]).exit_code
        == 0
    )
    assert len(data_of((tmp_path / "two.html").read_text())["traces"]) == 2
    assert CliRunner().invoke(trace_app, ["perfetto", str(trace)]).exit_code == 0
    assert json.loads((tmp_path / "run.perfetto.json").read_text())["traceEvents"]


@pytest.mark.parametrize("command", ["view", "perfetto"])
def test_a_file_that_cannot_be_written_is_refused(command: str, tmp_path: Path) -> None:
    trace = tmp_path / "run.jsonl"
    trace.write_bytes(GOLDEN.read_bytes())
    for out, message in ((trace, "is the trace itself"), (tmp_path / "no" / "x.html", "cannot write")):
        error = CliRunner().invoke(trace_app, [command, str(trace), "-o", str(out)]).exception
        assert isinstance(error, ValueError) and message in str(error) and "-o" in str(error)
    assert trace.read_bytes() == GOLDEN.read_bytes()


# ---- the state that the page replays


REPLAYED = """model.records.map((_, step) => {
  const state = model.stateAt(step);
  return {
    running: state.running, waiting: state.waiting, tables: Object.fromEntries(state.tables),
    holders: Object.fromEntries(state.holders),
    computed: Object.fromEntries([...state.requests].map(([id, r]) => [id, [r.computed, r.known]])),
    cached: model.cachedBlocks(state).length, proved: state.cachedIsProved,
  };
})"""


def replayed(trace: Trace) -> list[dict[str, Any]]:
    """The same by folovllm/trace/replay.py: each step after the scheduler's decision."""
    replay, states = Replay(), []
    for record in trace.steps:
        for event in record["events"][: record["planned"]]:
            replay.apply(event)
        replay.run(record["sched"])
        state = {
            "running": replay.running,
            "waiting": replay.waiting,
            "tables": {r: t for r, t in replay.tables.items() if t},
            "holders": {str(block): held for block, held in replay.holders.items()},
            "computed": {r.request_id: [r.num_computed_tokens, r.num_tokens] for r in replay.requests.values()},
        }
        states.append(json.loads(json.dumps(state)))
        for event in record["events"][record["planned"] :]:
            replay.apply(event)
    return states


@in_browser
@pytest.mark.parametrize("run", ["tight", "prefix", "long"])
def test_the_page_replays_what_the_lint_replays(run: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    if run == "tight":
        trace = record_run(traced_core(path, num_kv_blocks=7), six_requests())
    else:
        trace = shared_prefix_run(path, partial_block_hits=True) if run == "prefix" else long_run(path, 150)
    for step, (here, there) in enumerate(zip(evaluate(tmp_path, trace, REPLAYED), replayed(trace), strict=True)):
        assert {name: here[name] for name in there} == there, f"step {step}"
        assert here["proved"], f"step {step}: the cached blocks are not those that the pool counts"


@in_browser
def test_the_rows_of_the_gantt_chart_by_hand(tmp_path: Path) -> None:
    rows = evaluate(tmp_path, read_trace(GOLDEN), "model.lives.map((l) => [l.id, l.first, l.last, l.reason, l.runs])")
    runs = [[id_, first, last, reason, [[run["kind"], run["from"], run["to"]] for run in runs]]
            for id_, first, last, reason, runs in rows]  # fmt: skip
    assert runs == [
        ["a", 0, 4, "length", [["prefill", 0, 0], ["decode", 1, 4]]],
        ["b", 0, 8, "length", [["prefill", 0, 0], ["preempted", 1, 4], ["prefill", 5, 5], ["decode", 6, 8]]],
    ]


@in_browser
def test_an_id_that_comes_back_has_a_row_of_its_own(tmp_path: Path) -> None:
    core = traced_core(tmp_path / "t.jsonl")
    core.add_request(make_request("a", 5))
    core.step()
    core.step()
    core.abort_requests(["a"])
    core.add_request(make_request("a", 3, max_tokens=2))
    trace = record_run(core, [])
    rows = evaluate(tmp_path, trace, "model.lives.map((l) => [l.first, l.last, l.reason])")
    assert rows == [[0, 1, "abort"], [2, 3, "length"]]


# ---- what the page says


@in_browser
def test_a_preemption_on_the_page(tmp_path: Path) -> None:
    page = open_view(tmp_path, read_trace(GOLDEN), "step=1&request=b")
    assert page.lines("step") == ["step 1 of 0..8"]
    assert page.lines("why") == [
        "b is preempted and releases 2 blocks. The running requests need at least 1 more block; 0 were free.",
        "a runs and computes its one missing token (token 7).",
        "b waits: a step that preempts admits no request.",
    ]
    assert page.lines("running") == ["a"] and page.lines("waiting") == ["b"]
    request = " ".join(page.lines("request"))
    assert "state waiting, preempted" in request and "computed 0 of 9 known tokens" in request
    assert "It holds no blocks." in request
    assert page.attributes["blocks"][0]["aria-label"] == "2 blocks held, 0 free and cached, 2 free."
    counted = "After the step, the trace counts 0 free and cached, 2 free."
    assert page.lines("pool") == [f"2 held (0 shared), 0 free and cached, 2 free. {counted}"]


@in_browser
def test_a_block_table_on_the_page(tmp_path: Path) -> None:
    page = open_view(tmp_path, read_trace(GOLDEN), "step=5&request=b")
    table = page.lines("request")[-4:]
    assert table == ["tokens block filled ref", "0..3 4 4/4 1", "4..7 2 4/4 1", "8..11 1 1/4 1"]
    assert page.lines("why")[0] == "b comes back after its preemption and computes tokens 0..8 of the 9 it knows."


def requests(*lengths: tuple[int, int]) -> list[Request]:
    return [make_request("abcdefgh"[i], prompt, max_tokens) for i, (prompt, max_tokens) in enumerate(lengths)]


CHUNKED = {"enable_chunked_prefill": True}
SENTENCES = "model.records.map((_, step) => explain(model, model.stateAt(step)).map((s) => s.text)).flat()"
REASONS: list[tuple[dict[str, Any], list[tuple[int, int]], str]] = [
    ({"max_num_seqs": 1}, [(4, 3), (4, 3)], "b waits: the only seat is taken."),
    ({"max_num_seqs": 2}, [(4, 3)] * 5, "c waits: all 2 seats are taken. 2 more requests wait behind it."),
    ({**CHUNKED, "max_num_batched_tokens": 4}, [(4, 3), (4, 3)], "b waits: the budget of 4 tokens is used up."),
    (
        {"max_num_batched_tokens": 16},
        [(9, 3), (10, 3)],
        "b waits: its 10 tokens must be computed whole, and the budget has 7 left.",
    ),
    ({"num_kv_blocks": 5}, [(9, 2), (8, 2)], "b waits: its next 8 tokens need 2 blocks, and 1 is free."),
    (
        {"num_kv_blocks": 5, "enable_prefix_caching": True},
        [(9, 2), (8, 2)],
        "b waits: without a prefix hit, its next 8 tokens need 2 blocks, and 1 is free.",
    ),
    (
        {**CHUNKED, "max_num_batched_tokens": 4},
        [(10, 3)],
        "a is admitted and computes tokens 0..3 of the 10 it knows, 6 remain: the budget of 4 tokens is used up.",
    ),
    (
        {**CHUNKED, "long_prefill_token_threshold": 3},
        [(10, 3)],
        "a runs and goes on with tokens 3..5 of the 10 it knows, 4 remain: "
        "long_prefill_token_threshold allows 3 at once.",
    ),
]


@in_browser
@pytest.mark.parametrize(("args", "lengths", "sentence"), REASONS)
def test_why(args: dict[str, Any], lengths: list[tuple[int, int]], sentence: str, tmp_path: Path) -> None:
    trace = record_run(traced_core(tmp_path / "t.jsonl", **args), requests(*lengths))
    assert sentence in evaluate(tmp_path, trace, SENTENCES)


@in_browser
def test_why_does_not_claim_what_the_records_do_not_prove(tmp_path: Path) -> None:
    """A scheduler that lets requests wait for no reason: the page says that it does not know."""
    core = traced_core(tmp_path / "t.jsonl", max_num_seqs=8)
    trace = record_run(core, requests((4, 3), (4, 3)))
    for record in trace.steps[:1]:
        record["sched"] = record["sched"][:1]
        record["events"] = [event for event in record["events"] if event[1] == "a" or event[0] == "add"]
        record["planned"] = 3
        record["queues"] = {"num_waiting": 1, "waiting": ["b"], "running": ["a"]}
    assert "b waits: the record does not say why." in evaluate(tmp_path, trace, SENTENCES)


@in_browser
def test_why_of_hits_and_copies(tmp_path: Path) -> None:
    trace = shared_prefix_run(tmp_path / "t.jsonl", partial_block_hits=True, num_kv_blocks=41)
    said = evaluate(tmp_path, trace, SENTENCES)
    assert any("16 tokens (4 blocks) from the prefix cache" in text for text in said)
    assert any("tokens copied from block" in text for text in said)


@in_browser
def test_two_traces_side_by_side(tmp_path: Path) -> None:
    lengths = ((4, 5), (4, 2), (4, 3))
    runs = [record_run(traced_core(tmp_path / f"{b}.jsonl", max_num_seqs=2, batching=b), requests(*lengths))
            for b in ("continuous", "static")]  # fmt: skip
    page = open_view(tmp_path, runs)
    assert page.lines("step") == ["step 2 of 0..7"], "it opens where they part"
    assert page.lines("verdict")[0].startswith("First divergence at step 2: a computed c, b let it wait while a ran.")
    assert page.lines("name") + page.lines("name", 1) == ["a: a.jsonl", "b: b.jsonl"]
    assert "c is admitted and computes tokens 0..3 of the 4 it knows." in page.lines("why")
    assert page.lines("why", 1)[-1] == "c waits: a static batch admits only when no request runs."
    over = open_view(tmp_path, runs, "step=7")
    assert over.lines("over") == ["This trace ended after step 4."] and "hidden" in over.attributes["over"][1]


@in_browser
def test_the_keys(tmp_path: Path) -> None:
    press = "for (const key of {}) dispatchEvent(new KeyboardEvent('keydown', {{key}}))"
    trace = read_trace(GOLDEN)
    for keys, step, chosen in (
        (["ArrowRight", "ArrowRight", "ArrowLeft", "j"], 1, "a"),
        (["End", "ArrowRight", "k"], 8, "b"),
        (["End", "Home", "ArrowLeft", "j", "j", "j"], 0, "b"),
        (["PageDown", "PageUp", "PageDown", "+", "-"], 8, None),
    ):
        page = open_view(tmp_path, trace, "step=0", press.format(json.dumps(keys)))
        assert page.lines("step") == [f"step {step} of 0..8"], keys
        assert page.lines("request")[0].startswith(f"request {chosen}" if chosen else "Choose a request"), keys
    asked = open_view(tmp_path, trace, "", press.format(json.dumps(["?"])))
    assert "open" in asked.attributes["help"][0]


@in_browser
def test_a_stranger_s_request_id_is_text(tmp_path: Path) -> None:
    evil = "</script><script>document.title = 'owned'</script><b>"
    trace = record_run(traced_core(tmp_path / "t.jsonl"), [make_request(evil, 5, max_tokens=2)])
    page = open_view(tmp_path, trace, script="document.getElementById('step').textContent += document.title")
    assert "owned" not in page.parts["step"][0] and evil in page.parts["running"][0]


@in_browser
def test_an_empty_and_a_cut_trace_open(tmp_path: Path) -> None:
    core = traced_core(tmp_path / "t.jsonl")
    core.shutdown()
    assert open_view(tmp_path, read_trace(tmp_path / "t.jsonl")).lines("step") == ["no steps"]


# ---- pictures


def screenshot(tmp_path: Path, trace: Trace, fragment: str, *flags: str) -> np.ndarray:
    """Returns the pixels of the page, 0..255.  # [height, width, 3]"""
    (tmp_path / "page.html").write_text(render_view([trace], ["run.jsonl"]), encoding="utf-8")
    shot = tmp_path / "shot.png"
    address = f"{(tmp_path / 'page.html').as_uri()}#{fragment}"
    chromium(tmp_path, "--window-size=1200,1000", f"--screenshot={shot}", *flags, address)
    return np.round(image.imread(shot)[..., :3] * 255).astype(int)  # [height, width, 3]


def num_pixels(pixels: np.ndarray, colour: str) -> int:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - rgb).max(axis=-1) <= 2).sum())


def colours() -> dict[str, tuple[str, str]]:
    """Name -> (light, dark), from the style sheet."""
    found = re.findall(r"--(\w+): light-dark\((#\w+), (#\w+)\)", (VIEWER / "style.css").read_text())
    return {name: (light, dark) for name, light, dark in found}


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_pictures_are_drawn_in_the_reader_s_colours(dark: bool, tmp_path: Path) -> None:
    trace = record_run(traced_core(tmp_path / "t.jsonl", num_kv_blocks=7), six_requests())
    pixels = screenshot(tmp_path, trace, "step=2", *([DARK] if dark else []))
    for name in ("paper", "prefill", "decode", "waiting", "preempted", "bar"):
        mine, other = colours()[name][dark], colours()[name][not dark]
        assert num_pixels(pixels, mine) > 40, f"no {name} ({mine})"
        assert num_pixels(pixels, other) < num_pixels(pixels, mine), name


@in_browser
def test_cached_blocks_look_different_from_free_ones(tmp_path: Path) -> None:
    trace = shared_prefix_run(tmp_path / "t.jsonl", num_kv_blocks=41)
    before, after = (screenshot(tmp_path, trace, f"step={step}") for step in (0, len(trace.steps) - 1))
    cached = colours()["cached"][0]
    assert trace.steps[-2]["pool"]["cached"] > 4
    assert num_pixels(after, cached) > num_pixels(before, cached) + 100


@in_browser
def test_a_long_trace_costs_no_more_to_draw(tmp_path: Path) -> None:
    """The page draws only what is in sight. `pytest -s -m browser` prints how long it took to open."""
    drawn = []
    for num_steps in (400, 2000):
        trace = long_run(tmp_path / "t.jsonl", num_steps)
        page = open_view(tmp_path, trace, f"step={num_steps // 2}")
        assert page.lines("step") == [f"step {num_steps // 2} of 0..{num_steps - 1}"]
        body = page.attributes["body"][0]
        print(f"\n{num_steps} steps: open after {body['data-opened-ms']} ms, {body['data-cells']} cells drawn")
        drawn.append(int(body["data-cells"] or 0))
    assert drawn[0] > 300 and abs(drawn[1] - drawn[0]) < 300


def draw_picture(picture: Path) -> None:
    """Makes the picture of docs/learn/02: the three requests in six blocks, in the step of the preemption."""
    with tempfile.TemporaryDirectory() as folder:
        page, run = Path(folder) / "page.html", Path(folder) / "run.jsonl"
        core = example_core(num_kv_blocks=7, trace=str(run))
        for _ in steps_of(core, [(EXAMPLES[name].arrival, example_request(name)) for name in EXAMPLES]):
            core.step()
        core.shutdown()
        page.write_text(render_view([read_trace(run)], ["run.jsonl"]), encoding="utf-8")
        place = f"{page.as_uri()}#step=5&request=c&theme=light"
        chromium(Path(folder), "--window-size=900,775", "--hide-scrollbars", f"--screenshot={picture}", place)


if __name__ == "__main__":
    draw_picture(Path(__file__).parents[2] / "docs/learn/img/02_trace_view.png")
