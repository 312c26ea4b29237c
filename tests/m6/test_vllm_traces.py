"""The recordings of vLLM and of our engine: docs/learn/vllm_traces.md tells the truth, and ours is still current."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.entrypoints.commands.trace import trace_app
from folovllm.executor.fake import FakeExecutor
from folovllm.model_shapes import shape_architecture
from folovllm.outputs import ModelRunnerOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.trace.diff import diff
from folovllm.trace.lint import lint
from folovllm.trace.record import Trace, read_trace
from folovllm.trace.view import render_view
from tests.m2.browser_helpers import CHROMIUM, open_view
from tests.script_loader import load_script

pytestmark = pytest.mark.m6

ROOT = Path(__file__).parents[2]
TRACES = ROOT / "docs/data/vllm_traces"
PAGE = ROOT / "docs/learn/vllm_traces.md"
workloads = load_script("trace_workloads")
NAMES = list(workloads.WORKLOADS)
MAX_BYTES = 150_000

# What vLLM does otherwise: the first step that differs, and the rules of our lint that its trace breaks.
DIFFERENCES = {"long_prompt": (7, ["chunk"]), "urgent": (4, ["hit"])}


def recorded(name: str, engine: str) -> Trace:
    return read_trace(TRACES / f"{name}.{engine}.jsonl")


def test_every_workload_is_recorded_from_both_engines() -> None:
    files = {path.name: path.stat().st_size for path in TRACES.iterdir()}
    assert set(files) == {f"{name}.{engine}.jsonl" for name in NAMES for engine in ("folovllm", "vllm")}
    assert max(files.values()) < MAX_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_the_lint_finds_no_fault_of_ours_and_the_known_ones_of_vllm(name: str) -> None:
    assert lint(recorded(name, "folovllm")) == []
    assert [violation.rule for violation in lint(recorded(name, "vllm"))] == DIFFERENCES.get(name, (0, []))[1]


@pytest.mark.parametrize("name", NAMES)
def test_where_the_engines_part(name: str) -> None:
    ours, vllms = recorded(name, "folovllm"), recorded(name, "vllm")
    assert ours.header["kv"] == vllms.header["kv"], "or the diff would not compare blocks"
    first = diff(ours, vllms)
    assert (first and first.step) == DIFFERENCES.get(name, (None, []))[0]
    assert first is None or first.config == (), "the settings that both name are equal"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_the_page_shows_the_counts_that_differ(tmp_path: Path) -> None:
    page = open_view(tmp_path, [recorded("urgent", "folovllm"), recorded("urgent", "vllm")], "step=4")
    for pane, (cached, free) in enumerate([(8, 1), (9, 0)]):
        counted = f"After the step, the trace counts {cached} free and cached, {free} free."
        assert page.lines("pool", pane)[0].endswith(counted)


@pytest.mark.parametrize("name", NAMES)
def test_both_in_one_page_of_the_viewer(name: str) -> None:
    page = render_view([recorded(name, "folovllm"), recorded(name, "vllm")], ["folovllm", "vllm"])
    assert '"divergence":{"step":' in page or name not in DIFFERENCES


def console_blocks() -> list[tuple[str, str]]:
    """The commands of the page and what it says they print."""
    text = "\n".join(re.findall(r"^```console\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
    return [(command, output.strip()) for command, output in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n?)*)", text, re.M)]


@pytest.mark.parametrize(("command", "output"), console_blocks())
def test_the_page_shows_what_its_commands_print(command: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, group, *args = shlex.split(command)
    assert (program, group) == ("folovllm", "trace")
    assert CliRunner().invoke(trace_app, args).stdout.strip() == output


def test_the_page_has_commands() -> None:
    assert len(console_blocks()) >= 8


class AnsweringExecutor(FakeExecutor):
    """Answers with the tokens of a recording, step by step. It computes nothing."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.answers = [{e[1]: e[2] for e in record["events"] if e[0] == "sample"} for record in trace.steps]
        self.step = 0

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        return scheduler_output

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        answers = self.answers[self.step]
        self.step += 1
        return ModelRunnerOutput({r: answers.get(r, []) for r in handle.num_scheduled_tokens})


class Core:
    """The engine core of today, driven like the recorded engines."""

    def __init__(self, name: str, path: Path) -> None:
        settings: dict[str, Any] = workloads.WORKLOADS[name].engine_args
        config = EngineConfig.from_args(model="smollm2-135m", trace=str(path), **settings)
        resolved = config.resolve(shape_architecture("smollm2-135m"), "cpu")
        self.core = EngineCore(resolved, AnsweringExecutor(recorded(name, "folovllm")))
        self.answers: dict[str, list[int]] = {}

    def add(self, arrival: Any, prompt: list[int]) -> None:
        params = SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True)
        self.core.add_request(Request(arrival.request_id, prompt, params, priority=arrival.priority))
        self.answers[arrival.request_id] = []

    def step(self) -> dict[str, list[int]]:
        finished = {}
        for output in self.core.step():
            self.answers[output.request_id] += output.new_token_ids
            if output.finished:
                finished[output.request_id] = self.answers[output.request_id]
        return finished

    def close(self) -> None:
        self.core.shutdown()


@pytest.mark.parametrize("name", NAMES)
def test_our_recording_is_what_the_scheduler_does_today(name: str, tmp_path: Path) -> None:
    """Given the recorded answers, the scheduler and the KV cache make the recorded decisions. If this fails after a
    change that is meant, record again: python scripts/dev/record_vllm.py.
    """
    path = tmp_path / f"{name}.jsonl"
    workloads.run(Core(name, path), workloads.WORKLOADS[name])
    assert str(diff(recorded(name, "folovllm"), read_trace(path))) == "None"
