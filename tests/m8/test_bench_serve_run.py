"""`folovllm bench serve` against a fake server on a real socket: the load, failures, files, exit status."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from folovllm.benchmarks.serve.command import main
from folovllm.benchmarks.serve.load import Target, run_load
from folovllm.entrypoints.cli import app

pytestmark = pytest.mark.m8

PATIENCE = 20.0  # seconds until a test that hangs fails
Answer = Callable[[int, dict], tuple[int, list[str]]]  # (number, body) -> (status, events of the stream)


class FakeServer:
    """Streams what `answer` says, and remembers every request."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.num_open = self.most_open = 0
        self.lock = threading.Lock()
        self.url = ""

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
        status, events = self.answer(number, body)
        with self.lock:
            self.num_open -= 1
        stream = "".join(f"data: {event}\n\n" for event in events) if status == 200 else events[0]
        reply(handler, status, stream)


def reply(handler: BaseHTTPRequestHandler, status: int, text: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


@contextmanager
def fake_server(answer: Answer) -> Iterator[FakeServer]:
    fake = FakeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            reply(self, 200, json.dumps({"data": [{"id": "the-model"}]}))

        def do_POST(self) -> None:
            fake.handle(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def completion(number: int, body: dict) -> tuple[int, list[str]]:
    """All the tokens that were asked for, in two chunks."""
    first, last = ({"choices": [{"text": "x", "finish_reason": reason}]} for reason in (None, "length"))
    usage = {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}}
    return 200, [*map(json.dumps, (first, last, usage)), "[DONE]"]


def load(fake: FakeServer, due: list[float], max_concurrency: int | None = None):
    bodies = [json.dumps({"prompt": [7], "max_tokens": 2, "number": i}).encode() for i in range(len(due))]
    return asyncio.run(run_load(Target(fake.url + "/v1/completions", timeout=PATIENCE), bodies, due, max_concurrency))


# --- the load


def test_arrivals_do_not_wait_for_answers():
    """No request is answered before all are there. A client that waited for an answer would wait forever."""
    all_there = threading.Barrier(4)

    def answer(number: int, body: dict) -> tuple[int, list[str]]:
        all_there.wait(PATIENCE)
        return completion(number, body)

    with fake_server(answer) as fake:
        run = load(fake, [0.0, 0.05, 0.1, 0.15])
    assert [seen.error for seen in run.exchanges] == [None] * 4
    assert [body["number"] for body in fake.bodies] == [0, 1, 2, 3]
    assert all(seen.due <= seen.ready <= seen.sent <= seen.chunks[0][0] <= seen.ended for seen in run.exchanges)
    assert run.seconds >= 0.15 and run.cpu_seconds > 0


def test_no_more_requests_than_max_concurrency_are_out_at_once():
    def answer(number: int, body: dict) -> tuple[int, list[str]]:
        time.sleep(0.1)  # long enough for all 12 to come if nothing holds them back
        return completion(number, body)

    with fake_server(answer) as fake:
        run = load(fake, [0.0] * 12, max_concurrency=3)
    assert len(fake.bodies) == 12 and fake.most_open <= 3
    assert all(seen.status == 200 for seen in run.exchanges)


def test_what_goes_wrong_with_one_request_is_written_down_and_ends_no_other():
    def answer(number: int, body: dict) -> tuple[int, list[str]]:
        return (503, ["draining"]) if body["number"] == 1 else completion(number, body)

    with fake_server(answer) as fake:
        assert [seen.status for seen in load(fake, [0.0] * 3).exchanges] == [200, 503, 200]
    refused = load(fake, [0.0]).exchanges[0]  # the server is gone
    assert refused.status is None and "ClientConnectorError" in refused.error


def test_an_answer_that_never_ends_times_out():
    release = threading.Event()

    def answer(number: int, body: dict) -> tuple[int, list[str]]:
        release.wait(PATIENCE)
        return completion(number, body)

    with fake_server(answer) as fake:
        try:
            target = Target(fake.url, timeout=0.2)
            run = asyncio.run(run_load(target, [b'{"prompt": [], "max_tokens": 1}'], [0.0]))
        finally:
            release.set()
    assert run.exchanges[0].error == "no complete answer within 0.2 s (--timeout)"


# --- the command


def bench(fake: FakeServer, folder: Path, *argv: str) -> tuple[int, dict]:
    """The exit status and the JSON of a run."""
    common = ["--base-url", fake.url, "--num-prompts", "6", "--result-dir", str(folder), "--result-filename", "r.json"]
    status = main([*common, "--disable-tqdm", *argv])
    return status, json.loads((folder / "r.json").read_text())


def test_a_run_from_the_command_line_to_the_files(tmp_path, capsys):
    with fake_server(completion) as fake:
        argv = ["--ignore-eos", "--request-rate", "100", "--goodput", "ttft:5000", "--plot"]
        status, result = bench(fake, tmp_path, *argv, "--header", "Authorization=Bearer hidden-key")
    assert status == 0 and result["figures"]["completed"] == 6
    assert result["figures"]["total_output_tokens"] == result["run"]["wanted_tokens"]
    assert result["figures"]["request_goodput"] == pytest.approx(result["figures"]["request_throughput"])
    assert result["run"]["model"] == "the-model" and result["machine"]["cores"] > 0
    assert len(result["requests"]) == 6 and (tmp_path / "r.png").stat().st_size > 1000
    assert len(fake.bodies) == 7  # one to warm up
    assert fake.bodies[0]["prompt"] == fake.bodies[1]["prompt"][:64][::-1]
    wanted = {"model": "the-model", "temperature": 0.0, "stream": True, "ignore_eos": True}
    assert all(body.items() >= wanted.items() for body in fake.bodies)
    assert all(body["stream_options"] == {"include_usage": True} for body in fake.bodies)
    assert all(headers["Authorization"] == "Bearer hidden-key" for headers in fake.headers)
    assert "hidden-key" not in (tmp_path / "r.json").read_text()
    shown = capsys.readouterr().out
    for label in ("Successful requests:", "Request goodput (req/s):", "P99 TTFT (ms):", "CPU time (s):"):
        assert label in shown


def test_failed_requests_are_counted_and_named(tmp_path, capsys):
    def answer(number: int, body: dict) -> tuple[int, list[str]]:
        if number in (2, 3):
            return 429, ['{"error": {"message": "the queue is full"}}']
        status, events = completion(number, body)
        return status, events[:1] if number == 4 else events

    with fake_server(answer) as fake:
        status, result = bench(fake, tmp_path, "--request-rate", "50")
    figures = result["figures"]
    assert status == 1 and (figures["completed"], figures["failed"]) == (3, 3)
    assert figures["errors"] == {"HTTP 429: the queue is full": 2, "the stream ended in mid-answer": 1}
    assert "warning: 2 failed: HTTP 429: the queue is full" in capsys.readouterr().out


def test_answers_that_are_shorter_than_forced_are_a_warning(tmp_path):
    def is_warned(*argv: str) -> bool:
        result = bench(fake, tmp_path, *argv)[1]
        return any("the server ignores ignore_eos" in line for line in result["warnings"])

    with fake_server(lambda number, body: completion(number, body | {"max_tokens": 1})) as fake:
        assert is_warned("--ignore-eos")
        assert not is_warned()  # nothing was forced


def test_nothing_is_measured_if_the_warm_up_fails(tmp_path, capsys):
    with fake_server(lambda number, body: (404, ['{"error": {"message": "no such model"}}'])) as fake:
        status = main(["--base-url", fake.url, "--disable-tqdm"])
    assert status == 2 and "no such model" in capsys.readouterr().err and len(fake.bodies) == 1


def test_a_server_that_is_not_there_is_one_line(capsys):
    with fake_server(completion) as fake:
        pass
    assert main(["--base-url", fake.url]) == 2
    assert "no server at" in capsys.readouterr().err


def test_a_chat_and_a_file(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hello", "output_len": 3}\n{"prompt": "Bye", "output_len": 4}\n')

    def answer(number: int, body: dict) -> tuple[int, list[str]]:
        deltas = [{"role": "assistant", "content": ""}, {"content": "Hi"}, {}]
        choices = [{"delta": delta, "finish_reason": None} for delta in deltas]
        choices[-1]["finish_reason"] = "length"
        return 200, [*(json.dumps({"choices": [choice]}) for choice in choices), "[DONE]"]

    with fake_server(answer) as fake:
        argv = ["--base-url", fake.url, "--endpoint", "/v1/chat/completions", "--dataset-name", "sharegpt"]
        files = ["--dataset-path", str(tmp_path / "p.jsonl"), "--result-filename", str(tmp_path / "r.json")]
        assert main([*argv, *files, "--num-warmups", "0", "--disable-tqdm"]) == 0
    assert sorted(body["messages"][0]["content"] for body in fake.bodies) == ["Bye", "Hello"]
    figures = json.loads((tmp_path / "r.json").read_text())["figures"]
    assert figures["total_output_tokens"] == 7 and figures["without_text"] == 0


def test_bench_serve_is_a_command_and_bench_stays_what_it_was():
    serve = CliRunner().invoke(app, ["bench", "serve", "--help"])
    assert serve.exit_code == 0 and "--request-rate" in serve.output
    alone = CliRunner().invoke(app, ["bench", "--help"])
    assert alone.exit_code == 0 and "--milestones" in alone.output and "--request-rate" not in alone.output
