#!/usr/bin/env python3
"""The evidence of M7's quantiser in one command: checkpoints, their errors and times, perplexities, tables and plots.

Milestone: M7. vLLM counterpart: none. Checkpoints and perplexities that are there already are kept, so an interrupted
run goes on, and a step can be repeated alone.

    python scripts/dev/measure_gptq.py WORK            all that is missing, into milestones/m7/results
    python scripts/dev/measure_gptq.py WORK --time     GPTQ-4 once more, on a quiet machine: time and memory

    gptq4 rtn4 gptq3 rtn3   ours, 4 and 3 bits, with the defaults of `folovllm quantize`
    theirs4                 GPTQModel's (scripts/dev/compare_gptqmodel.py), with the same settings and calibration

    quantize.json        errors per kind of layer, GPTQ beside rounding to nearest     quantize.png    errors per layer,
    quantize_time.json   where GPTQ-4's time goes                                                      perplexities
    eval_ppl.json        perplexities
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.report import write_json
from folovllm.quantize.output import LOG

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "milestones" / "m7" / "results"
ARMS = ("gptq4", "rtn4", "gptq3", "rtn3", "theirs4")
KINDS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
LIMIT_SECONDS = 600
FACTS = "machine_header.json"  # beside the checkpoints: what each was made on
TIMED = "gptq4-timed"
Facts = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.time:
        shutil.rmtree(args.work / TIMED, ignore_errors=True)
        make_checkpoint("gptq4", args, TIMED)
    else:
        for arm in args.arms:
            make_checkpoint(arm, args, arm)
        measure_perplexities(args)
        write_errors(args)
    write_times(args)
    path = args.results / "eval_ppl.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    ours = {row["model"]: row["perplexity"] for row in rows if row["engine"] == "folovllm"}
    print("\n".join([time_line(timed_log(args)), *verdict(ours, Path(args.model).name)]))
    if not args.time:
        draw(args, rows)
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a folder for checkpoints of 170 MB each")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--arms", default=",".join(ARMS), help="default: %(default)s")
    parser.add_argument(
        "--time", action="store_true", help="only quantise GPTQ-4 in a folder of its own, for its time and memory"
    )
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16_384, help="of the evaluation text, 0: all (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder (default: milestones/m7/results)")
    args = parser.parse_args(argv)
    args.arms = args.arms.split(",")
    unknown = set(args.arms) - set(ARMS)
    if unknown:
        parser.error(f"unknown arm {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    return args


# --- Checkpoints and perplexities, each by the command that a user would type -----------------------------------------


def make_checkpoint(arm: str, args: argparse.Namespace, folder: str) -> None:
    """In its own process, so that its peak memory is its own."""
    out = args.work / folder
    if (out / "config.json").is_file():
        return
    header, bits = machine_header(), ["--bits", arm[-1]]
    calibration = ["--samples", str(args.samples), "--seq-len", str(args.seq_len), "--threads", str(args.threads)]
    if arm.startswith("theirs"):
        script = [str(ROOT / "scripts/dev/compare_gptqmodel.py"), "--model", args.model, "--quantize", str(out)]
        run([*script, *bits, *calibration])
    else:
        command = ["-m", "folovllm.entrypoints.cli", "quantize", args.model, str(out), "--method", arm[:-1]]
        run([*command, *bits, *calibration])
    (out / FACTS).write_text(json.dumps(header, indent=1))


def measure_perplexities(args: argparse.Namespace) -> None:
    """HuggingFace's too, of the plain model and of the first arm."""
    models = [args.model, *(str(args.work / arm) for arm in args.arms)]
    limit = ["--max-tokens", str(args.max_tokens)] if args.max_tokens else []
    common = ["--threads", str(args.threads), "--json", str(args.results / "eval_ppl.json"), "--resume", *limit]
    run([str(ROOT / "scripts/eval_ppl.py"), *models, "--engines", "folovllm,hf", "--hf-only", *models[:2], *common])


