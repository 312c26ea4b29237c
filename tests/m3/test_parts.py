"""Parts: a learner's class takes the place of the default one, and a wrong one is refused with the reason."""

import importlib

import pytest
from typer.testing import CliRunner

from folovllm import LLM, SamplingParams
from folovllm.entrypoints.cli import app
from folovllm.parts import PARTS, load_part
from folovllm.trace.record import read_trace
from tests.core_helpers import drive, make_core, make_request

pytestmark = pytest.mark.m3

LIFO_QUEUE = """
from folovllm.core.sched.request_queue import FCFSRequestQueue

class Lifo(FCFSRequestQueue):
    def pop_request(self):
        return self._requests.pop()
    def peek_request(self):
        return self._requests[-1]

class Half:
    def add_request(self, request): ...

def not_a_class(): ...
"""


@pytest.fixture
def work_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(LIFO_QUEUE)
    return path


@pytest.mark.parametrize("part", PARTS.values(), ids=lambda part: part.name)
def test_our_own_class_is_every_part(part):
    module, _, name = part.default.partition(":")
    if module.endswith(".py"):
        pytest.skip("replaced with --part or --mine")
    assert load_part(part.name) is getattr(importlib.import_module(module), name)
    assert not [method for method in part.methods if not callable(getattr(load_part(part.name), method, None))]


def test_there_are_at_most_20_parts():
    assert len(PARTS) <= 20


def test_a_learners_queue_decides_who_goes_first(work_file):
    core = make_core(parts={"core.request_queue.fcfs": f"{work_file}:Lifo"}, max_num_seqs=1)
    for request_id in "abc":
        core.add_request(make_request(request_id, prompt=3, max_tokens=1))
    assert list(drive(core)) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}:Half", "lacks the methods prepend_request, peek_request, pop_request, remove_requests"),
        ("{}:Missing", "has no class 'Missing'"),
        ("{}:not_a_class", "is not a class"),
        ("nowhere.py:Lifo", "no file nowhere.py"),
        ("no_such_module:Lifo", "cannot import 'no_such_module'"),
        ("Lifo", "does not name a class"),
    ],
)
def test_a_wrong_replacement_is_refused(work_file, spec, message):
    with pytest.raises(ValueError, match=message):
        load_part("core.request_queue.fcfs", {"core.request_queue.fcfs": spec.format(work_file)})


def test_a_syntax_error_names_the_line(tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(ValueError, match="line 2"):
        load_part("sample.sampler", {"sample.sampler": f"{tmp_path}/broken.py:S"})


def test_an_unknown_part_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown part 'core.schduler'; there are core.scheduler"):
        load_part("core.scheduler", {"core.schduler": "x.py:Y"})


def test_the_command_line_replaces_parts_too(work_file, tiny_model_dir, tmp_path):
    runner, trace = CliRunner(), tmp_path / "run.jsonl"
    model = str(tiny_model_dir("llama"))
    arguments = ["generate", "a b", "b c", "--max-tokens", "4", "--model", model, "--trace", str(trace)]
    result = runner.invoke(app, [*arguments, "--part", f"core.request_queue.fcfs={work_file}:Lifo", "--preset", "m1"])
    assert result.exit_code == 0, result.output
    admitted = [entry["req"] for step in read_trace(trace).steps for entry in step["sched"] if entry["start"] == 0]
    assert admitted == sorted(admitted, reverse=True) and len(admitted) == 2, "the last to come is served first"
    assert runner.invoke(app, ["trace", "show", str(trace), "--step", "0"]).exit_code == 0
    bad = runner.invoke(app, [*arguments, "--part", "core.scheduler"])
    assert bad.exit_code == 2 and "--part takes NAME=FILE.py:CLASS" in bad.output


OWN_PARTS = """
from folovllm.core.kv_cache_utils import KVCacheBudget
from folovllm.engine.detokenizer import TextStream
from folovllm.request import Request
from folovllm.sample.sampler import Sampler

class Budget(KVCacheBudget):
    def num_blocks(self, config, available_bytes, bytes_per_block):
        return 7

class Numbers(TextStream):
    def step(self, token_id):
        return f"<{token_id}>"
    def flush(self):
        return "."

class Logged(Request):
    log = []
    def set_status(self, status):
        super().set_status(status)
        self.log.append(f"{self.request_id} {status.name}")

class OnlyTokenSeven(Sampler):
    @staticmethod
    def apply_top_p_(logits, top_p):
        logits[:] = float("-inf")
        logits[:, 7] = 0.0
"""


@pytest.fixture
def own_parts(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN_PARTS)
    return path


def test_a_learners_budget_decides_how_many_blocks_there_are(own_parts):
    core = make_core(parts={"core.kv_cache_budget": f"{own_parts}:Budget"}, num_kv_blocks=5)
    assert core.kv_cache_config.num_blocks == 7


def test_every_request_is_of_the_learners_class(own_parts, tiny_model_dir):
    llm = LLM(str(tiny_model_dir("llama")), parts={"core.request": f"{own_parts}:Logged"})
    params = SamplingParams(temperature=1.0, max_tokens=2, n=2, ignore_eos=True)
    llm.generate(["a b"], params, use_tqdm=False)
    moves = type(llm.llm_engine.process("r", "a b", params)).log
    assert sorted(move.split()[1] for move in moves) == ["FINISHED_LENGTH_CAPPED"] * 2 + ["RUNNING"] * 2, moves


def test_a_learners_text_stream_writes_the_text(own_parts, tiny_model_dir):
    llm = LLM(str(tiny_model_dir("llama")), parts={"engine.text_stream": f"{own_parts}:Numbers"})
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    (output,) = llm.generate(["a b"], params, use_tqdm=False)
    assert output.outputs[0].text == "".join(f"<{token_id}>" for token_id in output.outputs[0].token_ids) + "."


@pytest.mark.parametrize("backend", ["auto", "shortlist", "torch"])
def test_no_fast_sampler_passes_by_a_learners_step(own_parts, tiny_model_dir, backend):
    parts = {"sample.sampler": f"{own_parts}:OnlyTokenSeven"}
    llm = LLM(str(tiny_model_dir("llama")), parts=parts, sampler_backend=backend)
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate(["a b"], params, use_tqdm=False)
    assert output.outputs[0].token_ids == [7] * 4
    replacements = llm.llm_engine.engine_core.executor.worker.replacements
    said = [str(item) for item in replacements if item.switch == "sampler_backend"]
    why = "sampler_backend: OnlyTokenSeven: stays as it is (it has apply_top_p_ of its own)"
    assert said == ([] if backend == "torch" else [why])
