"""`folovllm generate` on a tiny model: what it prints is what LLM gives."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from folovllm import LLM, CompletionOutput, RequestOutput, SamplingParams
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands import generate as command

pytestmark = pytest.mark.m1

PROMPTS = ["the then", "in her", "over there"]


@pytest.fixture(scope="module")
def folder(tiny_model_dir):
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def expected(folder):
    outputs = LLM(folder).generate(PROMPTS, SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def run(folder, *args, **kwargs):
    result = CliRunner().invoke(app, ["generate", "-m", folder, "--max-tokens", "9", *args], **kwargs)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_one_prompt_prints_its_completion_alone(folder, expected):
    assert run(folder, PROMPTS[0]) == expected[0].text + "\n"


def test_several_prompts_come_in_order_under_their_headings(folder, expected):
    wanted = "".join(f"[{i}/3] {p}\n{e.text}\n\n" for i, (p, e) in enumerate(zip(PROMPTS, expected, strict=True), 1))
    assert run(folder, *PROMPTS) == wanted


def test_prompts_from_stdin_and_from_a_file(folder, expected, tmp_path):
    assert run(folder, "-", input=PROMPTS[1] + "\n") == expected[1].text + "\n"
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPTS[1]}\n\n{PROMPTS[2]}\n")
    lines = run(folder, PROMPTS[0], "--prompts-file", str(file), "--json").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == PROMPTS
    piped = run(folder, "--prompts-file", "-", "--json", input="\n".join(PROMPTS)).splitlines()
    assert [json.loads(line)["outputs"][0]["text"] for line in piped] == [e.text for e in expected]


def test_json_has_every_field(folder, expected):
    record = json.loads(run(folder, PROMPTS[0], "--json", "--logprobs", "2"))
    assert list(record) == [f.name for f in dataclasses.fields(RequestOutput)]
    completion = record["outputs"][0]
    assert list(completion) == [f.name for f in dataclasses.fields(CompletionOutput)]
    assert completion["token_ids"] == expected[0].token_ids and record["finished"] is True
    assert [next(iter(position)) for position in completion["logprobs"]] == [str(t) for t in expected[0].token_ids]
    assert record["metrics"]["num_generation_tokens"] == len(expected[0].token_ids)


def test_json_stays_valid_where_a_logprob_is_minus_infinity():
    from folovllm.entrypoints.commands.generate import to_json
    from folovllm.outputs import Logprob

    completion = CompletionOutput(0, "é", [1], logprobs=[{1: Logprob(float("-inf"))}])
    line = to_json(RequestOutput("r", "p", [1], [completion], finished=True))
    assert json.loads(line)["outputs"][0]["logprobs"][0]["1"]["logprob"] is None and "é" in line


def test_logprobs_are_printed_a_line_per_token(folder, expected):
    lines = run(folder, PROMPTS[0], "--logprobs", "2")[len(expected[0].text) + 1 :].splitlines()
    assert len(lines) == len(expected[0].token_ids)
    assert all(line.count(" | ") in (1, 2) for line in lines)  # the token taken is among the 2, or is a third
    assert "[1/2]" in run(folder, *PROMPTS[:2], "--logprobs", "1")


def test_options_reach_the_engine(folder):
    hot = ["--temperature", "1.5", "--json", PROMPTS[0]]
    texts = {run(folder, *hot, "--sampling-seed", seed).split('"metrics"')[0] for seed in ("1", "1", "2")}
    assert len(texts) == 2
    cut = json.loads(
        run(folder, PROMPTS[0], "--json", "--preset", "m1", "--max-model-len", "12", "--engine-arg", "seed=3")
    )
    assert len(cut["prompt_token_ids"]) + len(cut["outputs"][0]["token_ids"]) == 12


def test_stop_text_ends_the_answer(folder, expected):
    stop = expected[0].text[2:4]
    text = run(folder, PROMPTS[0], "--stop", stop)
    assert text == expected[0].text.partition(stop)[0] + "\n"


def test_a_prompt_that_does_not_fit_is_an_error_line(folder):
    result = CliRunner().invoke(app, ["generate", "-m", folder, "x" * 600])
    assert result.exit_code == 2 and result.stderr.startswith("error: prompt 0: the prompt (length 600) is longer")


@pytest.mark.parametrize(
    ("args", "note"),
    [
        ([], "(ended after 9 tokens; --max-tokens sets the limit)"),
        (["--max-tokens", "99", "--max-model-len", "16"], "tokens; --max-model-len sets the limit)"),
        (["--stop"], ""),
    ],
)
def test_on_a_terminal_it_says_that_a_limit_ended_the_answer(folder, expected, monkeypatch, args, note):
    """An answer that stops in the middle of a sentence looks like a fault; a pipe gets the answer alone."""
    args = [*args, expected[0].text[2]] if args == ["--stop"] else args
    for terminal in (True, False):
        monkeypatch.setattr(command.sys, "stderr", Screen(terminal))
        with pytest.raises(SystemExit):
            typer.main.get_command(app)(["generate", "-m", folder, "--max-tokens", "9", PROMPTS[0], *args])
        shown = command.sys.stderr.getvalue()
        assert note in shown if terminal and note else not shown


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def test_a_closed_pipe_ends_it_without_a_traceback(folder):
    command = f"{sys.executable} -m folovllm generate -m {folder} hello --max-tokens 400 | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True)
    assert len(done.stdout) == 5 and b"Traceback" not in done.stderr
