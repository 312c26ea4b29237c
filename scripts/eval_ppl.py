"""Perplexity of checkpoints on one text, by this engine and by HuggingFace, with a stated window and stride.

Milestone: M7. vLLM counterpart: none (people use lm-eval). The built-in text needs no download and is the half of
`pydoc_data.topics` that calibration never sees. HuggingFace runs a GPTQ checkpoint as its dequantised twin, made in a
temporary folder: its model code judges our weights, without GPTQModel.

    python scripts/eval_ppl.py smollm2-135m ./smollm2-gptq4 [--engines folovllm,hf] [--text builtin|FILE|hf:DATASET]
        [--window 1024] [--stride 512] [--max-tokens N] [--dtype float32] [--threads 2] [--json OUT]
"""

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from folovllm.engine.tokenizer import Tokenizer
from folovllm.entrypoints.bench.machine import machine_header
from folovllm.hf_config import load_hf_config
from folovllm.hub import resolve_model
from folovllm.quantize.dequantized import write_dequantized
from folovllm.quantize.perplexity import Scorer, engine_scorer, measure_perplexity, target_logprobs
from folovllm.quantize.text import BUILTIN, read_text, text_digest

ENGINES = ("folovllm", "hf")


def hf_scorer(folder: Path, dtype: torch.dtype) -> Scorer:
    """HuggingFace's own model of a plain checkpoint, each window in one forward pass."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def score(token_ids: Sequence[int], first: int) -> torch.Tensor:
        ids = torch.tensor(token_ids)
        logits = model(ids[None]).logits[0]  # [n, vocab_size]
        return target_logprobs(logits[first - 1 : -1], ids[first:])

    return score


def scorer_for(engine: str, folder: Path, dtype: torch.dtype, scratch: Path) -> Scorer:
    if engine == "folovllm":
        return engine_scorer(folder, dtype, quantization="auto")
    if load_hf_config(folder).quantization is not None:
        name = str(dtype).removeprefix("torch.")
        folder = write_dequantized(folder, scratch / "twin", name)
    return hf_scorer(folder, dtype)


def evaluate(name: str, engine: str, text: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result: perplexity, and all it depends on."""
    folder = resolve_model(name)
    token_ids = Tokenizer.from_folder(folder).encode(text, add_special_tokens=False)[: args.max_tokens]
    arch = load_hf_config(folder)
    with tempfile.TemporaryDirectory() as scratch:
        score = scorer_for(engine, folder, getattr(torch, args.dtype), Path(scratch))
        start = time.perf_counter()
        with tqdm(total=len(token_ids) - 1, unit="token", desc=f"{Path(name).name}, {engine}") as bar:
            result = measure_perplexity(
                score, token_ids, args.window, args.stride, lambda count: bar.update(count - bar.n) and None
            )
    row = {"model": Path(name).name, "engine": engine, **asdict(result), "seconds": time.perf_counter() - start}
    return row | {"quantization": None if arch.quantization is None else asdict(arch.quantization)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="aliases, folders or HuggingFace ids")
    parser.add_argument("--engines", default="folovllm", help=f"of {','.join(ENGINES)}")
    parser.add_argument("--text", default=BUILTIN)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, help="of the text, from its start (default: all)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args(argv)
    args.engines = args.engines.split(",")
    unknown = set(args.engines) - set(ENGINES)
    if unknown:
        parser.error(f"unknown engine {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    text = read_text(args.text, "evaluation")
    rows = [evaluate(name, engine, text, args) for name in args.models for engine in args.engines]
    print(f"\n{'model':<32} {'engine':<10} {'perplexity':>10} {'tokens':>8} {'window':>7} {'stride':>7}")
    for row in rows:
        print(
            f"{row['model']:<32} {row['engine']:<10} {row['perplexity']:>10.4f} {row['num_tokens']:>8,} "
            f"{row['window']:>7,} {row['stride']:>7,}"
        )
    if args.json is not None:
        text_facts = {"source": args.text, "characters": len(text), "sha256": text_digest(text)}
        settings = {"dtype": args.dtype, "threads": args.threads, "max_tokens": args.max_tokens, "text": text_facts}
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = {"date": when, "machine": machine_header(), "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
