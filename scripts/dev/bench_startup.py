#!/usr/bin/env python3
"""Time from starting a process to its first token, with the model already pulled: `folovllm generate --max-tokens 1`.

    python scripts/dev/bench_startup.py [--repeats 5] [--model smollm2-135m] [--json OUT]

The whole process counts: interpreter, imports, weights, KV cache, tokenizer, prompt, one token, exit.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.report import write_json


def one_start(model: str) -> float:
    """Seconds of one process, from fork to exit; CalledProcessError with its output if it fails."""
    command = [sys.executable, "-m", "folovllm", "generate", "The capital of France is", "--max-tokens", "1"]
    start = time.perf_counter()
    subprocess.run([*command, "--model", model], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write machine and results there")
    args = parser.parse_args()
    header = machine_header()  # first: the load average should not be ours
    one_start(args.model)  # fills the file cache; the first start of a day is slower
    seconds = [one_start(args.model) for _ in range(args.repeats)]
    row = {"repeats": args.repeats, "median_ms": statistics.median(seconds) * 1e3, "slowest_ms": max(seconds) * 1e3}
    print(
        f"process start to first token and exit: median {row['median_ms']:.0f} ms, slowest {row['slowest_ms']:.0f} ms"
    )
    if args.json is not None:
        command = f"scripts/dev/bench_startup.py --repeats {args.repeats}"
        result = {"machine": header, "command": command, "unit": "ms", "results": [row]}
        write_json(result, args.json)


if __name__ == "__main__":
    main()
