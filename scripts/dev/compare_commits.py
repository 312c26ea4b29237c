"""Runs workload A on two commits of this repository, in turn: has the engine become slower?

Milestone: M4. vLLM counterpart: none. Each round starts a fresh process for each version, in alternating order, so that
a slow minute of the machine hits both. A round's ratio compares neighbours, and the median of the ratios is the result.

    python scripts/dev/compare_commits.py main~20 . [--rounds 7] [--engine-arg preset=m4] [--json OUT]

A version is a commit, or a folder with a checkout (`.` is this one). Tokens of both versions are compared, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from folovllm.benchmarks.machine import command_line, machine_header
from folovllm.benchmarks.report import write_json
from folovllm.entrypoints.commands.options import parse_value

ROOT = Path(__file__).resolve().parents[2]
MODES = ("single", "batch")

# Runs inside a version's checkout: only the public interface, which both versions have.
CHILD = """
import hashlib, json, random, sys, time
from folovllm import LLM, SamplingParams
args, rng = json.loads(sys.argv[1]), random.Random(0)
jobs = [([rng.randrange(100, 49000) for _ in range(rng.randint(32, 256))], rng.randint(32, 128)) for _ in range(32)]
llm = LLM(**args)
def run(some):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in some]
    return [o.outputs[0].token_ids for o in llm.generate([p for p, _ in some], params, use_tqdm=False)]
def rate(groups):
    start = time.perf_counter()
    tokens = [ids for group in groups for ids in run(group)]
    return sum(map(len, tokens)) / (time.perf_counter() - start), tokens
run(jobs[:2])
single, a = rate([[job] for job in jobs[:8]])
batch, b = rate([jobs])
digest = hashlib.sha256(repr((a, b)).encode()).hexdigest()[:16]
print(json.dumps({"single": single, "batch": batch, "tokens": digest}))
"""


def checkout(version: str, stack: ExitStack) -> Path:
    """The folder of a version; a commit gets a git worktree that goes when `stack` closes."""
    if Path(version).is_dir():
        return Path(version).resolve()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkout"
    command = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*command, "add", "--quiet", "--detach", str(folder), version], check=True)
    stack.callback(subprocess.run, [*command, "remove", "--force", str(folder)], check=True)
    return folder


def measure(folder: Path, engine_args: dict[str, Any]) -> dict[str, Any]:
    """Output tokens per second of one process, for 8 requests one by one ("single") and 32 at once ("batch")."""
    command = [sys.executable, "-c", CHILD, json.dumps(engine_args)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summarise(rounds: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Per mode: the median rates, and the median and the range of new / old over the rounds."""
    summary: dict[str, Any] = {"same_tokens": all(old["tokens"] == new["tokens"] for old, new in rounds)}
    for mode in MODES:
        ratios = [new[mode] / old[mode] for old, new in rounds]
        summary[mode] = {
            "old": round(statistics.median(old[mode] for old, _ in rounds), 1),
            "new": round(statistics.median(new[mode] for _, new in rounds), 1),
            "ratio": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--engine-arg", action="append", default=[], metavar="NAME=VALUE", help="for both versions")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    engine_args = {name: parse_value(text) for name, _, text in (item.partition("=") for item in args.engine_arg)}
    rounds = []
    with ExitStack() as stack:
        folders = [checkout(version, stack) for version in (args.old, args.new)]
        for folder in folders:  # builds the kernels, which is not measured
            measure(folder, engine_args)
        for i in tqdm(range(args.rounds), desc="rounds"):
            order = (0, 1) if i % 2 == 0 else (1, 0)
            results = {side: measure(folders[side], engine_args) for side in order}
            rounds.append((results[0], results[1]))
    summary = summarise(rounds)
    for mode in MODES:
        print(f"{mode:>6}: {summary[mode]['old']} -> {summary[mode]['new']} tok/s, {summary[mode]['ratio']:.3f}x")
    print(f"tokens: {'the same' if summary['same_tokens'] else 'DIFFERENT'}")
    if args.json:
        command = command_line("scripts/dev/compare_commits.py", sys.argv[1:])
        write_json({"command": command, "machine": machine_header(), **summary}, args.json)


if __name__ == "__main__":
    main()
