"""Perplexity of checkpoints on one text, by this engine and by HuggingFace, with a stated window and stride.

Milestone: M7. vLLM counterpart: none (people use lm-eval). The built-in text needs no download and is the half of
`pydoc_data.topics` that calibration never sees. HuggingFace runs a GPTQ checkpoint as its dequantised twin, made in a
temporary folder: its model code judges our weights, without GPTQModel.

    python scripts/eval_ppl.py smollm2-135m ./smollm2-gptq4 [--engines folovllm,hf] [--text builtin|FILE|hf:DATASET]
        [--window 1024] [--stride 512] [--max-tokens N] [--dtype float32] [--threads 2] [--json OUT [--resume]]
"""

import argparse
import datetime
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.report import write_json
from folovllm.engine.tokenizer import Tokenizer
from folovllm.gptq_config import PER_CHANNEL
from folovllm.hf_config import load_hf_config
from folovllm.hub import find_model
from folovllm.model_executor.weight_utils import safetensors_files
from folovllm.quantize.dequantized import write_dequantized
from folovllm.quantize.output import LOG
from folovllm.quantize.perplexity import Scorer, engine_scorer, measure_perplexity, target_logprobs
from folovllm.quantize.text import BUILTIN, read_text, text_digest

ENGINES = ("folovllm", "hf")
Row = dict[str, Any]


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


def evaluate(row: Row, folder: Path, token_ids: list[int]) -> Row:
    """`row`, which says what is asked for, with its answer."""
    with tempfile.TemporaryDirectory() as scratch:
        score = scorer_for(row["engine"], folder, getattr(torch, row["dtype"]), Path(scratch))
        start = time.perf_counter()
        with tqdm(total=len(token_ids) - 1, unit="token", desc=f"{row['model']}, {row['engine']}") as bar:
            result = measure_perplexity(
                score, token_ids, row["window"], row["stride"], lambda count: bar.update(count - bar.n) and None
            )
    return row | asdict(result) | {"seconds": round(time.perf_counter() - start, 1)}


def question(name: str, folder: Path, engine: str, text: str, args: argparse.Namespace) -> Row:
    """What a perplexity is of: two equal questions have one answer."""
    return {
        "model": Path(name).name,
        "engine": engine,
        **quantization_of(folder),
        "weights_sha256": weights_digest(folder),
        "text_sha256": text_digest(text),
        **{key: getattr(args, key) for key in ("window", "stride", "max_tokens", "dtype")},
    }


def known_rows(args: argparse.Namespace) -> list[Row]:
    """Of an earlier run, with --resume."""
    if not (args.resume and args.json.is_file()):
        return []
    rows: list[Row] = json.loads(args.json.read_text())["rows"]
    return rows


def weights_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in safetensors_files(folder):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def quantization_of(folder: Path) -> Row:
    """What a reader asks about a checkpoint: method, bits, groups. All None for a plain one."""
    config = load_hf_config(folder).quantization
    if config is None:
        return {"method": None, "bits": None, "groups": None}
    groups = f"{'-' if config.group_size == PER_CHANNEL else config.group_size} {'sym' if config.sym else 'asym'}"
    return {"method": method_of(folder), "bits": config.bits, "groups": groups + ", act-order" * config.desc_act}


def method_of(folder: Path) -> str:
    """Of this project's checkpoints, GPTQ or RTN; of others, the program that says it made them."""
    log = folder / LOG
    if log.is_file():
        return str(json.loads(log.read_text())["settings"]["method"]).upper()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    makers = config.get("meta", {}).get("quantizer") or ["unknown"]
    return str(makers if isinstance(makers, str) else makers[0]).partition(":")[0]


def report(rows: list[Row], command: str, machine: dict[str, Any], text: str, source: str) -> dict[str, Any]:
    """The result file; `results` is the table that scripts/dev/fill_results.py writes into pages."""
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = {"source": source, "characters": len(text), "sha256": text_digest(text)}
    table = [table_row(row, rows) for row in rows]
    common = {"date": when, "machine": machine, "command": command, "unit": "seconds"}
    return {**common, "text": facts, "rows": rows, "results": table}


def table_row(row: Row, rows: list[Row]) -> Row:
    """`row` for a reader; the rise is over the first plain model that the same program has run."""
    plain = next((r["perplexity"] for r in rows if r["engine"] == row["engine"] and r["bits"] is None), None)
    if row["bits"] is None or plain is None:
        rise, share = "-", "-"
    else:
        rise, share = f"{row['perplexity'] - plain:+.3f}", f"{row['perplexity'] / plain - 1:+.1%}"
    shown = {key: "-" if row[key] is None else str(row[key]) for key in ("model", "engine", "method", "bits", "groups")}
    scored = {"perplexity": f"{row['perplexity']:.3f}", "rise": rise, "rise_%": share}
    return {**shown, **scored, "tokens": f"{row['num_tokens']:,}", "window": row["window"], "stride": row["stride"]}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="aliases, folders or HuggingFace ids")
    parser.add_argument("--engines", default="folovllm", help=f"of {','.join(ENGINES)}")
    parser.add_argument("--hf-only", nargs="*", metavar="MODEL", help="of the models, those for engine hf")
    parser.add_argument("--text", default=BUILTIN)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, help="of the text, from its start (default: all)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--resume", action="store_true", help="keep the answers that OUT has to the same questions")
    args = parser.parse_args(argv)
    if args.resume and args.json is None:
        parser.error("--resume needs the file to go on from: add --json OUT")
    args.engines = args.engines.split(",")
    unknown = set(args.engines) - set(ENGINES)
    if unknown:
        parser.error(f"unknown engine {', '.join(sorted(unknown))}; there are {', '.join(ENGINES)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    machine, text = machine_header(), read_text(args.text, "evaluation")
    rows: list[Row] = []
    known = known_rows(args)
    command = f"scripts/eval_ppl.py {command_of(args)}"
    for name, engine in asked_for(args):
        folder = find_model(name)
        asked = question(name, folder, engine, text, args)
        row = next((row for row in known if asked.items() <= row.items()), None)
        if row is None:
            token_ids = Tokenizer.from_folder(folder).encode(text, add_special_tokens=False)[: args.max_tokens]
            row = evaluate(asked, folder, token_ids)
        rows.append(row)
        if args.json is not None:  # after each, so that an interrupted run can go on
            later = [row for row in known if row not in rows]
            write_json(report([*rows, *later], command, machine, text, Path(args.text).name), args.json)
    shown = report(rows, command, machine, text, Path(args.text).name)
    print_table(shown["results"])
    if args.json is not None:
        write_json(shown, args.json)


def asked_for(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(model, engine) in the order of the table."""
    pairs = [(name, engine) for name in args.models for engine in args.engines]
    return [(name, engine) for name, engine in pairs if engine != "hf" or name in (args.hf_only or args.models)]


def command_of(args: argparse.Namespace) -> str:
    """The arguments that decide the figures, without this machine's folders."""
    names = " ".join(Path(name).name for name in args.models)
    limit = f" --max-tokens {args.max_tokens}" if args.max_tokens else ""
    return (
        f"{names} --engines {','.join(args.engines)} --text {Path(args.text).name} --window {args.window} "
        f"--stride {args.stride}{limit} --dtype {args.dtype}"
    )


def print_table(results: list[Row]) -> None:
    table = [[key.replace("_", " ") for key in results[0]], *([str(value) for value in r.values()] for r in results)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        print(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


if __name__ == "__main__":
    main()
