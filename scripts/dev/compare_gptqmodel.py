#!/usr/bin/env python3
"""Beside GPTQModel: what we write it loads as the same weights and logits, and what it writes we load likewise.

Milestone: M7. vLLM counterpart: tests/quantization. GPTQModel lives in an environment of its own, in the user's cache,
which sees the packages of this one; nothing is installed into this one. The model is cut to its first layers, so that a
run takes minutes. With --quantize it only makes GPTQModel's checkpoint of the whole model, for measure_gptq.py.

    python scripts/dev/compare_gptqmodel.py [--model smollm2-135m] [--layers 2] [--cases 1,2] [--json OUT]
    python scripts/dev/compare_gptqmodel.py --quantize OUT [--bits 4] [--samples 64] [--seq-len 512]

The reference is transformers on the dequantised twin: the weights as *we* read them, in a plain checkpoint. Beside it
stand this engine, GPTQModel's loader and transformers' (which calls GPTQModel), with two questions to each:

    weights  the same to the last bit: a scale of 11 bits times a difference of at most 9 is exact in fp32
    logits   in fp32, equal but for the order of sums; `bound` says what that may cost
"""

import argparse
import datetime
import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.report import write_json
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.hub import find_model

ENVIRONMENT = Path.home() / ".cache" / "folovllm" / "gptqmodel-env"
PACKAGES = ("gptqmodel", "optimum")  # transformers asks for optimum before it loads a GPTQ checkpoint
CHILD = Path(__file__).resolve().with_name("gptqmodel_child.py")
CASES: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "4 bits, act-order": {"bits": 4, "desc_act": True},
    "4 bits, asymmetric, v2": {"bits": 4, "sym": False, "checkpoint_format": "gptq_v2"},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2, "group_size": 32},
    "8 bits, per channel": {"bits": 8, "group_size": -1},
}
LOADERS = ("gptqmodel", "transformers")
Job = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    ensure_environment()
    with tempfile.TemporaryDirectory() as scratch:
        if args.quantize is not None:
            return quantize_whole_model(args, Path(scratch))
        report = compare(args, Path(scratch))
    print_report(report)
    if args.json is not None:
        write_json(report, args.json)
    return 0 if all(row["equal"] == "yes" for row in report["results"]) else 1


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=2, help="keep only so many (%(default)s)")
    parser.add_argument("--cases", default="", help=f"numbers of {'; '.join(CASES)}: e.g. 1,2 (default: all)")
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens in each (%(default)s)")
    parser.add_argument("--quantize", type=Path, metavar="OUT", help="only GPTQModel's checkpoint of the whole model")
    parser.add_argument("--bits", type=int, default=4, help="for --quantize (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args(argv)


def quantize_whole_model(args: argparse.Namespace, scratch: Path) -> int:
    """GPTQModel's checkpoint with the settings and calibration that `folovllm quantize` has by default."""
    source = find_model(args.model)
    windows, _ = token_windows(source, args)
    job = quantize_job("whole", source, args.quantize.resolve(), {"bits": args.bits}, windows)
    errors = ask_gptqmodel([job], scratch, args.threads)["errors"]
    for error in errors.values():
        print(f"GPTQModel failed: {error}", file=sys.stderr)
    return len(errors)


# --- The comparison ---------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    machine = machine_header()
    source = cut_model(find_model(args.model), scratch / "source", args.layers)
    arch = load_hf_config(source)
    windows, probe = token_windows(source, args)
    chosen = [int(number) - 1 for number in args.cases.split(",") if number] or range(len(CASES))
    cases = {name: case for i, (name, case) in enumerate(CASES.items()) if i in chosen}
    written = {(name, by): scratch / f"{by}{i}" for i, name in enumerate(cases) for by in ("ours", "theirs")}
    errors = write_checkpoints(cases, written, source, windows, scratch, args.threads)
    readable = {key: folder for key, folder in written.items() if key not in errors}
    jobs = [job for (name, _), folder in readable.items() for job in read_jobs(folder, CASES[name]["bits"], probe)]
    jobs.append(plain_job(source, "plain", probe))
    answers = ask_gptqmodel(jobs, scratch, args.threads)
    limit = bound(arch)
    refused = {key: dict.fromkeys(("folovllm", *LOADERS), error) for key, error in errors.items()}
    found = {key: distances(folder, probe, answers) for key, folder in readable.items()} | refused
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "command": f"scripts/dev/compare_gptqmodel.py --model {args.model} --layers {args.layers}",
        "unit": "seconds",
        "versions": answers["versions"],
        "settings": {"samples": len(windows), "seq_len": args.seq_len, "probe_tokens": len(probe)},
        "bound": limit,
        # What the two programs differ by on a model without GPTQ: the order of sums alone.
        "plain_distance": distance(our_logits(source, probe), logits_of(answers, "plain")),
        "results": [table_row(*key, found[key], limit) for key in written],
    }


