"""The command line takes what the user leaves out from the model's generation_config.json, as vLLM's server does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from folovllm import LLM, SamplingParams
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands.options import parse_value

pytestmark = pytest.mark.m1

PROMPT = "the then"


@pytest.fixture
def folder(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    values = {"temperature": 0.9, "top_k": 1, "repetition_penalty": 1.4, "max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def run(*args: str, **kwargs: str) -> str:
    result = CliRunner().invoke(app, list(args), **kwargs)
    assert result.exit_code == 0, result.output
    return result.stdout


def text_of(folder: Path, **params: float) -> str:
    return LLM(str(folder)).generate(PROMPT, SamplingParams(**params), use_tqdm=False)[0].outputs[0].text + "\n"


def test_options_that_are_not_given_are_the_models(folder: Path) -> None:
    wanted = text_of(folder, temperature=0.9, top_k=1, repetition_penalty=1.4, max_tokens=7)
    assert run("generate", PROMPT, "-m", str(folder)) == wanted


def test_an_option_that_is_given_wins(folder: Path) -> None:
    wanted = text_of(folder, temperature=0.9, top_k=1, max_tokens=4)
    assert run("generate", PROMPT, "-m", str(folder), "--repetition-penalty", "1", "--max-tokens", "4") == wanted


def test_the_file_can_be_left_out(folder: Path) -> None:
    args = ["generate", PROMPT, "-m", str(folder), "--engine-arg", "generation_config=vllm", "--max-tokens", "5"]
    assert run(*args) == text_of(folder, temperature=0.0, max_tokens=5)


def test_a_chat_takes_them_too(folder: Path) -> None:
    params = SamplingParams(temperature=0.9, top_k=1, repetition_penalty=1.4, max_tokens=7, top_p=0.95)
    messages = [{"role": "user", "content": "hello"}]
    wanted = LLM(str(folder)).chat(messages, params, use_tqdm=False)[0].outputs[0].text
    assert run("chat", "-m", str(folder), input="hello\n") == wanted + "\n"


def test_engine_arguments_that_are_dicts_are_written_as_json(folder: Path) -> None:
    override = 'override_generation_config={"temperature": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 3}'
    assert run("generate", PROMPT, "-m", str(folder), "--engine-arg", override) == text_of(
        folder, temperature=0.0, max_tokens=3
    )
    assert parse_value('["a", 1]') == ["a", 1]
    with pytest.raises(ValueError, match="looks like JSON and is none"):
        parse_value("{rope_theta: 1}")
