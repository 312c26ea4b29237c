"""compare_servers from its command line to its files.

Milestone: M8. vLLM counterpart: none. No torch in this process, which is also the client. One server is alive at a
time. In the first round the servers come in the order of their names in --peers after ours, in the second one
backwards, and so on, so that drift of the machine hits all alike.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import command_line, machine_header, usable_cores
from folovllm.benchmarks.options import names, positive
from folovllm.benchmarks.report import show, write_json
from folovllm.benchmarks.runner import say
from folovllm.benchmarks.serve.command import measure
from folovllm.benchmarks.serve.options import ServeOptions
from folovllm.config import DEFAULT_MODEL
from folovllm.engine.tokenizer import Tokenizer
from folovllm.hub import HubError, find_model
from scripts.peers.catalog import OURS, PeerError
from scripts.peers.environment import default_peers_dir, ensure_environment, python_of
from scripts.peers.server_report import SATURATED, headline, problems, server_rows, write_plot
from scripts.peers.servers import NAME, SERVERS, Server, ServerTask, free_port, running
from scripts.peers.weights import Model, find_weights

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "scripts/compare_servers.py"
SCHEMA = "folovllm.compare_servers/1"
FIGURES = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms")
COUNTS = ("completed", "failed", "duration", "total_output_tokens", "output_throughput", "request_throughput")
NOTES = (
    "One server is alive at a time, started anew in every round; the order of the servers is reversed from round to "
    "round. Figures are medians over the rounds.",
    "All servers get the same texts, of known length in tokens, the same arrivals, greedy sampling and forced lengths. "
    "Prefix caching is off. Server and client share the cores.",
    "ours_is_better: the median over the rounds of their latency over ours, or of our throughput over theirs.",
    "startup_seconds: from the start of the process to the first token; what an engine compiles once and keeps on disk "
    "is there from the first round on. memory_bytes: resident memory of all processes "
    "of the server after the load, a shared page counted once.",
    "llama.cpp's server answers one request at a time and sends no usage; its tokens are those that were asked for, "
    "since each of its answers ended by length.",
)
DESCRIPTION = """\
Measure FoloVLLM's server beside vLLM's CPU server and llama.cpp's on this machine: latencies at equal request rates,
throughput with all requests at once, seconds to the first token, resident memory. Each peer gets an environment of its
own, made on first use. Leave the machine alone meanwhile."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What every server is measured with."""

    folder: Path
    tokenizer: Tokenizer
    args: argparse.Namespace

    @property
    def loads(self) -> list[float]:
        return [*self.args.rates, math.inf]

    def serve_options(self, url: str, server: Server, rate: float) -> ServeOptions:
        return ServeOptions(
            base_url=url,
            model=NAME,
            prompts="text",
            num_prompts=self.args.num_prompts,
            num_warmups=4,
            request_rate=rate,
            ignore_eos=True,
            seed=self.args.seed,
            timeout=self.args.timeout,
            disable_tqdm=True,
            extra_body=server.extra_body(self.tokenizer),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all went well, 1 if a server failed, 2 for a wrong command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    machine = machine_header()  # first: the load average should not be ours
    try:
        folder = find_model(args.model, pull=True)
        plan = Plan(folder, Tokenizer.from_folder(folder), args)
        rounds = run_rounds(plan)
    except (ValueError, OSError, HubError) as error:
        print(f"compare_servers.py: error: {error}", file=sys.stderr)
        return 2
    result = put_together(plan, machine, rounds, argv)
    path = write_json(result, args.output)
    files = [path, *write_plot(result, path.with_suffix(".png"))]
    show(headline(result), {"": server_rows(result)}, problems(result), files)
    return 0 if result["ok"] else 1


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    peers = [name for name in SERVERS if name != OURS]
    add("--peers", type=names, default=peers, metavar="NAME,...", help=f"default: {','.join(peers)}")
    add("--model", default=DEFAULT_MODEL, help="alias or folder (default: %(default)s)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    add("--rates", type=names, default=["0.5", "1"], metavar="0.5,1", help="requests per second (default: 0.5,1)")
    add("--num-prompts", type=positive, default=32, metavar="N", help="of workload A, at each rate (default: 32)")
    add("--rounds", type=positive, default=2, metavar="N", help="default: %(default)s")
    add("--seed", type=int, default=0, help="of prompts and arrivals; 0 (default): workload A's lengths")
    add("--threads", type=positive, default=usable_cores(), metavar="N", help="default: %(default)s")
    add("--max-model-len", type=positive, default=2048, metavar="N", help="default: %(default)s")
    add("--max-num-seqs", type=positive, default=64, metavar="N", help="default: %(default)s")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="of a start, and of an answer (default: 600)")
    add("--peers-dir", type=Path, default=default_peers_dir(), metavar="DIR", help="default: %(default)s")
    add("--output", type=Path, default=ROOT / "milestones" / "m8" / "results" / "compare_servers_cpu.json",
        metavar="FILE", help="the JSON file; the picture is beside it (default: in milestones/m8/results)")  # fmt: skip
    args = parser.parse_args(argv)
    unknown = [name for name in args.peers if name not in peers]
    if unknown:
        parser.error(f"--peers: unknown server {unknown[0]!r}; there are {', '.join(peers)}")
    try:
        args.rates = [float(rate) for rate in args.rates]
    except ValueError as error:
        parser.error(f"--rates: {error}")
    if not all(0 < rate < math.inf for rate in args.rates):
        parser.error("--rates: expected requests per second above 0; everything at once is measured anyway")
    return args


def run_rounds(plan: Plan) -> dict[str, Result]:
    """Per server: its complete rounds, and what it failed with. A peer that failed is not tried again."""
    servers = [SERVERS[name] for name in (OURS, *plan.args.peers)]
    runs: dict[str, Result] = {server.name: {"rounds": [], "error": None} for server in servers}
    for index in range(plan.args.rounds):
        for server in servers if index % 2 == 0 else reversed(servers):
            run = runs[server.name]
            if run["error"] is None:
                say(f"[round {index + 1}/{plan.args.rounds}] {server.label} ...")
                try:
                    run["rounds"].append(measure_server(plan, server))
                except (PeerError, ValueError, HubError, OSError) as error:
                    run["error"] = str(error)
                    say(f"    FAILED: {error}")
    return runs


def measure_server(plan: Plan, server: Server) -> Result:
    """One server, once: start it, every load, its memory, end it."""
    task = make_task(plan, server)
    with tempfile.TemporaryDirectory(prefix="folovllm-servers-") as folder:
        with running(server, task, Path(folder, "log"), plan.args.timeout) as found:
            say(f"    first token after {found.startup_seconds:.1f} s")
            result: Result = {"startup_seconds": found.startup_seconds, "loads": {}}
            for rate in plan.loads:
                measured, _ = measure(plan.serve_options(found.url, server, rate), plan.tokenizer)
                result["loads"][load_name(rate)] = kept_figures(measured)
                say(f"    {load_name(rate)} requests/s: {in_short(measured['figures'])}")
                for line in measured["warnings"]:
                    say(f"    warning: {line}")
            result["memory_bytes"] = found.memory_bytes()
    return result


def make_task(plan: Plan, server: Server) -> ServerTask:
    """The server's files, made on first use, and the settings that all servers share."""
    args, model, python = plan.args, plan.folder, sys.executable
    if server.peer is not None:
        assert server.peer.environment is not None
        ensure_environment(server.peer.environment, args.peers_dir, say)
        wanted = Model(args.model, plan.folder, args.dtype)
        model = find_weights(server.weights, wanted, server.peer, args.peers_dir, say)
        python = python_of(server.peer, args.peers_dir)
    return ServerTask(model, python, args.dtype, args.threads, free_port(), args.max_model_len, args.max_num_seqs)


def load_name(rate: float) -> str:
    return SATURATED if math.isinf(rate) else f"{rate:g}"


def kept_figures(measured: Result) -> Result:
    """What the result file keeps of one load."""
    figures = {name: measured["figures"][name] for name in (*COUNTS, *FIGURES)}
    return figures | {"client": measured["client"], "warnings": measured["warnings"]}


def in_short(figures: Result) -> str:
    def ms(name: str) -> str:
        return "-" if figures[name] is None else f"{figures[name]:.0f}"

    return (
        f"{figures['completed']} answers, {figures['output_throughput']:.0f} tok/s, "
        f"TTFT {ms('median_ttft_ms')} / {ms('p99_ttft_ms')} ms, TPOT {ms('median_tpot_ms')} / {ms('p99_tpot_ms')} ms"
    )


# ---- the result


def put_together(plan: Plan, machine: Result, runs: dict[str, Result], argv: Sequence[str]) -> Result:
    """The result, in the shape of the JSON file."""
    args, ours = plan.args, runs[OURS]["rounds"]
    servers = {}
    for name, run in runs.items():
        ratios = compare(ours, run["rounds"]) if name != OURS else None
        servers[name] = {
            "label": SERVERS[name].label,
            "about": SERVERS[name].about,
            "requirements": list(peer.environment.requirements)
            if (peer := SERVERS[name].peer) and peer.environment
            else None,
            "ok": run["error"] is None and bool(run["rounds"]),
            "error": run["error"],
            "median": median_round(run["rounds"]),
            "ours_is_better": ratios,
            "rounds": run["rounds"],
        }
    shared = ("model", "dtype", "rates", "num_prompts", "rounds", "seed", "threads", "max_model_len", "max_num_seqs")
    result: Result = {
        "schema": SCHEMA,
        "ok": all(server["ok"] and not failures(server) for server in servers.values()),
        "date": datetime.now().isoformat(timespec="seconds"),
        "command": command_line(SCRIPT, argv),
        "machine": machine,
        "run": {name: getattr(args, name) for name in shared},
        "servers": servers,
        "notes": list(NOTES),
    }
    return result | {"unit": "ms", "results": server_rows(result)}


def failures(server: Result) -> int:
    return sum(load["failed"] for one in server["rounds"] for load in one["loads"].values())


def flat(one: Result) -> dict[str, float | None]:
    """The figures of one round by their paths. E.g. {"startup_seconds": 5.1, "0.5 median_ttft_ms": 61.0, ...}."""
    plain = {name: one[name] for name in ("startup_seconds", "memory_bytes")}
    loads = one["loads"].items()
    names_kept = (*FIGURES, "output_throughput")
    return plain | {f"{load} {name}": figures[name] for load, figures in loads for name in names_kept}


def median_round(rounds: Sequence[Result]) -> dict[str, float | None]:
    return _medians([flat(one) for one in rounds])


def compare(ours: Sequence[Result], theirs: Sequence[Result]) -> dict[str, float | None]:
    """How many times better we are, round by round, and the median of that. Above 1: ours is better."""
    found = []
    for mine, other in zip(map(flat, ours), map(flat, theirs), strict=False):  # a server that failed has fewer rounds
        ratios: dict[str, float | None] = {}
        for name, value in mine.items():
            a, b = (value, other[name]) if name.endswith("throughput") else (other[name], value)
            ratios[name] = a / b if a is not None and b else None
        found.append(ratios)
    return _medians(found)


def _medians(rounds: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    columns = {name: [one[name] for one in rounds if one[name] is not None] for name in (rounds[0] if rounds else ())}
    return {name: statistics.median(values) if values else None for name, values in columns.items()}  # type: ignore[type-var]