def bound(arch: ModelArchitecture) -> float:
    """What the order of sums in fp32 may cost a logit, in units of the logits' standard deviation.

    A sum of n terms, each rounded by up to u = 2**-24, is off by about sqrt(n) u, and the errors of the d matrix
    products on the way to the logits add up likewise: sqrt(n d) u. Ten times that for what norms and softmax amplify,
    and because the largest of millions of logits counts. For two layers of the default model 9e-5; for comparison,
    zeros off by one cost 12, and the groups of k_proj alone off by one 0.3.
    """
    depth = 7 * arch.num_hidden_layers + 1
    return 10 * math.sqrt(arch.intermediate_size * depth) * 2.0**-24


def cut_model(source: Path, out: Path, layers: int) -> Path:
    """A copy of the model with its first `layers` layers, in fp16: what GPTQModel loads in, so nothing is rounded."""
    from safetensors.torch import save_file

    from folovllm.model_executor.weight_utils import iterate_weights, safetensors_files

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    gone = tuple(f"model.layers.{i}." for i in range(layers, 1000))
    weights = iterate_weights(safetensors_files(source))
    kept = {name: tensor.half().contiguous() for name, tensor in weights if not name.startswith(gone)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "torch_dtype"}
    config |= {"num_hidden_layers": layers, "dtype": "float16"} | (
        {"layer_types": config["layer_types"][:layers]} if "layer_types" in config else {}
    )
    (out / "config.json").write_text(json.dumps(config))
    return out


def token_windows(source: Path, args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Calibration sequences, the same for both, and the tokens whose logits are compared."""
    from folovllm.engine.tokenizer import Tokenizer
    from folovllm.quantize.text import builtin_text, calibration_windows

    tokenizer = Tokenizer.from_folder(source)
    calibration, evaluation = (tokenizer.encode(builtin_text(s), False) for s in ("calibration", "evaluation"))
    return calibration_windows(calibration, args.samples, args.seq_len), evaluation[:64]


def write_checkpoints(
    cases: dict[str, dict[str, Any]],
    written: dict[tuple[str, str], Path],
    source: Path,
    windows: list[list[int]],
    scratch: Path,
    threads: int,
) -> dict[tuple[str, str], str]:
    """Ours, theirs and the twins of both; why, of those that there are not."""
    for name, case in cases.items():
        quantize_ours(source, written[name, "ours"], case, windows)
    jobs = [quantize_job(name, source, written[name, "theirs"], case, windows) for name, case in cases.items()]
    failed = ask_gptqmodel(jobs, scratch, threads)["errors"]
    errors = {(name, "theirs"): error for name, error in failed.items()}
    for key, folder in written.items():
        error = None if key in errors else write_twin(folder)
        if error is not None:
            errors[key] = error
    return errors


def quantize_ours(source: Path, out: Path, case: dict[str, Any], windows: list[list[int]]) -> None:
    from folovllm.gptq_config import GPTQConfig
    from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint

    settings = QuantizeSettings(GPTQConfig(**{"group_size": 64, **case}))
    quantize_checkpoint(source, out, settings, windows, progress=False)


def write_twin(folder: Path) -> str | None:
    """`folder`-twin, in fp32; or why we do not read `folder`."""
    from folovllm.quantize.dequantized import write_dequantized

    try:
        write_dequantized(folder, twin_of(folder))
    except ValueError as error:
        return f"we do not read it: {error}"
    return None


def twin_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-twin")


def quantize_job(name: str, source: Path, folder: Path, case: dict[str, Any], windows: list[list[int]]) -> Job:
    case = {"group_size": 64, "sym": True, "desc_act": False, **case}
    return {"do": "quantize", "name": name, "source": source, "folder": folder, "case": case, "windows": windows}


def read_jobs(folder: Path, bits: int, probe: list[int]) -> list[Job]:
    common = {"do": "read", "folder": folder, "ids": probe, "bits": bits, "twin": twin_of(folder)}
    jobs = [common | {"name": f"{folder.name}/{via}", "via": via} for via in LOADERS]
    return [*jobs, plain_job(twin_of(folder), twin_of(folder).name, probe)]


def plain_job(folder: Path, name: str, probe: list[int]) -> Job:
    return {"do": "read", "name": name, "via": "transformers", "folder": folder, "ids": probe, "bits": None}


def distances(folder: Path, probe: list[int], answers: dict[str, Any]) -> dict[str, Any]:
    """Of one checkpoint: each program's distance from the twin, or what went wrong; and GPTQModel's weights."""
    twin = logits_of(answers, twin_of(folder).name)
    found: dict[str, Any] = {"folovllm": distance(our_logits(folder, probe), twin)}
    for via in LOADERS:
        name = f"{folder.name}/{via}"
        found[via] = answers["errors"].get(name) or distance(logits_of(answers, name), twin)
        if name in answers["results"]:
            found["weights"] = max(found.get("weights", 0.0), answers["results"][name]["weights"]["difference"])
            found["layers"] = answers["results"][name]["weights"]["layers"]
    return found


def logits_of(answers: dict[str, Any], name: str) -> torch.Tensor:
    assert name not in answers["errors"], f"transformers does not load a plain checkpoint: {answers['errors'][name]}"
    logits: torch.Tensor = torch.load(answers["results"][name]["logits"])
    return logits


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference, in units of the reference's standard deviation."""
    return float((logits - reference).abs().max() / reference.std())


def our_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """[n, vocab_size], computed in fp32 from the packed weights."""
    from folovllm.attention.backend import AttentionMetadata
    from folovllm.forward_context import set_forward_context
    from folovllm.model_executor.model_loader import load_model
    from folovllm.quantize.layerwise import bind_no_cache

    arch = load_hf_config(folder)
    model = load_model(folder, arch, torch.float32, torch.device("cpu"), quantization="auto")
    bind_no_cache(model, arch)
    with torch.inference_mode(), set_forward_context(AttentionMetadata.single_sequence(len(token_ids))):
        hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)))
        return model.compute_logits(hidden).float()


