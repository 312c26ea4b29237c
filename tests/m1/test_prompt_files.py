"""Files with prompts: where their lines end, what a JSONL line may hold, and that a bad line is refused by number."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm import LLM, SamplingParams
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands.generate import read_prompts
from folovllm.quantize.text import read_text
from folovllm.text_files import BOM, split_lines
from folovllm.trace.record import read_trace

pytestmark = pytest.mark.m1

NO_LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"  # what str.splitlines or Python's text mode would split at


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", BOM.encode()])
@pytest.mark.parametrize("last", ["", "end"])
def test_lines_end_at_newlines_only(end: str, mark: bytes, last: str, tmp_path: Path) -> None:
    """hegeldev/hegel-core pull 25, huggingface/datasets issue 3804."""
    lines = ["a b", *(f"one{character}still one" for character in NO_LINE_ENDS), "  indented", "x"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(mark + end.join(lines).encode() + (end.encode() if last else b""))
    assert read_prompts([], str(file)) == lines


def test_blank_lines_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\r\na\n \n\n\t\nb\n\n")
    assert read_prompts(["first"], str(file)) == ["first", "a", "b"]


@pytest.mark.parametrize(
    ("text", "lines"), [("", []), ("\n", [""]), ("a", ["a"]), ("a\n\nb", ["a", "", "b"]), ("a\r\r\n", ["a\r"])]
)
def test_split_lines(text: str, lines: list[str]) -> None:
    assert split_lines(text) == lines


def test_stdin_is_split_like_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    data = BOM.encode() + "one\u2028\rone\r\ntwo\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_prompts([], "-") == ["one\u2028\rone", "two"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_prompts(["-"], None) == ["one\u2028\rone\r\ntwo"]
    monkeypatch.setattr("sys.stdin", io.StringIO(data.decode()))  # as notebooks and tests replace it
    assert read_prompts([], "-") == ["one\u2028\rone", "two"]


# --- JSONL --------------------------------------------------------------------------------------------------------


def jsonl(folder: Path, *records: Any, name: str = "prompts.jsonl") -> str:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (folder / name).write_bytes(BOM.encode() + "\r\n".join(lines).encode())
    return str(folder / name)


CHAT = {"messages": [{"role": "user", "content": "Hi\u2028there"}]}


def test_a_jsonl_file_holds_texts_ids_and_conversations(tmp_path: Path) -> None:
    records = [{"prompt": "a\nb\u2028"}, "", {"prompt_token_ids": [1, 2]}, CHAT, CHAT | {"tools": [{"name": "f"}]}]
    expected = ["a\nb\u2028", {"prompt_token_ids": [1, 2]}, CHAT, CHAT | {"tools": [{"name": "f"}]}]
    assert read_prompts([], jsonl(tmp_path, *records)) == expected
    assert read_prompts([], jsonl(tmp_path, *records, name="PROMPTS.JSONL")) == expected


BAD_LINES: list[tuple[Any, str]] = [
    ("{", "not valid JSON"),
    ("plain text", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('"text"', "must be one of"),
    ("[1, 2]", "must be one of"),
    ("5", "must be one of"),
    ({"text": "a"}, r"must be one of \{'prompt'"),
    ({"prompt": "a", "messages": []}, "must be one of"),
    ({"prompt": ""}, "'prompt' must be a text that is not empty"),
    ({"prompt": ["a"]}, "'prompt' must be a text"),
    ({"prompt": None}, "'prompt' must be a text"),
    ({"prompt_token_ids": []}, "'prompt_token_ids' must be a list of integers"),
    ({"prompt_token_ids": [1.5]}, "'prompt_token_ids' must be a list of integers"),
    ({"prompt_token_ids": [True]}, "'prompt_token_ids' must be a list of integers"),
    ({"messages": []}, "messages must be a non-empty list"),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] needs a 'content'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content\[0\] is of type"),
    ({"prompt": "a", "max_tokens": 5}, "'max_tokens' cannot be set for one prompt"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_refused_by_its_number(line: Any, message: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"prompt": "a"}, "", line, {"prompt": "b"})
    with pytest.raises(ValueError, match=rf"prompts.jsonl, line 3: .*{message}"):
        read_prompts([], file)


def test_keys_without_meaning_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert read_prompts([], jsonl(tmp_path, {"prompt": "a", "id": 7})) == ["a"]
    assert "line 1: not used: id" in capsys.readouterr().err


def test_the_command_runs_a_jsonl_file(tiny_model_dir: Any, tmp_path: Path) -> None:
    folder = str(tiny_model_dir("llama"))
    llm, params = LLM(folder), SamplingParams(temperature=0, max_tokens=5)
    chat = [{"role": "user", "content": "the then"}]
    file = jsonl(tmp_path, {"prompt": "in her"}, {"prompt_token_ids": [5, 6, 7]}, {"messages": chat})
    common = ["generate", "-m", folder, "--max-tokens", "5", "--prompts-file"]
    result = CliRunner().invoke(app, [*common, file, "--json"])
    assert result.exit_code == 0, result.output
    expected = [*llm.generate(["in her", [5, 6, 7]], params, use_tqdm=False), *llm.chat(chat, params, use_tqdm=False)]
    texts = [json.loads(line)["outputs"][0]["text"] for line in split_lines(result.stdout)]
    assert texts == [output.outputs[0].text for output in expected]
    assert "[2/3] [5, 6, 7]" in CliRunner().invoke(app, [*common, file]).stdout
    alone = jsonl(tmp_path, {"messages": chat}, name="one.jsonl")
    assert CliRunner().invoke(app, [*common, alone]).stdout == expected[2].outputs[0].text + "\n"


def test_a_conversation_that_the_template_refuses_stops_all(tiny_model_dir: Any, tmp_path: Path) -> None:
    """It is found before anything runs, so no answer is printed."""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    lost = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]}
    file = jsonl(tmp_path, {"prompt": "in her"}, lost)
    result = CliRunner().invoke(app, ["generate", "-m", str(tiny_model_dir("llama")), "--prompts-file", file, "--json"])
    assert result.exit_code != 0 and result.stdout == ""
    assert "prompt 1: the chat template renders no part of messages[1].tool_calls[0]" in result.stderr


# --- other files of users -----------------------------------------------------------------------------------------


def test_piped_messages_of_chat_end_at_newlines_only(tiny_model_dir: Any) -> None:
    """Each line is one message to the model."""
    piped = BOM.encode() + "hello\u2028 there\rand\x85 then\r\n".encode()
    result = CliRunner().invoke(app, ["chat", "-m", str(tiny_model_dir("llama")), "--max-tokens", "3"], input=piped)
    assert result.exit_code == 0 and result.stderr.count(" tokens, ") == 1


def test_calibration_text_loses_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(BOM.encode() + "a\u2028b\n".encode())
    assert read_text(str(tmp_path / "text.txt"), "calibration") == "a\u2028b\n"


def test_a_trace_with_a_line_separator_in_a_request_id_is_read(tmp_path: Path) -> None:
    header = {"type": "header", "v": 1, "config": {"name": "a\u2028b"}}
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(header, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_trace(path).config == {"name": "a\u2028b"}
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not a trace"):
        read_trace(path)
