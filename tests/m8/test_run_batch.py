"""`folovllm run-batch`: the format, every line answered, and what is kept when something goes wrong."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from folovllm.engine.async_llm import AsyncLLM
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.openai.app import build_app
from folovllm.entrypoints.openai.batch import Summary, answer_all, read_batch
from folovllm.entrypoints.openai.senders import post
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.state import make_state
from folovllm.entrypoints.openai_client import Answer, ServerError
from folovllm.executor.fake import FakeExecutor
from tests.m1.tiny_tokenizers import byte_level
from tests.m8.openai_double import running_double
from tests.m8.server_process import CHAT_TEMPLATE, running_server, slow_executor
from tests.m8.serving_helpers import (
    VOCAB_SIZE,
    assert_all_free,
    eventually,
    make_async_llm,
    oracle,
    run_async,
    serving_config,
    wait_until,
)

pytestmark = pytest.mark.m8

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def request(custom_id="a", url="/v1/completions", method="POST", body=None, **more):
    body = {"prompt": f"prompt of {custom_id}", "max_tokens": 4} if body is None else body
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body} | more)


def run(lines, send, num_at_once=4):
    written, summary = [], Summary(0)
    items = read_batch(lines)
    asyncio.run(answer_all(items, send, lambda line: written.append(json.loads(line)), num_at_once, summary))
    assert summary.num_answered == len(written) == len(items)
    assert summary.num_failed == sum(answer["error"] is not None for answer in written)
    return written


async def echo(url, body):
    """A server that answers with what it got."""
    return Answer(200, {"url": url, "got": body}, {"X-Request-Id": "req-1"})


# ---- the format


def test_an_answer_has_vllms_fields():
    [answer] = run([request("a", body={"prompt": "hi"})], echo)
    assert answer.pop("id").startswith("batch-")
    assert answer == {
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "req-1",
            "body": {"url": "/v1/completions", "got": {"prompt": "hi"}},
        },
        "error": None,
    }


@pytest.mark.parametrize(
    "line, custom_id, wanted",
    [
        ("{", None, "no JSON"),
        ("[" * 100_000, None, "no JSON"),
        ("5", None, "no JSON object"),
        ("{}", None, "custom_id"),
        (request(5), None, "custom_id must be a string"),
        (request("x", method="GET"), "x", 'method must be "POST"'),
        (request("x", url="/v1/embeddings"), "x", "/v1/chat/completions"),
        (request("x", url=["/v1/completions"]), "x", "url must be"),
        (request("x", body=[1]), "x", "body must be a JSON object, got list"),
        (request("x", body={"prompt": "a", "stream": True}), "x", "not streamed"),
    ],
)
def test_a_bad_line_is_answered_and_stops_no_other(line, custom_id, wanted):
    answers = run([request("before"), line, request("after")], echo)
    assert {a["custom_id"] for a in answers if a["error"] is None} == {"before", "after"}
    [bad] = [a for a in answers if a["error"] is not None]
    assert bad["custom_id"] == custom_id and bad["response"]["status_code"] == 400
    assert bad["error"]["message"].startswith("line 2: ") and wanted in bad["error"]["message"]
    assert bad["response"]["body"] == {"error": bad["error"]}


def test_a_custom_id_that_is_used_twice_is_reported():
    answers = run([request("a"), request("b"), request("a")], echo, num_at_once=1)
    assert [a["custom_id"] for a in answers] == ["a", "b", "a"]
    assert [a["error"] is None for a in answers] == [True, True, False]
    assert "line 1" in answers[2]["error"]["message"]


def test_blank_lines_are_skipped_and_numbers_stay_those_of_the_file():
    [good, bad] = run([request("a"), "", "  ", "{"], echo)
    assert good["error"] is None and bad["error"]["message"].startswith("line 4:")


@pytest.mark.parametrize("custom_id", ["\ud800", "a\u2028b\nc", "你好"])
def test_every_answer_is_one_line_that_can_be_written(custom_id):
    lines = []
    asyncio.run(answer_all(read_batch([request(custom_id)]), echo, lines.append, 1, Summary(1)))
    assert json.loads(lines[0].encode().decode())["custom_id"] == custom_id and "\n" not in lines[0]


# ---- what a server may do


def test_an_error_of_the_server_is_the_error_of_the_line():
    async def send(url, body):
        return Answer(404, {"error": {"message": "no such model", "type": "not_found_error"}}, {})

    [answer] = run([request()], send)
    assert answer["response"]["status_code"] == 404 and answer["error"]["message"] == "no such model"

    async def other(url, body):
        return Answer(502, "<html>Bad Gateway</html>", {})

    [answer] = run([request()], other)
    assert answer["error"]["message"] == "<html>Bad Gateway</html>" and answer["error"]["code"] == 502


def test_a_request_that_raises_fails_alone(caplog):
    async def send(url, body):
        if "b" in body["prompt"]:
            raise ServerError("the connection broke")
        if "c" in body["prompt"]:
            raise RuntimeError("a fault with a secret path")
        return await echo(url, body)

    answers = {a["custom_id"]: a for a in run([request(c, body={"prompt": c}) for c in "abcd"], send)}
    assert answers["a"]["error"] is None and answers["d"]["error"] is None
    assert answers["b"]["error"]["message"] == "the connection broke"
    assert answers["c"]["response"]["status_code"] == 500 and "secret" not in json.dumps(answers["c"])
    assert "a fault with a secret path" in caplog.text


def test_a_busy_server_is_asked_again():
    tries = []

    async def send(url, body):
        tries.append(body)
        return await echo(url, body) if len(tries) > 2 else Answer(429, {}, {"Retry-After": "0"})

    [answer] = run([request()], send)
    assert answer["error"] is None and len(tries) == 3


def test_no_more_requests_are_open_than_allowed():
    now, most = 0, 0

    async def send(url, body):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return await echo(url, body)

    run([request(str(i)) for i in range(50)], send, num_at_once=7)
    assert most == 7


def test_an_output_that_cannot_be_written_ends_the_run_and_its_requests():
    open_requests = 0

    async def send(url, body):
        nonlocal open_requests
        open_requests += 1
        try:
            await asyncio.sleep(0 if body["prompt"] == "0" else 3600)
        finally:
            open_requests -= 1
        return await echo(url, body)

    def write(line):
        raise OSError(28, "No space left on device")

    items = read_batch([request(str(i), body={"prompt": str(i)}) for i in range(4)])
    with pytest.raises(OSError, match="No space"):
        run_async(lambda: answer_all(items, send, write, 4, Summary(4)))
    assert open_requests == 0


# ---- the command at a server


@pytest.fixture
def double():
    with running_double() as double:
        double.answer = lambda body: (200, {"model": body["model"], "got": body.get("prompt") or body.get("messages")})
        yield double


def invoke(*args, **more):
    return CliRunner().invoke(app, ["run-batch", *map(str, args)], **more)


def read(path):
    return {a["custom_id"]: a for a in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_a_file_at_a_server(double, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}], "model": "other"}
    source.write_text("\n".join([request("a"), request("b", "/v1/chat/completions", body=chat), "{"]), encoding="utf-8")
    result = invoke("-i", source, "-o", target, "--url", double.url, "--api-key", "k")
    assert result.exit_code == 0, result.output
    answers = read(target)
    assert answers["a"]["response"]["body"] == {"model": "tiny", "got": "prompt of a"}
    assert answers["b"]["response"]["body"] == {"model": "other", "got": chat["messages"]}
    assert answers[None]["error"]["message"].startswith("line 3: ")
    assert "3 of 3 answered, 1 of them with an error" in result.stderr
    assert all(headers["Authorization"] == "Bearer k" for _, _, headers in double.calls)


def test_from_stdin_to_stdout(double):
    result = invoke("-i", "-", "-o", "-", "--url", double.url, input="\ufeff" + request("a") + "\r\n")
    assert result.exit_code == 0 and json.loads(result.stdout)["custom_id"] == "a"


def test_the_input_is_never_overwritten(double, tmp_path):
    source, link = tmp_path / "in.jsonl", tmp_path / "link.jsonl"
    source.write_text(request())
    link.symlink_to(source)
    for target in (source, tmp_path / "." / "in.jsonl", link):
        result = invoke("-i", source, "-o", target, "--url", double.url)
        assert result.exit_code == 2 and "is the input file" in result.stderr
        assert source.read_text() == request()


@pytest.mark.parametrize("text, wanted", [(None, "cannot read"), ("", "holds no requests"), ("\n \n", "no requests")])
def test_an_input_without_requests_is_refused(tmp_path, text, wanted):
    source = tmp_path / "in.jsonl"
    if text is not None:
        source.write_text(text)
    result = invoke("-i", source, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and wanted in result.stderr and not (tmp_path / "out.jsonl").exists()


def test_an_input_that_is_no_text_is_refused(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"custom_id": "\xff"}')
    result = invoke("-i", source, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 2 and "not UTF-8" in result.stderr


@pytest.mark.parametrize(
    "args, wanted",
    [
        (("--url", "http://127.0.0.1:1", "--dtype", "float32"), "--dtype"),
        (("--api-key", "k"), "--url"),
        (("--port", "9000"), "--port is for folovllm serve"),
        (("--max-concurrency", "0"), "--max-concurrency"),
        (("--max-num-seqs", "x"), "--max-num-seqs"),
        (("--nosuch", "1"), "--nosuch"),
        (("--url", "http://127.0.0.1:1"), "folovllm serve"),
    ],
)
def test_a_wrong_option_is_answered_before_anything_starts(tmp_path, args, wanted):
    source = tmp_path / "in.jsonl"
    source.write_text(request())
    result = invoke("-i", source, "-o", tmp_path / "out.jsonl", *args)
    assert result.exit_code == 2 and wanted in result.stderr


def test_an_output_that_cannot_be_opened_is_refused(double, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(request())
    result = invoke("-i", source, "-o", tmp_path / "nosuch" / "out.jsonl", "--url", double.url)
    assert result.exit_code == 2 and "cannot write" in result.stderr and not double.calls


def test_the_answers_of_an_earlier_run_go_when_the_new_ones_can_come(double, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(request())
    target.write_text("the answers of yesterday\n" * 100)
    assert invoke("-i", source, "-o", target, "--url", "http://127.0.0.1:1").exit_code == 2
    assert target.read_text().startswith("the answers of yesterday")
    assert invoke("-i", source, "-o", target, "--url", double.url).exit_code == 0
    assert list(read(target)) == ["a"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_keeps_what_is_done(double, tmp_path, number):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(request(str(i)) for i in range(100)))
    good = double.answer

    def answer(body):
        if len(double.calls) < 40:
            return good(body)
        double.hang = True
        return ["data: 1\n\n"]  # an answer that does not end

    double.answer = answer
    command = [sys.executable, "-m", "folovllm", "run-batch", "-i", source, "-o", target, "--url", double.url]
    process = subprocess.Popen(
        [*command, "--max-concurrency", "1"], cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        wait_until(lambda: double.hang)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    answers = read(target)
    assert len(answers) > 30 and set(answers) == {str(i) for i in range(len(answers))}
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert (f"{len(answers)} of 100 answered" in errors.decode()) == (number == signal.SIGINT)


# ---- the engine in this process


def without_ids(answer):
    """What two answers to the same request have in common."""
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def in_process(items, num_at_once=64, **engine_args):
    """Answers through the application, as the command does. Returns the answers, and the engine after it."""

    async def main():
        async with make_async_llm(**engine_args) as engine:
            options = ServerOptions(max_queue=10**9)
            application = build_app(make_state(engine, options, CHAT_TEMPLATE))
            written = []
            await answer_all(items, partial(post, application), written.append, num_at_once, Summary(len(items)))
            await assert_all_free(engine)
            return {a["custom_id"]: a for a in map(json.loads, written)}

    return run_async(main)


def test_the_answers_are_those_of_the_server():
    chat = {"messages": [{"role": "user", "content": "\u4f60"}], "max_tokens": 5}
    bodies = {
        "text": ("/v1/completions", {"prompt": "\u4f60", "max_tokens": 6, "temperature": 0}),
        "ids": ("/v1/completions", {"prompt": [[1, 2, 3], [4]], "n": 2, "seed": 3, "max_tokens": 4, "echo": True}),
        "chat": ("/v1/chat/completions", chat | {"seed": 1}),
        "bad field": ("/v1/completions", {"prompt": "a", "top_p": 7}),
        "bad type": ("/v1/chat/completions", {"messages": 5}),
        "no model": ("/v1/completions", {"prompt": "a", "model": "nosuch"}),
        "too long": ("/v1/completions", {"prompt": [1] * 300}),
        "not a number": ("/v1/completions", {"prompt": [1], "temperature": float("nan")}),
    }
    answers = in_process(read_batch([request(name, url, body=body) for name, (url, body) in bodies.items()]))
    assert set(answers) == set(bodies)
    with running_server() as server:
        for name, (url, body) in bodies.items():
            theirs, ours = server.post(url, body), answers[name]
            assert ours["response"]["status_code"] == theirs.status, name
            assert without_ids(ours["response"]["body"]) == without_ids(theirs.json), name
            assert ours["response"]["request_id"].startswith("req-")
            assert ours["error"] == (None if theirs.status == 200 else theirs.json["error"])
    assert [answers[name]["error"] is None for name in bodies] == [True] * 3 + [False] * 5


def test_many_more_requests_than_run_at_once():
    prompts = {str(i): [1 + i % 300, 2 + i % 7, 3] for i in range(300)}
    lines = [
        request(
            name, body={"prompt": ids, "max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        )
        for name, ids in prompts.items()
    ]
    answers = in_process(read_batch(lines), max_num_seqs=4)
    assert len(answers) == 300
    for name, ids in prompts.items():
        assert answers[name]["response"]["body"]["choices"][0]["token_ids"] == oracle(ids, 5)


def test_a_batch_that_is_cancelled_leaves_nothing_in_the_engine():
    async def main():
        async with make_async_llm(slow_executor, max_model_len=8192, num_kv_blocks=2000) as engine:
            application = build_app(make_state(engine, ServerOptions()))
            items = read_batch(
                [request(str(i), body={"prompt": [i + 1], "max_tokens": 8000, "ignore_eos": True}) for i in range(9)]
            )
            run = asyncio.create_task(answer_all(items, partial(post, application), print, 9, Summary(9)))
            await eventually(lambda: engine.stats.num_running == 9)
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            await assert_all_free(engine)

    run_async(main)


class Mortal(FakeExecutor):
    """Ends its process, if it had one, in the step that holds token 7."""

    def execute(self, scheduler_output):
        if any(7 in new.prompt_token_ids for new in scheduler_output.scheduled_new_reqs):
            raise SystemExit("out of luck")
        return super().execute(scheduler_output)


def test_if_the_engine_dies_the_rest_is_answered_with_errors_and_the_status_is_1(tmp_path, monkeypatch):
    async def start(**engine_args):
        make = lambda config: Mortal(vocab_size=VOCAB_SIZE)  # noqa: E731
        return await AsyncLLM.start(
            serving_config(max_num_seqs=1), Path("unused"), byte_level(), in_process=False, executor_factory=make
        )

    monkeypatch.setattr("folovllm.entrypoints.start.start_async_llm", start)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = {"a": [1], "b": [2], "c": [7], "d": [3], "e": [4]}
    source.write_text("\n".join(request(name, body={"prompt": ids}) for name, ids in prompts.items()))
    result = invoke("-i", source, "-o", target, "--max-concurrency", "1")
    assert result.exit_code == 1 and "the engine has died: SystemExit: out of luck" in result.stderr
    assert "5 of 5 answered, 3 of them with an error" in result.stderr
    assert [read(target)[name]["response"]["status_code"] for name in prompts] == [200, 200, 500, 500, 500]


@pytest.mark.weights
def test_the_command_with_the_real_model(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    greedy = {"max_tokens": 4, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "Hi"}], "model": "mine"} | greedy
    lines = [
        request("a", body={"prompt": "The capital of France is"} | greedy),
        request("b", "/v1/chat/completions", body=chat),
    ]
    source.write_text("\n".join([*lines, "{"]))
    command = [sys.executable, "-m", "folovllm", "run-batch", "-i", source, "-o", target]
    options = ["--max-num-seqs", "2", "--max-model-len", "256", "--served-model-name", "mine"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 answered, 1 of them with an error" in done.stderr and "Traceback" not in done.stderr
    answers = read(target)
    assert answers["a"]["response"]["body"]["choices"][0]["text"].startswith(" Paris")
    assert answers["b"]["response"]["body"]["choices"][0]["message"]["content"] and answers["b"]["error"] is None
    assert answers[None]["error"]["message"].startswith("line 3")
