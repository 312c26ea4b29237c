"""`folovllm chat` on a tiny model: turns, commands, trimming, Ctrl-C."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from folovllm import LLM, SamplingParams
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands.chat import Conversation
from folovllm.entrypoints.commands.chat_models import LocalModel

pytestmark = pytest.mark.m1


@pytest.fixture(scope="module")
def folder(tiny_model_dir):
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder)


def answer_to(llm, messages, max_tokens=8):
    output = llm.chat(messages, SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)[0]
    return output.outputs[0].text


def chat(folder, lines, *args):
    result = CliRunner().invoke(
        app, ["chat", "-m", folder, "--temperature", "0", "--max-tokens", "8", *args], input="\n".join(lines) + "\n"
    )
    assert result.exit_code == 0, result.output
    return result


def message(role, content):
    return {"role": role, "content": content}


def test_a_second_turn_knows_the_first(folder, llm):
    first = answer_to(llm, [message("user", "hello")])
    second = answer_to(llm, [message("user", "hello"), message("assistant", first), message("user", "more")])
    assert second != answer_to(llm, [message("user", "more")])  # else the test shows nothing
    result = chat(folder, ["hello", "", "more"])
    assert result.stdout == f"{first}\n{second}\n"
    assert result.stderr.count("tok/s") == 2


def test_reset_forgets_and_system_instructs(folder, llm):
    first = answer_to(llm, [message("user", "hello")])
    told = answer_to(llm, [message("system", "be brief"), message("user", "hello")])
    assert told != first
    result = chat(folder, ["hello", "/reset", "/system be brief", "hello", "/reset", "/system", "hello"])
    assert result.stdout == f"{first}\n{told}\n{first}\n"
    assert chat(folder, ["hello"], "--system", "be brief").stdout == f"{told}\n"


def test_help_exit_and_unknown_commands(folder):
    result = chat(folder, ["/help", "/nosuch", "/exit", "hello"])
    assert result.stdout == "" and "/reset" in result.stderr and "unknown command /nosuch" in result.stderr


def test_a_question_that_does_not_fit_is_refused_and_the_talk_goes_on(folder, llm):
    first = answer_to(llm, [message("user", "hello")])
    second = answer_to(llm, [message("user", "hello"), message("assistant", first), message("user", "more")])
    result = chat(folder, ["hello", "x" * 600, "more"])
    assert result.stdout == f"{first}\n{second}\n"
    assert "error: prompt 0: the prompt (length" in result.stderr


def test_the_oldest_exchanges_are_forgotten_with_a_notice(llm, capsys):
    talk = Conversation(LocalModel(llm, SamplingParams(temperature=0, max_tokens=8)), system="be brief")
    for number in range(6):
        talk.ask(f"{number} " + "word " * 25)
    captured = capsys.readouterr()
    assert "no longer fits in 512 tokens: forgot the oldest" in captured.err
    assert captured.out.count("\n") >= 6 and len(talk.turns) < 12
    assert talk.turns[0]["role"] == "user" and talk.turns[-2]["content"].startswith("5 ")
    prompt = llm.chat_prompt([message("system", "be brief"), *talk.turns[:-1]])
    assert len(prompt["prompt_token_ids"]) + 8 <= 512


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(llm, capsys, monkeypatch):
    stream = llm.stream

    def interrupted(prompt, params):
        for number, output in enumerate(stream(prompt, params)):
            if number == 3:
                signal.raise_signal(signal.SIGINT)
            yield output

    monkeypatch.setattr(llm, "stream", interrupted)
    talk = Conversation(LocalModel(llm, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)))
    talk.ask("hello")
    captured = capsys.readouterr()
    assert "4 tokens" in captured.err and "stopped" in captured.err
    assert talk.turns[-1] == message("assistant", captured.out[:-1])
    assert not llm.llm_engine.has_unfinished_requests()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    talk.ask("again")
    assert len(talk.turns) == 4


class Terminal:
    """`folovllm` in a real pseudo-terminal."""

    def __init__(self, *args):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "folovllm", *args]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, close_fds=True, start_new_session=True
        )
        os.close(slave)
        self.text, self.read = "", 0

    def read_until(self, wanted, seconds=60.0):
        """Until `wanted` comes, behind what was wanted last; one read may bring several things."""
        deadline = time.monotonic() + seconds
        while (found := self.text.find(wanted, self.read)) < 0:
            assert time.monotonic() < deadline, f"no {wanted!r} in {self.text!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.text += os.read(self.master, 4096).decode(errors="replace")
        self.read = found + len(wanted)

    def type(self, text):
        os.write(self.master, text.encode())

    def ends(self, seconds=30.0):
        """The exit status. What is still printed is read, or the process could not end; never longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it goes on: {self.text!r}"
            with contextlib.suppress(OSError):  # the other side is closed
                if select.select([self.master], [], [], 0.2)[0]:
                    self.text += os.read(self.master, 4096).decode(errors="replace")
        return self.process.returncode


def test_in_a_terminal_ctrl_c_at_the_prompt_is_a_hint_and_ctrl_d_leaves(folder):
    terminal = Terminal("chat", "-m", folder, "--temperature", "0", "--max-tokens", "8")
    try:
        terminal.read_until("> ")
        terminal.type("hello\n")
        terminal.read_until("tok/s")
        terminal.read_until("> ")
        time.sleep(0.5)  # readline prints its prompt a moment before it listens to signals
        terminal.process.send_signal(signal.SIGINT)  # at the prompt: a hint, not the end
        terminal.read_until("Ctrl-D or /exit leaves")
        terminal.read_until("> ")
        time.sleep(0.5)  # before readline has the terminal again, the terminal itself would swallow the Ctrl-D
        terminal.type("\x04")
        assert terminal.ends() == 0
        assert "Traceback" not in terminal.text
    finally:
        terminal.process.kill()
