"""compare_servers without an engine: fake servers in processes of their own, all the way to the files."""

import json
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from scripts.peers import server_command, servers
from scripts.peers.catalog import OURS, PeerError
from scripts.peers.server_command import compare, main, parse_args
from scripts.peers.servers import Server, ServerTask, free_port, running
from tests.m8.test_bench_serve import word_tokenizer

pytestmark = pytest.mark.m8

FAKE = """
    import json, sys, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.reply('{"data": [{"id": "compared"}]}')

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with open(sys.argv[2], "a") as log:
                log.write(json.dumps([sys.argv[3], body]) + "\\n")
            choice = {"text": "x", "finish_reason": "length"}
            self.reply("data: " + json.dumps({"choices": [choice]}) + "\\n\\ndata: [DONE]\\n\\n")

        def reply(self, text):
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_servers(tmp_path, monkeypatch) -> Path:
    """Three servers that answer at once, instead of the real ones; the requests that they got are in the file."""
    script, log = tmp_path / "fake.py", tmp_path / "requests.jsonl"
    script.write_text(textwrap.dedent(FAKE))

    def fake(name: str) -> Server:
        return Server(name, name.title(), "", lambda task: [str(script), str(task.port), str(log), name])

    made = {name: fake(name) for name in (OURS, "vllm", "llamacpp")}
    made["llamacpp"] = replace(made["llamacpp"], extra_body=lambda tokenizer: {"repeat_penalty": 1.0})
    monkeypatch.setattr(server_command, "SERVERS", made)
    monkeypatch.setattr(server_command, "find_model", lambda name, pull: tmp_path)
    monkeypatch.setattr(server_command.Tokenizer, "from_folder", lambda folder: word_tokenizer())
    return log


def run(tmp_path: Path, *argv: str) -> tuple[int, dict]:
    common = ["--rates", "50", "--num-prompts", "2", "--rounds", "2", "--output", str(tmp_path / "r.json")]
    status = main([*common, *argv])
    return status, json.loads((tmp_path / "r.json").read_text())


def test_all_servers_get_the_same_requests_in_alternating_rounds(fake_servers, tmp_path, capsys):
    status, result = run(tmp_path)
    assert status == 0 and result["ok"]
    seen = [json.loads(line) for line in fake_servers.read_text().splitlines()]
    order = [name for i, (name, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != name]
    assert order == [OURS, "vllm", "llamacpp", "vllm", OURS]  # llamacpp ends the first round and begins the second
    prompts = {name: [body["prompt"] for other, body in seen if other == name] for name in (OURS, "vllm", "llamacpp")}
    assert sorted(prompts[OURS]) == sorted(prompts["vllm"]) == sorted(prompts["llamacpp"])
    assert all(isinstance(prompt, str) for prompt in prompts[OURS])
    assert all(("repeat_penalty" in body) == (name == "llamacpp") for name, body in seen if body["max_tokens"] > 1)
    loads = result["servers"]["vllm"]["rounds"][0]["loads"]
    assert set(loads) == {"50", "inf"} and all(load["completed"] == 2 for load in loads.values())
    assert result["servers"]["vllm"]["ours_is_better"]["startup_seconds"] > 0
    assert len(result["results"]) == 6 and (tmp_path / "r.png").stat().st_size > 1000
    assert result["machine"]["cores"] > 0 and "Vllm" in capsys.readouterr().out


def test_a_server_that_does_not_start_is_named_and_the_others_are_measured(fake_servers, tmp_path, monkeypatch, capsys):
    broken = Server("vllm", "vLLM", "", lambda task: ["-c", "print('no such option'); raise SystemExit(3)"])
    monkeypatch.setitem(server_command.SERVERS, "vllm", broken)
    status, result = run(tmp_path, "--peers", "vllm,llamacpp")
    assert status == 1 and not result["ok"]
    error = result["servers"]["vllm"]["error"]
    assert "ended with status 3" in error and "no such option" in error
    assert [len(result["servers"][name]["rounds"]) for name in (OURS, "vllm", "llamacpp")] == [2, 0, 2]
    assert "vllm failed" in capsys.readouterr().out


def test_no_process_of_a_server_is_left(tmp_path, monkeypatch):
    """The server starts a child that ignores SIGTERM; both are gone afterwards, also if the measurement raises."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    script = tmp_path / "fake.py"
    start = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
    script.write_text(start + textwrap.dedent(FAKE))
    server = Server("fake", "", "", lambda task: [str(script), str(task.port), str(tmp_path / "log"), "fake"])
    task = ServerTask(tmp_path, sys.executable, "float32", 1, free_port())
    monkeypatch.setattr(servers, "GRACE", 0.5)
    processes: list[psutil.Process] = []
    with pytest.raises(KeyError), running(server, task, tmp_path / "server.log", 30.0) as found:
        processes = psutil.Process(found.process.pid).children(recursive=True)
        assert found.startup_seconds > 0 and found.memory_bytes() > 2**20
        raise KeyError
    assert len(processes) == 2
    psutil.wait_procs(processes, timeout=5)  # SIGKILL takes a moment
    assert not any(map(servers.is_alive, processes))


def test_a_server_that_never_answers_is_given_up(tmp_path):
    server = Server("fake", "", "", lambda task: ["-c", "import time; print('loading', flush=True); time.sleep(600)"])
    task = ServerTask(tmp_path, sys.executable, "float32", 1, free_port())
    with pytest.raises(PeerError, match=r"(?s)did not answer in time.*loading"):
        with running(server, task, tmp_path / "server.log", 1.0):
            pass


def test_ratios_are_above_one_where_ours_is_better():
    def one(ttft: float, speed: float) -> dict:
        figures = dict.fromkeys((*server_command.FIGURES, "output_throughput"))
        load = figures | {"median_ttft_ms": ttft, "output_throughput": speed}
        return {"startup_seconds": 1.0, "memory_bytes": 100, "loads": {"inf": load}}

    ratios = compare([one(10, 300), one(20, 300)], [one(30, 100), one(20, 200)])
    assert ratios["inf median_ttft_ms"] == pytest.approx((3 + 1) / 2)  # their latency over ours
    assert ratios["inf output_throughput"] == pytest.approx((3 + 1.5) / 2)  # our throughput over theirs
    assert ratios["inf p99_ttft_ms"] is None and ratios["memory_bytes"] == 1.0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--peers vlm", "unknown server 'vlm'"),
        ("--rates fast", "--rates"),
        ("--rates 0", "above 0"),
        ("--rates inf", "above 0"),
    ],
)
def test_a_wrong_option_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert message in capsys.readouterr().err


def test_the_commands_of_the_real_servers_name_model_port_and_lengths():
    task = ServerTask(Path("/models/m"), "python", "bfloat16", 2, 8123, max_model_len=1024)
    for server in servers.SERVERS.values():
        arguments = server.arguments(task)
        assert {"8123", "1024", servers.NAME} <= set(arguments) and any("/models/m" in part for part in arguments)
    assert servers.SERVERS["vllm"].variables(task)["VLLM_CPU_OMP_THREADS_BIND"].split(",")
    body = servers.SERVERS["llamacpp"].extra_body(word_tokenizer())
    assert body["repeat_penalty"] == 1.0
