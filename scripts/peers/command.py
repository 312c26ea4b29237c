"""compare_peers from its command line to its files.

Milestone: M4. vLLM counterpart: none. No torch in this process.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks.arms import BASELINE
from folovllm.benchmarks.command import Plan, describe_run, ensure_weights, make_plan
from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.metrics import median_of
from folovllm.benchmarks.report import read_json
from folovllm.benchmarks.runner import say
from folovllm.hub import HubError
from scripts.peers import comparison, report
from scripts.peers.bench import Bench
from scripts.peers.busy import divides_by_session
from scripts.peers.catalog import (
    FOLDER,
    ISA_VARIABLES,
    LIMITED_ENVIRONMENTS,
    OURS,
    PEERS,
    Peer,
    PeerError,
)
from scripts.peers.comparison import OursFailedError, PairRuns, plan_pairs, run_pairs, speed_name
from scripts.peers.environment import ensure_environment, state_of
from scripts.peers.options import PeerOptions, parse_options
from scripts.peers.weights import Model, find_weights, weights_name

SCRIPT = "scripts/compare_peers.py"
SCHEMA = "folovllm.compare_peers/1"
NOTES = (
    "Every measurement is a fresh process: load, a warm-up of a few short requests, then each mode once. Throughput "
    "counts output tokens; the time includes the prompts. Greedy, EOS ignored, no text is made of tokens. In a prompt "
    "mode it counts the tokens of prompts that are sent one after another for one token of output each.",
    "busy: so many processes that never pause run beside every engine, from its start to its end, each in a session of "
    "its own. autogroup: whether Linux divides a core between sessions first.",
    "cpu_isa avx2: torch is limited by ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS, our "
    "kernels by the engine argument cpu_isa, llama.cpp by compiling it for AVX2.",
    "A peer's measurement and one of ours are a pair, directly after one another, in the other order every second "
    "repeat. `ratio` is ours over the peer's within a pair, its median over the pairs; ours in the table is the median "
    "over all pairs.",
    "Prefix caching is off everywhere: the batch repeats the requests of the single stream.",
    "hf batch: one static batch, padded on the left, decoded until the longest output is complete.",
    "floor_share: throughput of the single stream over what reading the weights once per token would allow at the "
    "memory bandwidth measured in this run; its time includes the prompts. bandwidth_share: decode steps alone.",
    "same_first_token: a check that every engine answers the same question; rounding and 4-bit weights tip near-ties.",
)


def main(argv: list[str] | None = None) -> int:
    """0 if all went well, 1 if an engine failed, 2 for a wrong command, 130 if stopped with nothing to keep."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse_options(argv)
    if options.list_only:
        print(listing(options))
        return 0
    try:
        if options.bench.plot_only:
            return plot_again(options.bench.plot_only)
        return run(options, argv)
    except (ValueError, OSError, HubError) as error:
        print(f"compare_peers.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare_peers.py: interrupted; nothing was written", file=sys.stderr)
        return 130


def plot_again(file: Path) -> int:
    """Draw the picture of a result file beside it."""
    from scripts.peers.plot import write_plot

    for path in write_plot(read_json(file, SCHEMA), file.with_suffix(".png")):
        print(f"wrote {path}")
    return 0


def listing(options: PeerOptions) -> str:
    """The peers, and whether their environments are there."""
    lines = [f"environments in {options.peers_dir}"]
    for peer in PEERS.values():
        state = "in our own environment" if peer.environment is None else state_of(peer.environment, options.peers_dir)
        lines.append(f"  {peer.name:14} {state:24} {peer.label}: {peer.about}")
    limited = [(isa, found) for isa, environments in LIMITED_ENVIRONMENTS.items() for found in environments.items()]
    for isa, (name, environment) in limited:
        state = state_of(environment, options.peers_dir)
        lines.append(f"  {name:14} {state:24} for --cpu-isa {isa}: {environment.about}")
    return "\n".join(lines)


