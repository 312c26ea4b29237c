"""Compares the simulator with the measured CPU ladder: calibrates it on two runs, and predicts the other ten.

Milestone: M5. vLLM counterpart: none. No torch. Prints the table of docs/learn/simulator.md as Markdown:

    python scripts/dev/compare_sim.py [--write]
"""

import argparse
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from folovllm.benchmarks.workloads import make_workload
from folovllm.hf_config import ModelArchitecture
from folovllm.model_shapes import shape_architecture
from folovllm.sim.cost import Calibration, CostModel
from folovllm.sim.hardware import HARDWARE, Hardware
from folovllm.sim.simulate import simulate
from folovllm.sim.workloads import SimRequest, SimWorkload

ROOT = Path(__file__).resolve().parents[2]
MEASURED = "milestones/m4/results/compare_perf_A_cpu.json"
CALIBRATED_ON = {"plain": "m1", "fast": "m4"}  # engine of sim/cost.py -> the rung whose single stream it is fitted to
MODES = ("single", "batch")
PAGE = ROOT / "docs/learn/simulator.md"
BLOCK = re.compile(r"(<!-- sim -->\n)(.*?)(<!-- /sim -->)", re.DOTALL)


def measured() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((ROOT / MEASURED).read_text(encoding="utf-8"))
    return result


def workload_of(result: dict[str, Any], mode: str) -> SimWorkload:
    """The benchmark's own requests. In the single stream, each request arrives when the one before has finished."""
    vocab_size = shape_architecture(result["run"]["model"]).vocab_size
    requests = make_workload("A", vocab_size).for_mode(mode)
    return SimWorkload(mode, [SimRequest(0.0, r.prompt_token_ids, r.output_len) for r in requests])


def calibrate(
    arch: ModelArchitecture, hardware: Hardware, prompt: int, ttft: float, context: int, itl: float, source: str
) -> Calibration:
    """Returns the calibration with which the model gives two measured times of a single stream (seconds).

    `ttft` is the time of a prompt of `prompt` tokens, which is computed; `itl` that of a decode behind `context`
    tokens, which is read. The decode gives the overhead, and the prompt then gives the share of the peak.
    """
    ideal = CostModel(arch, hardware, Calibration(1.0, 0.0, source))
    overhead = itl - ideal.step([(context, 1)], 1).seconds
    return Calibration(ideal.step([(0, prompt)], 1).compute / (ttft - overhead), overhead, source)


def calibration(result: dict[str, Any], engine: str) -> Calibration:
    """Fits the two constants of an engine to the medians of one measured single stream."""
    single = result["arms"][CALIBRATED_ON[engine]]["modes"]["single"]
    requests = workload_of(result, "single").requests
    prompts = sorted(len(request.prompt) for request in requests)
    prompt = (prompts[(len(prompts) - 1) // 2] + prompts[len(prompts) // 2]) // 2
    contexts = sorted(len(r.prompt) + i for r in requests for i in range(r.output_len))
    return calibrate(
        shape_architecture(result["run"]["model"]),
        HARDWARE["cpu"],
        prompt,
        single["ttft_ms"]["p50"] / 1e3,
        contexts[len(contexts) // 2],
        single["itl_ms"]["p50"] / 1e3,
        MEASURED,
    )


def predict(result: dict[str, Any], rung: str, mode: str) -> dict[str, Any]:
    """The simulator's figures for a rung of the ladder, with the settings of the measured run."""
    run = result["run"]
    one_seat = {"max_num_seqs": 1} if mode == "single" else {}
    args = {"max_model_len": run["max_model_len"], "kv_cache_memory": run["kv_cache_memory"]} | one_seat
    return simulate(workload_of(result, mode), run["model"], "cpu", preset=rung, **args)


@cache
def rows() -> list[tuple[str, str, float, float, float, float]]:
    """(rung, mode, measured tok/s, predicted, measured median ITL in ms, predicted) for every rung and mode."""
    result, found = measured(), []
    for rung in [name for name in result["arms"] if name.startswith("m")]:
        for mode in MODES:
            real, model = result["arms"][rung]["modes"][mode], predict(result, rung, mode)
            assert model["num_steps"] == real["num_steps"], f"{rung} {mode}: the scheduler took other steps"
            found.append(
                (rung, mode, real["output_tok_per_s"], model["output_tok_per_s"],
                 real["itl_ms"]["p50"], model["itl_ms"]["p50"])
            )  # fmt: skip
    return found


def table() -> str:
    lines = [
        "| rung | requests | tok/s measured | predicted | error | ITL p50 measured, ms | predicted | error |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for rung, mode, speed, model_speed, itl, model_itl in rows():
        fitted = " (fitted)" if mode == "single" and rung in CALIBRATED_ON.values() else ""
        lines.append(
            f"| {rung} | {mode}{fitted} | {speed:.0f} | {model_speed:.0f} | {model_speed / speed - 1:+.0%} "
            f"| {itl:.1f} | {model_itl:.1f} | {model_itl / itl - 1:+.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    if parser.parse_args().write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(BLOCK.sub(lambda match: f"{match[1]}{table()}\n{match[3]}", text), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