def table_row(case: str, by: str, found: dict[str, Any], limit: float) -> dict[str, Any]:
    """`equal`: each program's logits within the bound, GPTQModel's weights the same to the last bit."""
    equal = all(isinstance(found[via], float) and found[via] <= limit for via in ("folovllm", *LOADERS))
    same = found.get("weights") == 0.0
    shown = {
        via: f"{found[via]:.1e}" if isinstance(found[via], float) else found[via] for via in ("folovllm", *LOADERS)
    }
    writer = {"ours": "folovllm", "theirs": "gptqmodel"}[by]
    weights = "same" if same else f"{found['weights']:.1e}" if "weights" in found else "-"
    return {"case": case, "written_by": writer, "weights": weights, **shown, "equal": "yes" if equal and same else "no"}


def print_report(report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"\nlargest distance of a logit from the twin's, in standard deviations, at most {report['bound']:.1e}")
    print(f"(without GPTQ the programs differ by {report['plain_distance']:.1e}); {versions}\n")
    for row in report["results"]:
        shown = ", ".join(f"{via} {row[via]}" for via in ("folovllm", *LOADERS))
        print(f"{row['case']:<24} by {row['written_by']:<10} weights {row['weights']}; {shown}; equal: {row['equal']}")


# --- The other environment --------------------------------------------------------------------------------------------


def ensure_environment() -> None:
    """Made once: a virtual environment that finds this one's packages and has GPTQModel besides."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = ENVIRONMENT / "lib" / version / "site-packages"
        (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = subprocess.run([python, "-c", "import gptqmodel, optimum"], capture_output=True)
    if found.returncode != 0:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(f"torch=={torch.__version__.partition('+')[0]}\n")  # another torch would be gigabytes
            constraints.flush()
            subprocess.run([python, "-m", "pip", "install", "-c", constraints.name, *PACKAGES], check=True)


def ask_gptqmodel(jobs: list[Job], scratch: Path, threads: int) -> dict[str, Any]:
    """Run `jobs` in the other environment, in one process: its import alone takes ten seconds."""
    order, path = scratch / "jobs.json", scratch / "answers.json"
    order.write_text(json.dumps({"jobs": jobs, "answers": path, "threads": threads}, default=str))
    # GPTQModel waits for a free worker within a worker: with no more workers than cores, two, it waits forever.
    # It also compiles its layers, which takes minutes and changes no logits.
    env = os.environ | {"GPTQMODEL_CPU_WORKERS": "8", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([str(ENVIRONMENT / "bin" / "python"), str(CHILD), str(order)], check=True, env=env, cwd=scratch)
    answers: dict[str, Any] = json.loads(path.read_text())
    return answers


if __name__ == "__main__":
    sys.exit(main())