def run(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


# --- Result files -----------------------------------------------------------------------------------------------------


def log_of(arm: str, args: argparse.Namespace) -> Facts:
    log: Facts = json.loads((args.work / arm / LOG).read_text())
    return log


def timed_folder(args: argparse.Namespace) -> str:
    return TIMED if (args.work / TIMED / LOG).is_file() else "gptq4"


def timed_log(args: argparse.Namespace) -> Facts:
    return log_of(timed_folder(args), args)


def result_file(name: str, made: str, results: list[Facts], args: argparse.Namespace, **more: Any) -> None:
    """A file that scripts/dev/fill_results.py makes a table of."""
    numbers = f"--samples {args.samples} --seq-len {args.seq_len} --threads {args.threads}"
    command = f"scripts/dev/measure_gptq.py WORK {numbers}"
    content = {
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": json.loads((args.work / made / FACTS).read_text()),  # when that checkpoint was made
        "command": command,
        "unit": "seconds",
        "results": results,
        **more,
    }
    write_json(content, args.results / name)


def write_errors(args: argparse.Namespace) -> None:
    logs = {arm: log_of(arm, args) for arm in ("gptq4", "gptq3") if (args.work / arm / LOG).is_file()}
    results = [errors_row(arm, kind, log["linears"]) for arm, log in logs.items() for kind in (*KINDS, "all")]
    result_file("quantize.json", "gptq4", results, args, logs=logs)


def errors_row(arm: str, kind: str, linears: list[Facts]) -> Facts:
    """Means over the layers, of |(W - Q) X|^2 / |W X|^2."""
    chosen = [entry for entry in linears if kind in (entry["linear"].rpartition(".")[2], "all")]
    gptq, nearest = (statistics.fmean(entry[key] for entry in chosen) for key in ("error", "rtn_error"))
    return {
        "bits": int(arm[-1]),
        "linear": kind,
        "number": len(chosen),
        "GPTQ_error": f"{gptq:.2e}",
        "RTN_error": f"{nearest:.2e}",
        "ratio": f"{gptq / nearest:.2f}",
        "worse_than_RTN": sum(entry["error"] >= entry["rtn_error"] for entry in chosen),
        "seconds": round(sum(entry["seconds"] for entry in chosen), 1),
    }


def write_times(args: argparse.Namespace) -> None:
    """Where GPTQ-4's time goes; what is in no part is reading text, moving weights, the progress bar."""
    log = timed_log(args)
    parts = sorted(log["parts"].items(), key=lambda item: -item[1])
    parts.append(("all else", log["seconds"] - sum(seconds for _, seconds in parts)))
    rows = [{"part": name, "seconds": round(s, 1), "share": f"{s / log['seconds']:.0%}"} for name, s in parts]
    rows.append({"part": "total", "seconds": round(log["seconds"], 1), "share": "100%"})
    facts = {key: log[key] for key in ("threads", "seconds", "peak_memory_bytes")}
    facts |= {"limit_seconds": LIMIT_SECONDS, "calibration_tokens": args.samples * args.seq_len}
    result_file("quantize_time.json", timed_folder(args), rows, args, **facts)


def time_line(log: Facts) -> str:
    good = _word(log["seconds"] <= LIMIT_SECONDS)
    memory = f"{log['peak_memory_bytes'] / 2**20:.0f} MiB at most"
    return f"{good}: GPTQ-4 in {log['seconds']:.0f} s with {log['threads']} threads, at most {LIMIT_SECONDS}; {memory}"


def verdict(perplexity: dict[str, float], plain: str) -> list[str]:
    """What M7 must reach, a line each: shares of RTN's rise, and at most 1 % above GPTQModel."""
    rise = {name: value - perplexity[plain] for name, value in perplexity.items()}
    lines = []
    for bits, share in (("4", 2 / 3), ("3", 1 / 2)):
        ours, nearest, theirs = (f"{method}{bits}" for method in ("gptq", "rtn", "theirs"))
        if {ours, nearest} <= rise.keys():
            found = rise[ours] / rise[nearest]
            text = f"GPTQ-{bits} rises by {rise[ours]:.3f}, RTN by {rise[nearest]:.3f}"
            lines.append(f"{_word(0 < found <= share)}: {text}: {found:.2f} of it, at most {share:.2f}")
        if {ours, theirs} <= rise.keys():
            ratio = perplexity[ours] / perplexity[theirs]
            lines.append(f"{_word(ratio <= 1.01)}: GPTQ-{bits} is {ratio:.4f} of GPTQModel's, at most 1.01")
    return lines


def _word(good: bool) -> str:
    return "holds" if good else "FAILS"


# --- The plot ---------------------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace, rows: list[Facts]) -> None:
    from folovllm.benchmarks.plot import plt, save

    figure, (errors, points) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained", width_ratios=(3, 2))
    for arm, colour in (("gptq4", "tab:blue"), ("gptq3", "tab:orange")):
        if (args.work / arm / LOG).is_file():
            draw_errors(errors, log_of(arm, args)["linears"], f"{arm[-1]} bits", colour)
    errors.set(yscale="log", xlabel="layer", ylabel="share of the output that is disturbed")
    errors.set_title("Error of each layer (mean of its four linears)")
    errors.grid(alpha=0.3)
    errors.margins(y=0.2)
    errors.legend(ncols=2, loc="upper center")
    draw_points(points, [row for row in rows if row["engine"] == "folovllm"])
    save(figure, args.results / "quantize.png")


def draw_errors(axes: Any, linears: list[Facts], label: str, colour: str) -> None:
    layers = sorted({entry["layer"] for entry in linears})
    for key, name, style in (("error", "GPTQ", "-"), ("rtn_error", "RTN", "--")):
        means = [statistics.fmean(e[key] for e in linears if e["layer"] == layer) for layer in layers]
        axes.plot(layers, means, style, color=colour, label=f"{label}, {name}")


def draw_points(axes: Any, rows: list[Facts]) -> None:
    """Points, not bars: a logarithmic axis has no bottom for bars to stand on."""
    names = [row["model"] if row["bits"] is None else f"{row['method']}-{row['bits']}" for row in rows]
    colours = {"GPTQ": "tab:blue", "RTN": "tab:gray", None: "black"}
    for i, row in enumerate(rows):
        axes.plot(i, row["perplexity"], "o", color=colours.get(row["method"], "tab:green"))
        axes.annotate(
            f"{row['perplexity']:.2f}", (i, row["perplexity"]), (0, 8), textcoords="offset points", ha="center"
        )
    axes.set_xticks(range(len(rows)), names, rotation=30)
    axes.set_yscale("log")
    axes.margins(x=0.1, y=0.15)
    axes.grid(alpha=0.3)
    axes.set_title(f"Perplexity, {rows[0]['num_tokens']:,} tokens (lower is better)")


if __name__ == "__main__":
    sys.exit(main())
