"""`folovllm chat --url`: the same conversation as with an engine in the process, against a server double."""

import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands.chat import Conversation
from folovllm.entrypoints.commands.chat_models import ServedModel
from tests.m8.openai_double import DONE, chunk, event, running_double, usage
from tests.m8.server_process import running_server, slow_executor
from tests.m8.serving_helpers import wait_until

pytestmark = pytest.mark.m8


@pytest.fixture
def double():
    with running_double() as double:
        double.answer = lambda body: [chunk("", None), chunk("Hel"), chunk("lo"), chunk("", "stop"), usage(5), DONE]
        yield double


def chat(url, lines, *args):
    return CliRunner().invoke(app, ["chat", "--url", url, *args], input="\n".join(lines) + "\n")


def bodies(double):
    return [body for path, body, _ in double.calls if path == "/v1/chat/completions"]


def message(role, content):
    return {"role": role, "content": content}


def test_turns_commands_and_speed(double):
    lines = ["hi", "more", "/system be brief", "/nosuch", "/reset", "again", "/exit", "never asked"]
    result = chat(double.url, lines)
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hello\n" * 3
    sent = [body["messages"] for body in bodies(double)]
    assert sent == [
        [message("user", "hi")],
        [message("user", "hi"), message("assistant", "Hello"), message("user", "more")],
        [message("system", "be brief"), message("user", "again")],
    ]
    assert result.stderr.count("5 tokens, ") == 3  # the server's count, not the number of chunks
    assert "forgotten" in result.stderr and "unknown command /nosuch" in result.stderr


def test_the_model_is_the_servers_first_one_unless_named(double):
    double.models = [{"id": "first"}, {"id": "second"}]
    chat(double.url, ["hi"])
    chat(double.url, ["hi"], "--model", "second")
    assert [body["model"] for body in bodies(double)] == ["first", "second"]
    result = chat(double.url, ["hi"], "--model", "third")
    assert result.exit_code == 2 and "it serves 'first', 'second'" in result.stderr


def test_only_given_sampling_options_are_sent(double):
    """The rest is the server's: its model has defaults of its own, which a value from here would replace."""
    chat(double.url, ["hi"])
    chat(double.url, ["hi"], "--temperature", "0", "--top-k", "5", "--sampling-seed", "7", "--stop", "x")
    plain, given = ({k: v for k, v in body.items() if k not in ("model", "messages")} for body in bodies(double))
    assert plain == {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 512}
    assert given == plain | {"temperature": 0.0, "top_k": 5, "seed": 7, "stop": ["x"]}


def test_the_key_is_sent(double):
    chat(double.url, ["hi"], "--api-key", "secret")
    assert double.calls and all(headers["Authorization"] == "Bearer secret" for _, _, headers in double.calls)


@pytest.mark.parametrize(
    "args",
    [("--dtype", "float32"), ("--mine",), ("--engine-arg", "block_size=32"), ("--preset", "m1"), ("--seed", "1")],
)
def test_options_of_a_local_engine_are_refused(double, args):
    result = chat(double.url, ["hi"], *args)
    assert result.exit_code == 2 and args[0] in result.stderr and "to that server" in result.stderr
    assert not double.calls


def test_a_key_without_a_url_is_refused():
    result = CliRunner().invoke(app, ["chat", "--api-key", "k"], input="hi\n")
    assert result.exit_code == 2 and "--url" in result.stderr


