"""compare_peers from its command line to its files.

Milestone: M4. vLLM counterpart: none. No torch in this process.
"""

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from folovllm.benchmarks import measure as figures
from folovllm.benchmarks.command import without_folders
from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.runner import say
from folovllm.benchmarks.task import ArmTask
from folovllm.benchmarks.workloads import WORKLOADS, make_workload
from folovllm.config import DTYPE_BYTES
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.hub import HubError, find_model
from scripts.peers import report, summary
from scripts.peers.catalog import FOLDER, OURS, PEERS, Peer, PeerError
from scripts.peers.environment import ensure_environment, state_of
from scripts.peers.options import PeerOptions, parse_options
from scripts.peers.pairs import OursFailedError, PairRuns, plan_pairs, run_pairs
from scripts.peers.process import terminate_as_interrupt
from scripts.peers.tasks import Bench
from scripts.peers.weights import resolve_weights, weights_name

SCHEMA = "folovllm.compare_peers/1"
NOTES = (
    "Every measurement is a fresh process: load, a warm-up of a few short requests, then each mode once. Throughput "
    "counts output tokens; the time includes the prompts. Greedy, EOS ignored, no text is made of tokens.",
    "A peer's measurement and one of ours are a pair, directly after one another, in the other order every second "
    "repeat. `ratio` is ours over the peer's within a pair, its median over the pairs; ours in the table is the median "
    "over all pairs.",
    "Prefix caching is off everywhere: the batch repeats the requests of the single stream.",
    "hf batch: one static batch, padded on the left, decoded until the longest output is complete.",
    "floor_share: throughput of the single stream over what reading the weights once per token would allow at the "
    "memory bandwidth measured in this run; its time includes the prompts. bandwidth_share: decode steps alone.",
    "same_first_token: a check that everybody answers the same question; rounding and 4-bit weights tip near-ties.",
)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if an engine failed, 2 for a wrong command; 130 and 143 if stopped with nothing to keep."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(argv)
    if options.list_only:
        print(listing(options))
        return 0
    with terminate_as_interrupt():
        try:
            return _run(options, argv)
        except (ValueError, OSError, HubError) as error:
            print(f"compare_peers.py: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("compare_peers.py: interrupted; nothing was written", file=sys.stderr)
            return 130


def listing(options: PeerOptions) -> str:
    """The peers, and whether their environments are there."""
    lines = [f"environments in {options.peers_dir}"]
    for peer in PEERS.values():
        state = "in our own environment" if peer.environment is None else state_of(peer.environment, options.peers_dir)
        lines.append(f"  {peer.name:14} {state:24} {peer.label}: {peer.about}")
    return "\n".join(lines)


def _run(options: PeerOptions, argv: list[str]) -> int:
    machine = machine_header()  # first: the load average should not be ours
    setup = Setup(options)
    runs = setup.runs
    if options.setup_only:
        failed = [name for name, run in runs.items() if run.error]
        say(f"[setup] done; failed: {', '.join(failed)}" if failed else "[setup] done, all ready")
        return 1 if failed else 0
    options.output.mkdir(parents=True, exist_ok=True)
    probes = measure_all(setup.bench, runs, options.repeats)
    result = put_together(setup, machine, probes, argv)
    files = report.write_files(result, options.output, datetime.now())
    report.print_tables(result, files)
    return 0 if result["ok"] else 1


class Setup:
    """The model looked at and every peer made ready; `runs` holds the errors of those that could not be."""

    def __init__(self, options: PeerOptions) -> None:
        self.options = options
        self.folder = find_model(options.model, pull=True)
        self.arch: ModelArchitecture = load_hf_config(self.folder)
        self.runs = {peer.name: PairRuns() for peer in options.peers}
        self.weights = {peer.name: self._prepare(peer) for peer in options.peers}
        self.bench = self._make_bench()

    def _prepare(self, peer: Peer) -> Any:
        """The file that the peer loads; None, and its error noted, if there is no environment or file for it."""
        options = self.options
        try:
            if peer.environment is not None:
                ensure_environment(peer.environment, options.peers_dir, say)
            return resolve_weights(
                peer.weights, options.model, self.folder, options.dtype, options.peers_dir, options.gguf, say
            )
        except (PeerError, HubError, OSError) as error:
            self.runs[peer.name].error = str(error)
            say(f"[setup] {peer.name} FAILED: {error}")
            return None

    def _make_bench(self) -> Bench:
        options = self.options
        workload = make_workload(options.workload, self.arch.vocab_size, options.num_requests)
        if not workload.longest <= options.max_model_len <= self.arch.max_position_embeddings:
            raise ValueError(
                f"--max-model-len {options.max_model_len}: the longest request has {workload.longest} tokens and the "
                f"model {self.arch.max_position_embeddings} positions; choose a length between them"
            )
        task = ArmTask(
            arm=options.preset,
            model_path=str(self.folder),
            vocab_size=self.arch.vocab_size,
            workload=options.workload,
            num_requests=options.num_requests,
            modes=options.modes,
            device="cpu",
            dtype=options.dtype,
            threads=options.threads,
            max_model_len=options.max_model_len,
            kv_cache_memory=options.kv_cache_memory,
            bandwidth_bytes=options.bandwidth_bytes,
        )
        peers = {peer.name: peer for peer in options.peers}
        return Bench(task, workload, peers, self.weights, options.peers_dir, options.timeout)


@dataclass
class Progress:
    """A line per measurement: which of how many, what came out, how long it took."""

    measure: Callable[[str], dict[str, Any]]
    total: int
    done: int = field(default=0)

    def __call__(self, name: str) -> dict[str, Any]:
        self.done += 1
        start = time.perf_counter()
        try:
            result = self.measure(name)
        except PeerError as error:
            say(f"[{self.done}/{self.total}] {name} FAILED: {error}")
            raise
        speeds = ", ".join(f"{mode} {f['output_tok_per_s']:.1f} tok/s" for mode, f in result["modes"].items())
        say(f"[{self.done}/{self.total}] {name}: {speeds} ({time.perf_counter() - start:.0f} s)")
        return result


def measure_all(bench: Bench, runs: dict[str, PairRuns], repeats: int) -> list[dict[str, Any]]:
    """All pairs into `runs`; returns what the bandwidth probe found at the start of each repeat."""
    ready = [name for name, run in runs.items() if run.error is None]
    pairs, probes = plan_pairs(ready, repeats), []
    progress = Progress(bench.measure, total=2 * len(pairs))
    for repeat in range(repeats):
        if all(run.error for run in runs.values()):
            break
        say(f"[repeat {repeat + 1}/{repeats}]")
        try:
            probes += _probe(bench)
            run_pairs([pair for pair in pairs if pair.repeat == repeat], progress, runs)
        except OursFailedError as error:
            _stop(runs, f"our own engine failed: {error}")
        except KeyboardInterrupt:  # half an hour of pairs should not be lost
            _stop(runs, "interrupted; the complete pairs are kept")
    return probes


def _probe(bench: Bench) -> list[dict[str, Any]]:
    """What the probe found; nothing if it failed, for which the peers need not be given up."""
    try:
        found = bench.measure_bandwidth()
    except PeerError as error:
        say(f"    bandwidth probe FAILED: {error}")
        return []
    say(f"    memory reads {found['bandwidth']['bytes_per_second'] / 1e9:.1f} GB/s")
    return [found]


def _stop(runs: dict[str, PairRuns], why: str) -> None:
    say(f"stopped: {why}")
    for run in runs.values():
        run.error = run.error or why


def put_together(
    setup: Setup, machine: dict[str, Any], probes: list[dict[str, Any]], argv: list[str]
) -> dict[str, Any]:
    """The result, in the shape of the JSON file."""
    options, runs = setup.options, setup.runs
    arms = {OURS: summary.summarise_ours(runs, options.modes) | _ours_facts(setup, machine)}
    for peer in options.peers:
        facts = {
            "label": peer.label,
            "weights": weights_name(peer.weights, options.dtype),
            "fewer_bits": weights_name(peer.weights, options.dtype) != options.dtype,
        }
        found = summary.summarise_peer(runs[peer.name], peer.name, options.modes)
        arms[peer.name] = found | facts
        if peer.environment is None and peer.adapter is None and "modes" in found:
            arms[peer.name]["version"] = machine["transformers"]
    bandwidth = figures.median_of([probe["bandwidth"] for probe in probes]) if probes else None
    weight_bytes = figures.weight_bytes_per_token(setup.arch, DTYPE_BYTES[options.dtype])
    return {
        "schema": SCHEMA,
        "ok": all(arm["ok"] for arm in arms.values()) and bandwidth is not None,
        "machine": machine | (probes[0]["device"] if probes else {}),
        "run": describe_run(setup, argv),
        "bandwidth": summary.add_floor(arms, bandwidth, weight_bytes),
        "reference": OURS,
        "arms": arms,
        "notes": list(NOTES),
    }


def _ours_facts(setup: Setup, machine: dict[str, Any]) -> dict[str, Any]:
    gptq = setup.arch.quantization
    return {
        "label": f"FoloVLLM {setup.options.preset}",
        "weights": weights_name(FOLDER, setup.options.dtype) if gptq is None else f"GPTQ {gptq.bits}-bit",
        "fewer_bits": gptq is not None,
        "version": machine["folovllm"],
    }


def describe_run(setup: Setup, argv: list[str]) -> dict[str, Any]:
    """What was run, so that it can be run again."""
    options, workload = setup.options, setup.bench.workload
    return {
        "command": shlex.join(["scripts/compare_peers.py", *map(without_folders, argv)]),
        "model": without_folders(options.model),
        "device": "cpu",
        "dtype": options.dtype,
        "preset": options.preset,
        "modes": list(options.modes),
        "threads": options.threads,
        "repeats": options.repeats,
        "max_model_len": options.max_model_len,
        "kv_cache_memory": options.kv_cache_memory,
        "workload": {
            "name": workload.name,
            "about": WORKLOADS[workload.name].about,
            "num_requests": {mode: len(workload.for_mode(mode)) for mode in options.modes},
            "prompt_tokens": sum(len(request.prompt_token_ids) for request in workload.requests),
            "output_tokens": sum(request.output_len for request in workload.requests),
            "sha256": workload.digest(),
        },
    }
