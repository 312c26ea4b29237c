#!/usr/bin/env python3
"""Speed and memory of a GPTQ checkpoint: plain bf16, `gptq_runtime="memory"` and `"speed"`, in turn.

Milestone: M7. vLLM counterpart: vllm bench throughput on two checkpoints. All arms have the same weights: "bf16" is the
checkpoint dequantised while it is loaded, which is what the engine did before M7. The three take turns within one
process, request by request, so that whatever else the machine does hits all of them; medians count.

    single   one request after another: tokens per second after the first
    batch    32 requests at once: tokens per second from the first request to the last token

    python scripts/dev/bench_gptq.py ./smollm2-gptq4 [--repeats 5] [--batch 32] [--prompt 64] [--tokens 64]
        [--threads 2] [--cpu-isa avx2] [--json OUT]
"""

import argparse
import dataclasses
import statistics
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from folovllm.benchmarks.machine import machine_header, measure_bandwidth
from folovllm.benchmarks.report import write_json
from folovllm.config import EngineConfig, QuantizationConfig
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.hf_config import load_hf_config
from folovllm.hub import find_model
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.sampling_params import RequestOutputKind, SamplingParams

ARMS: dict[str, QuantizationConfig] = {
    "bf16": QuantizationConfig("dequantize"),
    "memory": QuantizationConfig("auto", "cpu_int4", "memory"),
    "speed": QuantizationConfig("auto", "cpu_int4", "speed"),
}
PROBE_BYTES = 2**29


def make_engine(folder: Path, quantization: QuantizationConfig, seats: int, cpu_isa: str) -> LLMEngine:
    """The engine as of the top rung; only how it holds the weights differs."""
    args = EngineConfig.from_args(
        model=str(folder), dtype="bfloat16", max_num_seqs=seats, max_model_len=1024, cpu_isa=cpu_isa
    )
    config = dataclasses.replace(args, quantization_config=quantization).resolve(load_hf_config(folder), "cpu")
    return LLMEngine(config, UniProcExecutor(config, folder), tokenizer=None)


def run(engine: LLMEngine, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
    """(seconds, seconds from the first step that gave a token) until all have `num_tokens`."""
    params = SamplingParams(
        temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    engine.reset_prefix_cache()
    start, first = time.perf_counter(), 0.0
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{start}-{i}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        if engine.step() and not first:
            first = time.perf_counter()
    end = time.perf_counter()
    return end - start, end - first


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocab_size, (count, length), generator=generator).tolist()


def linear_bytes(engine: LLMEngine) -> int:
    """Weights of the decoder's linear layers: not the head, not the embedding."""
    executor = engine.engine_core.executor
    assert isinstance(executor, UniProcExecutor)
    model: Any = executor.worker.model_runner.model
    return sum(_bytes_of(m) for name, m in model.named_modules() if isinstance(m, LinearBase) and name != "lm_head")


def _bytes_of(layer: Any) -> int:
    if hasattr(layer, "int4_parts"):
        return sum(tensor.nbytes for part in layer.int4_parts for tensor in part.tensors.values())
    weight = layer.packed_weight if hasattr(layer, "packed_weight") else layer.weight
    return int(weight.nbytes)


def crossover_of(engine: LLMEngine) -> int | None:
    """Up to how many tokens `speed` uses 4 bits."""
    executor = engine.engine_core.executor
    assert isinstance(executor, UniProcExecutor)
    model: Any = executor.worker.model_runner.model
    method = model.model.layers[0].mlp.down_proj.quant_method
    return method.kernel.max_int4_rows if hasattr(method, "kernel") and method.kernel.keeps_bf16 else None


def measure(engines: dict[str, LLMEngine], vocab_size: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    times: dict[str, dict[str, list[float]]] = {name: {"single": [], "batch": []} for name in engines}
    for repeat in range(args.repeats + 1):
        one = random_prompts(1, args.prompt, vocab_size, 2 * repeat)
        many = random_prompts(args.batch, args.prompt, vocab_size, 2 * repeat + 1)
        for name, engine in engines.items():
            single = (args.tokens - 1) / run(engine, one, args.tokens)[1]
            batch = args.batch * args.tokens / run(engine, many, args.tokens)[0]
            if repeat:  # the first round warms up
                times[name]["single"].append(single)
                times[name]["batch"].append(batch)
                print(f"{name:8} single {single:6.1f} tok/s, batch of {args.batch} {batch:6.1f} tok/s", flush=True)
    return {
        name: {f"{mode}_tokens_per_second": statistics.median(t[mode]) for mode in t} | {"runs": t}
        for name, t in times.items()
    }


def as_table(figures: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What scripts/dev/fill_results.py puts into pages."""
    sizes = " ".join(f"--{name} {getattr(args, name)}" for name in ("repeats", "batch", "prompt", "tokens", "threads"))
    rows = [
        {
            "arm": name,
            "single tok/s": f"{arm['single_tokens_per_second']:.1f}",
            "single": f"{arm['single_ratio']:.2f}x",
            "batch tok/s": f"{arm['batch_tokens_per_second']:.1f}",
            "batch": f"{arm['batch_ratio']:.2f}x",
            "linear weights MB": f"{arm['linear_bytes'] / 1e6:.1f}",
            "of bf16": f"{arm['linear_bytes_ratio']:.0%}",
            "4 bits up to tokens": "-" if arm["crossover"] is None else str(arm["crossover"]),
        }
        for name, arm in figures.items()
    ]
    level = "" if args.cpu_isa == "native" else f" --cpu-isa {args.cpu_isa}"
    command = f"scripts/dev/bench_gptq.py {Path(args.checkpoint).name} {sizes}{level}"
    return {"command": command, "unit": "tokens per second", "results": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    for name, default in (("repeats", 5), ("batch", 32), ("prompt", 64), ("tokens", 64), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cpu-isa", default="native", help="the level of the kernels (%(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    header, folder = machine_header(), find_model(args.checkpoint)
    engines = {name: make_engine(folder, quantization, args.batch, args.cpu_isa) for name, quantization in ARMS.items()}
    figures = measure(engines, load_hf_config(folder).vocab_size, args)
    for name, engine in engines.items():
        figures[name] |= {"linear_bytes": linear_bytes(engine), "crossover": crossover_of(engine)}
        for mode in ("single", "batch"):
            key = f"{mode}_tokens_per_second"
            figures[name][f"{mode}_ratio"] = figures[name][key] / figures["bf16"][key]
        figures[name]["linear_bytes_ratio"] = figures[name]["linear_bytes"] / figures["bf16"]["linear_bytes"]
        shown = {k: round(v, 2) for k, v in figures[name].items() if isinstance(v, float)}
        print(f"{name:8} {shown}")
    quantization = load_hf_config(folder).quantization
    result = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": header,
        "threads": args.threads,
        "memory_read": measure_bandwidth("cpu", PROBE_BYTES),
        "settings": {k: getattr(args, k) for k in ("repeats", "batch", "prompt", "tokens")},
        "quantization": None if quantization is None else dataclasses.asdict(quantization),
        "arms": figures,
    }
    result |= as_table(figures, args)
    if args.json:
        write_json(result, args.json)


if __name__ == "__main__":
    main()
