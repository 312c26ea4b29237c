"""One measurement of one engine in a fresh process: ours and HuggingFace as arms of the benchmark, a peer's adapter
through a JSON file.

Milestone: M4. vLLM counterpart: none. No torch. The condition of a run (busy processes beside it, an instruction set
that limits it) holds for every engine and not for the probe of the memory. Every answer is checked: an engine that
stopped early would look fast.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from folovllm.benchmarks.arms import BANDWIDTH, ArmTask
from folovllm.benchmarks.runner import ARM_COMMAND, ask, warm_up_requests
from folovllm.benchmarks.workloads import BenchRequest, Workload, prompt_length
from folovllm.core.kv_cache_utils import GIB
from scripts.peers.busy import busy_processes
from scripts.peers.catalog import OURS, Peer, PeerError
from scripts.peers.comparison import speed_name
from scripts.peers.environment import python_of


@dataclass(frozen=True)
class Bench:
    """Everything that the processes of one run share. `task.arm` is ours; `weights` maps a peer to its file."""

    task: ArmTask
    workload: Workload
    peers: dict[str, Peer]
    weights: dict[str, Path]
    root: Path
    timeout: float
    busy: int = 0  # processes beside every engine
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment of every engine

    def measure(self, name: str) -> dict[str, Any]:
        """One engine, once: load, warm up, every mode. Raises PeerError if it gave no result or a wrong one."""
        command, task = self.command_and_task(name)
        with busy_processes(self.busy):
            return self._checked(self._ask(command, task, self.variables))

    def command_and_task(self, name: str) -> tuple[Sequence[str], str]:
        """What to run for an engine, and the JSON that it reads."""
        if name == OURS:
            return ARM_COMMAND, self.task.to_json()
        peer = self.peers[name]
        if peer.adapter is None:
            return ARM_COMMAND, replace(self.task, arm=peer.arm or self.task.arm, **peer.options).to_json()
        return [python_of(peer, self.root), str(peer.adapter)], json.dumps(self.adapter_task(peer))

    def measure_bandwidth(self) -> dict[str, Any]:
        """How fast this machine reads memory, from a process of its own."""
        return self._ask(ARM_COMMAND, replace(self.task, arm=BANDWIDTH).to_json())

    def _ask(self, command: Sequence[str], task: str, variables: Mapping[str, str] | None = None) -> dict[str, Any]:
        result = ask(command, task, self.timeout, quiet=True, variables=variables)
        if not result["ok"]:
            raise PeerError(result["error"])
        return result

    def adapter_task(self, peer: Peer) -> dict[str, Any]:
        """The task of adapters/peer_process.py."""
        return {
            "model": str(self.weights[peer.name]),
            "dtype": self.task.dtype,
            "threads": self.task.threads,
            "max_model_len": self.task.max_model_len,
            "kv_cache_gib": self.task.kv_cache_memory / GIB,
            "options": dict(peer.options),
            "warm_up": plain_requests(warm_up_requests(self.workload.requests)),
            "modes": {mode: plain_requests(self.workload.for_mode(mode)) for mode in self.task.modes},
        }

    def _checked(self, result: dict[str, Any]) -> dict[str, Any]:
        """`result` with the throughput of each mode, if every request has as many tokens as it asked for."""
        for mode in self.task.modes:
            figures, requests = result["modes"][mode], self.workload.for_mode(mode)
            given, wanted = [len(tokens) for tokens in figures["tokens"]], [r.output_len for r in requests]
            if given != wanted:
                raise PeerError(f"{mode}: {sum(given)} tokens in {len(given)} requests instead of {sum(wanted)}")
            counted = [len(r.prompt_token_ids) for r in requests] if prompt_length(mode) else given
            figures[speed_name(mode)] = sum(counted) / figures["seconds"]
        return result


def plain_requests(requests: list[BenchRequest]) -> list[list[Any]]:
    return [[request.prompt_token_ids, request.output_len] for request in requests]
