"""Records the same workloads from vLLM and from FoloVLLM, as traces that `folovllm trace diff` and `view` read.

Milestone: M6. vLLM counterpart: none. Needs vLLM's peer environment (python scripts/compare_peers.py --list) and the
default model. The workloads are in trace_workloads.py; how vLLM is wrapped is in vllm_recorder.py.

Times are replaced by one millisecond per step: the files compare decisions, and stay the same when they are made again.

    python scripts/dev/record_vllm.py [--workloads chat,long_prompt] [--out docs/data/vllm_traces]
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for scripts.peers

from trace_workloads import WORKLOADS, Arrival, Workload, run

from folovllm import LLM, SamplingParams
from folovllm.hub import find_model
from folovllm.trace.record import TIMES
from scripts.peers.catalog import PEERS
from scripts.peers.environment import default_peers_dir, python_of

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
MILLISECOND = 0.001


class FolovllmEngine:
    """Our engine with the settings nearest to vLLM's. `ignore_eos`: the lengths are the workload's."""

    def __init__(self, model: str, workload: Workload, out: Path) -> None:
        self.llm = LLM(model, device="cpu", trace=str(out), **workload.engine_args)

    def add(self, arrival: Arrival, prompt: list[int]) -> None:
        params = SamplingParams(temperature=0, max_tokens=arrival.max_tokens, ignore_eos=True)
        self.llm.llm_engine.add_request(
            arrival.request_id, {"prompt_token_ids": prompt}, params, priority=arrival.priority
        )

    def step(self) -> dict[str, list[int]]:
        outputs = self.llm.llm_engine.step()
        return {o.request_id: list(o.outputs[0].token_ids) for o in outputs if o.finished}

    def close(self) -> None:
        self.llm.shutdown()


def record_ours(name: str, model: Path, out: Path) -> None:
    run(FolovllmEngine(str(model), WORKLOADS[name], out), WORKLOADS[name])


def record_vllm(name: str, model: Path, out: Path) -> None:
    """vLLM needs its own environment, and a process per workload: an engine cannot be built twice in one."""
    python = python_of(PEERS["vllm"], default_peers_dir())
    if not Path(python).exists():
        raise SystemExit(f"there is no {python}; install vLLM there with: python scripts/compare_peers.py --peers vllm")
    recorder = ROOT / "scripts/dev/vllm_recorder.py"
    command = [python, str(recorder), "--model", str(model), "--workload", name, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=_one_thread())
    if done.returncode != 0:
        raise SystemExit(f"vLLM failed on {name}:\n{(done.stdout + done.stderr)[-3000:]}")
    print(done.stdout.strip().splitlines()[-1])


def _one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}


def replace_times(path: Path) -> None:
    """Rewrites a trace with a clock of one millisecond per step."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if "step" in line:
            line |= dict(zip(TIMES, (line["step"] * MILLISECOND, MILLISECOND, {"step": MILLISECOND}), strict=True))
    path.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/data/vllm_traces", help="folder for the traces")
    args: Any = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model = find_model(MODEL)
    for name in args.workloads.split(","):
        for engine, record in (("vllm", record_vllm), ("folovllm", record_ours)):
            path = args.out / f"{name}.{engine}.jsonl"
            record(name, model, path)
            replace_times(path)
            print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