def run(options: PeerOptions, argv: list[str]) -> int:
    """Make the peers ready, measure, write, print; the exit status."""
    machine = machine_header()  # first: the load average should not be ours
    plan = make_plan(options.bench)
    task = replace(plan.task, arm=options.preset, modes=options.modes, num_single=options.num_single)
    plan = replace(plan, task=task)
    ensure_weights(plan)
    runs = {peer.name: PairRuns() for peer in options.peers}
    weights = prepare_peers(options, Path(plan.task.model_path), runs)
    if options.setup_only:
        failed = [name for name, run in runs.items() if run.error]
        say(f"[setup] done; failed: {', '.join(failed)}" if failed else "[setup] done, all ready")
        return 1 if failed else 0
    options.bench.output.mkdir(parents=True, exist_ok=True)
    peers = {peer.name: peer for peer in options.peers}
    bench = Bench(
        plan.task,
        plan.task.make_workload(),
        peers,
        weights,
        options.peers_dir,
        options.bench.timeout,
        options.busy,
        ISA_VARIABLES.get(options.cpu_isa, {}),
    )
    probes = measure_all(bench, runs, options.bench.repeats)
    result = put_together(options, plan, machine, runs, probes, argv)
    files = report.write_files(result, options.bench.output, datetime.now())
    report.print_result(result, files)
    return 0 if result["ok"] else 1


def prepare_peers(options: PeerOptions, folder: Path, runs: dict[str, PairRuns]) -> dict[str, Path]:
    """The file that each peer loads. The error of a peer without environment or file is noted in its runs."""
    weights, bench = {}, options.bench
    model = Model(bench.model, folder, bench.dtype, options.gguf, is_random=bench.random_weights is not None)
    for peer in options.peers:
        try:
            if peer.environment is not None:
                ensure_environment(peer.environment, options.peers_dir, say)
            weights[peer.name] = find_weights(peer.weights, model, peer, options.peers_dir, say)
        except (PeerError, HubError, OSError) as error:
            runs[peer.name].error = str(error)
            say(f"[setup] {peer.name} FAILED: {error}")
    return weights


@dataclass
class Progress:
    """A line per measurement: which of how many, what came out, how long it took."""

    measure: Callable[[str], dict[str, Any]]
    total: int
    done: int = 0

    def __call__(self, name: str) -> dict[str, Any]:
        self.done += 1
        start = time.perf_counter()
        try:
            result = self.measure(name)
        except PeerError as error:
            say(f"[{self.done}/{self.total}] {name} FAILED: {error}")
            raise
        speeds = ", ".join(f"{mode} {f[speed_name(mode)]:.1f} tok/s" for mode, f in result["modes"].items())
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
    options: PeerOptions,
    plan: Plan,
    machine: dict[str, Any],
    runs: dict[str, PairRuns],
    probes: list[dict[str, Any]],
    argv: list[str],
) -> dict[str, Any]:
    """The result, in the shape of the JSON file."""
    arms = {OURS: comparison.summarise_ours(runs, options.modes) | our_facts(plan, machine)}
    for peer in options.peers:
        arms[peer.name] = comparison.summarise_peer(runs[peer.name], peer.name, options.modes) | facts(peer, plan)
        if peer.adapter is None and "modes" in arms[peer.name]:
            arms[peer.name]["version"] = machine["transformers" if peer.arm == BASELINE else "folovllm"]
    bandwidth = median_of([probe["bandwidth"] for probe in probes]) if probes else None
    return {
        "schema": SCHEMA,
        "ok": all(arm["ok"] for arm in arms.values()) and bandwidth is not None,
        "machine": machine | (probes[0]["device"] if probes else {}),
        "run": describe_run(plan, SCRIPT, argv)
        | {name: getattr(options, name) for name in ("preset", "modes", "busy", "cpu_isa")}
        | {"autogroup": divides_by_session()},
        "bandwidth": comparison.add_floor(arms, bandwidth, plan.weight_bytes_per_token),
        "reference": OURS,
        "arms": arms,
        "notes": list(NOTES),
    }


def facts(peer: Peer, plan: Plan) -> dict[str, Any]:
    name = weights_name(peer.weights, plan.task.dtype)
    return {"label": peer.label, "weights": name, "fewer_bits": name != plan.task.dtype}


def our_facts(plan: Plan, machine: dict[str, Any]) -> dict[str, Any]:
    gptq = plan.arch.quantization
    return {
        "label": f"FoloVLLM {plan.task.arm.partition('+')[0]}",  # without cpu_isa, which limits every engine
        "weights": weights_name(FOLDER, plan.task.dtype) if gptq is None else f"GPTQ {gptq.bits}-bit",
        "fewer_bits": gptq is not None,
        "version": machine["folovllm"],
    }