def test_without_a_server_the_command_ends_with_one_line():
    result = chat("http://127.0.0.1:1", ["hi"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "http://127.0.0.1:1" in result.stderr and "folovllm serve" in result.stderr


def test_a_failed_question_leaves_the_conversation_unchanged(double):
    good = double.answer
    answers = iter([good, lambda body: (400, {"error": {"message": "too long"}}), lambda body: [chunk("ha")], good])
    double.answer = lambda body: next(answers)(body)
    result = chat(double.url, ["one", "two", "three", "four"])
    assert result.exit_code == 0
    assert result.stdout == "Hello\nha\nHello\n"
    assert "too long" in result.stderr and "broke off" in result.stderr
    assert [m["content"] for m in bodies(double)[-1]["messages"]] == ["one", "Hello", "four"]


def test_an_error_in_mid_answer_is_shown(double):
    double.answer = lambda body: [chunk("a"), event(error={"message": "the engine has stopped"}), DONE]
    result = chat(double.url, ["hi"])
    assert result.stdout == "a\n" and "the engine has stopped" in result.stderr


def test_the_oldest_exchanges_are_forgotten_if_the_server_counts_tokens(double):
    result = chat(double.url, ["a" * 60, "b" * 60, "c" * 60], "--max-tokens", "50")
    assert result.exit_code == 0
    assert "no longer fits in 200 tokens: forgot the oldest 2 messages" in result.stderr
    assert [m["content"][0] for m in bodies(double)[-1]["messages"]] == ["b", "H", "c"]


def test_a_server_that_does_not_count_gets_the_whole_conversation(double):
    double.count = None
    result = chat(double.url, ["a" * 150, "b" * 150])
    assert result.exit_code == 0 and len(bodies(double)[-1]["messages"]) == 3


@pytest.mark.parametrize(
    "texts", [[chunk("some"), chunk(" text")], []], ids=["in mid-answer", "before the first token"]
)
def test_ctrl_c_stops_the_answer_and_closes_the_connection(double, capsys, texts):
    double.answer, double.hang = lambda body: texts, True
    model = ServedModel(double.url, None, None, {"max_tokens": 10})
    talk = Conversation(model)
    main = threading.main_thread().ident

    def interrupt():
        wait_until(lambda: bodies(double))
        time.sleep(0.2)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        talk.ask("hi")
        thread.join(10)
        captured = capsys.readouterr()
        assert "stopped" in captured.err and captured.out == ("some text\n" if texts else "\n")
        assert talk.turns[-1] == message("assistant", "some text" if texts else "")
        wait_until(lambda: double.num_left)
        assert double.num_left == 1  # the server sees a client that has left, and aborts its request
        double.hang = False
        double.answer = lambda body: [chunk("ok"), chunk("", "stop"), DONE]
        talk.ask("again")
        assert talk.turns[-1] == message("assistant", "ok")
    finally:
        model.close()


def test_a_pause_between_two_questions(capsys):
    """A server closes idle connections. While the user types, the client does not see it, so it must not reuse one."""
    with running_double(idle_timeout=0.1) as double:  # uvicorn's is 5 s
        double.answer = lambda body: [chunk("Hello"), chunk("", "stop"), DONE]
        model = ServedModel(double.url, None, None, {})
        try:
            talk = Conversation(model)
            talk.ask("hi")
            time.sleep(0.5)
            talk.ask("again")
        finally:
            model.close()
    assert capsys.readouterr().out == "Hello\nHello\n"


def test_ctrl_c_while_the_server_does_not_answer_at_all():
    """No traceback of the event loop, and the status that a shell expects."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(60)
        command = [sys.executable, "-m", "folovllm", "chat", "--url", f"127.0.0.1:{silent.getsockname()[1]}"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            connection, _ = silent.accept()
            connection.recv(1)  # the request has begun
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        connection.close()
    assert process.returncode == 130 and errors.strip() == b""


# ---- our own server


def test_a_conversation_with_our_server():
    with running_server(engine={"max_model_len": 256}, api_key=("secret",)) as server:
        url = f"http://127.0.0.1:{server.port}"
        refused = chat(url, ["hi"])
        assert refused.exit_code == 2 and "--api-key" in refused.stderr
        args = ("--api-key", "secret", "--temperature", "0", "--max-tokens", "6")
        result = chat(url, ["\u4f60", "\u597d"], *args)
        assert result.exit_code == 0, result.output
        messages = [message("user", "\u4f60")]
        for text in result.stdout.removesuffix("\n").split("\n"):
            body = {"messages": messages, "temperature": 0, "max_tokens": 6}
            answer = server.post("/v1/chat/completions", body, Authorization="Bearer secret").json
            assert answer["choices"][0]["message"]["content"] == text
            messages += [message("assistant", text), message("user", "\u597d")]
        assert result.stderr.count("6 tokens, ") == 2
        # The model's context is 256 tokens: the server counts, and the client forgets.
        result = chat(url, ["\u4f60" * 60] * 5, *args)
        assert "no longer fits in 256 tokens: forgot the oldest" in result.stderr and "error" not in result.stderr


def test_ctrl_c_aborts_the_request_at_our_server():
    engine = {"max_model_len": 8192, "num_kv_blocks": 1000, "executor_factory": slow_executor}
    with running_server(engine) as server:
        model = ServedModel(f"http://127.0.0.1:{server.port}", None, None, {"ignore_eos": True})
        try:
            pieces = model.stream([message("user", "\u4f60")])
            while not next(pieces).num_tokens:
                pass
            assert server.state.engine.num_unfinished == 1
            pieces.close()
            wait_until(lambda: server.state.engine.stats.kv_cache_usage == 0)
            assert server.state.engine.num_unfinished == 0
            assert server.state.metrics.observers[0].num_finished["abort"] == 1
        finally:
            model.close()
