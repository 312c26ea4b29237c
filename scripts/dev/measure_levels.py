"""Speed of the engine at each level of the C++ kernels: one request, 32 together, and prompts of 1,000 tokens.

Milestone: M4. vLLM counterpart: none. Every level is measured in a fresh process per repeat, the levels in turn, with
torch's libraries limited alike. Writes milestones/m4/results/levels_cpu.json, medians of the repeats:

    python scripts/dev/measure_levels.py [--repeats 2]
"""

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for scripts.peers

from folovllm.benchmarks.arms import ArmTask  # noqa: E402
from folovllm.benchmarks.command import make_plan  # noqa: E402
from folovllm.benchmarks.machine import machine_header  # noqa: E402
from folovllm.csrc.build import load_ops  # noqa: E402
from folovllm.csrc.levels import levels_here  # noqa: E402
from scripts.peers.bench import Bench  # noqa: E402
from scripts.peers.catalog import ISA_VARIABLES, OURS  # noqa: E402
from scripts.peers.comparison import speed_name  # noqa: E402
from scripts.peers.options import ours, parse_options  # noqa: E402

MODES = ("single", "batch", "prompt1000")
RESULT = ROOT / "milestones/m4/results/levels_cpu.json"
SSE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
VARIABLES = ISA_VARIABLES | {"portable": SSE}


def measure(task: ArmTask, level: str) -> dict[str, float]:
    """Tokens per second of one process, by mode."""
    limited = replace(task, arm=ours(None, level), modes=MODES)
    bench = Bench(limited, limited.make_workload(), {}, {}, ROOT, 600.0, variables=VARIABLES.get(level, {}))
    figures = bench.measure(OURS)["modes"]
    return {mode: figures[mode][speed_name(mode)] for mode in MODES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=2, help="fresh processes per level (default: %(default)s)")
    args = parser.parse_args()
    machine = machine_header()  # first: the load average should not be ours
    task = make_plan(parse_options(["--modes", ",".join(MODES)]).bench).task
    levels = [level for level in levels_here() if load_ops(level) is not None]  # built before anything is measured
    runs: dict[str, list[dict[str, float]]] = {level: [] for level in levels}
    for _ in range(args.repeats):
        for level in levels:
            runs[level].append(measure(task, level))
            print(level, {mode: round(speed, 1) for mode, speed in runs[level][-1].items()}, flush=True)
    rows = [{"level": level} | medians(found) for level, found in runs.items()]
    command = shlex.join(["scripts/dev/measure_levels.py", *sys.argv[1:]])
    run = {"command": command, "repeats": args.repeats, "dtype": task.dtype, "unit": "tokens per second"}
    result = {"machine": machine, "run": run, "results": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {mode: round(statistics.median(run[mode] for run in runs), 1) for mode in MODES}


if __name__ == "__main__":
    main()
