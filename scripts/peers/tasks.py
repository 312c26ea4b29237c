"""What one process is asked, and asking it: ours and HuggingFace through the benchmark's own arms, a peer's adapter
through a JSON file.

Milestone: M4. vLLM counterpart: none. No torch. Every measurement is a fresh process, and every answer is checked: an
engine that stopped early would look fast.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from folovllm.benchmarks.child import WARM_UP_OUTPUT, WARM_UP_PROMPT, WARM_UP_REQUESTS
from folovllm.benchmarks.task import BANDWIDTH, ArmTask
from folovllm.benchmarks.workloads import BenchRequest, Workload
from folovllm.core.kv_cache_utils import GIB
from scripts.peers.catalog import OURS, Peer, PeerError
from scripts.peers.environment import python_of
from scripts.peers.process import run_guarded, tail

Command = Callable[[Path, Path], list[str]]  # task file, result file -> what to run


@dataclass(frozen=True)
class Bench:
    """Everything that the processes of one run share. `task.arm` is ours; `weights` maps a peer to its file."""

    task: ArmTask
    workload: Workload
    peers: dict[str, Peer]
    weights: dict[str, Path]
    root: Path
    timeout: float

    def measure(self, name: str) -> dict[str, Any]:
        """One engine, once: load, warm up, every mode. `PeerError` if it gave no result or a wrong one."""
        if name == OURS:
            result = self._run_arm(self.task)
        elif self.peers[name].adapter is None:
            result = self._run_arm(replace(self.task, arm=name))
        else:
            result = self._run_adapter(self.peers[name])
        return self._checked(result)

    def measure_bandwidth(self) -> dict[str, Any]:
        """How fast this machine reads memory, from a process of its own."""
        return self._run_arm(replace(self.task, arm=BANDWIDTH))

    def _run_arm(self, task: ArmTask) -> dict[str, Any]:
        def command(task_file: Path, result_file: Path) -> list[str]:
            return [sys.executable, "-m", "folovllm.benchmarks", "--arm", str(task_file), str(result_file)]

        return run_task(task.to_json(), command, self.timeout)

    def _run_adapter(self, peer: Peer) -> dict[str, Any]:
        def command(task_file: Path, result_file: Path) -> list[str]:
            return [python_of(peer, self.root), str(peer.adapter), str(task_file), str(result_file)]

        return run_task(json.dumps(self.adapter_task(peer)), command, self.timeout)

    def adapter_task(self, peer: Peer) -> dict[str, Any]:
        """The task of adapters/peer_process.py."""
        short = [
            BenchRequest(request.prompt_token_ids[:WARM_UP_PROMPT], WARM_UP_OUTPUT)
            for request in self.workload.requests[:WARM_UP_REQUESTS]
        ]
        return {
            "model": str(self.weights[peer.name]),
            "dtype": self.task.dtype,
            "threads": self.task.threads,
            "max_model_len": self.task.max_model_len,
            "kv_cache_gib": self.task.kv_cache_memory / GIB,
            "options": dict(peer.options),
            "warm_up": plain_requests(short),
            "modes": {mode: plain_requests(self.workload.for_mode(mode)) for mode in self.task.modes},
        }

    def _checked(self, result: dict[str, Any]) -> dict[str, Any]:
        """`result` with the throughput of each mode, if every request has as many tokens as it asked for."""
        for mode in self.task.modes:
            figures, wanted = result["modes"][mode], [r.output_len for r in self.workload.for_mode(mode)]
            given = [len(tokens) for tokens in figures["tokens"]]
            if given != wanted:
                raise PeerError(f"{mode}: {sum(given)} tokens in {len(given)} requests instead of {sum(wanted)}")
            figures["output_tok_per_s"] = sum(given) / figures["seconds"]
        return result


def plain_requests(requests: list[BenchRequest]) -> list[list[Any]]:
    return [[request.prompt_token_ids, request.output_len] for request in requests]


def run_task(task: str, command: Command, timeout: float) -> dict[str, Any]:
    """One task in a fresh process. `PeerError` with what it said, or with the end of its log if it said nothing."""
    with tempfile.TemporaryDirectory(prefix="folovllm-peers-") as folder:
        task_file, result_file, log = (Path(folder, name) for name in ("task.json", "result.json", "log"))
        task_file.write_text(task)
        try:
            status = run_guarded(command(task_file, result_file), log, timeout)
        except TimeoutError as error:
            raise PeerError(f"{error} (--timeout); the end of its log:\n{tail(log)}") from None
        except OSError as error:
            raise PeerError(f"could not be started: {error}") from None
        if not result_file.exists():
            raise PeerError(f"{_how_it_died(status)}; the end of its log:\n{tail(log)}")
        result: dict[str, Any] = json.loads(result_file.read_text())
        if not result["ok"]:
            raise PeerError(f"{result['error']}; the end of its log:\n{tail(log)}")
        return result


def _how_it_died(status: int) -> str:
    if status == 128 + 9:
        return "its process was killed (signal 9): most likely out of memory; lower --kv-cache-memory"
    return f"its process ended with status {status} and left no result"
