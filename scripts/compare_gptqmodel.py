"""Beside GPTQModel: what we write it loads with equal logits, what it writes we load, and whose perplexity is lower.

Milestone: M7. vLLM counterpart: tests/quantization. GPTQModel lives in an environment of its own, in the user's cache,
which sees the packages of this one; nothing is installed into this one. The model is cut to its first layers unless
--layers 0, so that a run takes a minute.

    python scripts/compare_gptqmodel.py [--model smollm2-135m] [--layers 2] [--perplexity] [--json OUT]

The reference is transformers on the dequantised twin: the weights as *we* read them, in a plain checkpoint. Beside it
stand the logits of this engine, of GPTQModel's loader and of transformers' (which calls GPTQModel), all in fp16.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = Path.home() / ".cache" / "folovllm" / "gptqmodel-env"
PACKAGES = ("gptqmodel", "optimum")  # transformers asks for optimum before it loads a GPTQ checkpoint
CASES: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4},
    "4 bits, act-order": {"bits": 4, "desc_act": True},
    "4 bits, asymmetric, v2": {"bits": 4, "sym": False, "checkpoint_format": "gptq_v2"},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2, "group_size": 32},
    "8 bits, per channel": {"bits": 8, "group_size": -1},
}
# Of logits, in units of their standard deviation: a logit of 20 in fp16 has steps of 4e-3 of them, and sums in another
# order cost one or two. Zeros off by one were seen to cost 12, the groups of k_proj alone off by one 0.3.
EQUAL = 3e-2
Job = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.child is not None:
        run_child(args.child)
        return
    ensure_environment()
    with tempfile.TemporaryDirectory() as scratch:
        report = compare(args, Path(scratch))
    print_report(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if not all(row["equal"] for row in report["rows"]):
        raise SystemExit("some logits differ")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=2, help="keep only so many; 0: all")
    parser.add_argument("--cases", default="", help=f"numbers of {', '.join(CASES)}, e.g. 1,2 (default: all)")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument(
        "--perplexity", action="store_true", help="of every checkpoint, on the built-in evaluation text"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# --- The comparison, in this environment ------------------------------------------------------------------------------


def compare(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from folovllm.entrypoints.bench.machine import machine_header
    from folovllm.hub import resolve_model

    source = cut_model(resolve_model(args.model), scratch / "source", args.layers)
    windows, probe = token_windows(source, args)
    chosen = [int(number) - 1 for number in args.cases.split(",") if number] or range(len(CASES))
    cases = {name: CASES[name] for i, name in enumerate(CASES) if i in chosen}
    folders = {name: scratch / f"case{i}" for i, name in enumerate(cases)}
    for name, folder in folders.items():
        quantize_ours(source, folder / "ours", cases[name], windows)
    errors = ask_gptqmodel(quantize_jobs(cases, folders, source, windows), scratch, args.threads)["errors"]
    written = {folder: name for name in cases for folder in (folders[name] / "ours", folders[name] / "theirs")}
    refused = {folder: errors.get(str(folder)) or write_twin(folder) for folder in written}
    jobs = [job for folder, name in written.items() if not refused[folder] for job in logits_jobs(folder, name, probe)]
    answers = ask_gptqmodel(jobs, scratch, args.threads)
    rows = [
        {"case": name, "written_by": folder.name, "equal": False, "error": refused[folder]}
        if refused[folder]
        else row_of(name, folder, probe, answers, args.perplexity)
        for folder, name in written.items()
    ]
    settings = {"model": args.model, "layers": args.layers, "samples": len(windows), "seq_len": args.seq_len}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_header(),
        "versions": answers["versions"],
        "settings": settings,
        "rows": rows,
    }


def cut_model(source: Path, out: Path, layers: int) -> Path:
    """A copy of the model with its first `layers` layers."""
    import shutil

    from safetensors.torch import save_file

    from folovllm.model_executor.weight_utils import iterate_weights, safetensors_files

    if layers == 0:
        return source
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    gone = tuple(f"model.layers.{i}." for i in range(layers, 1000))
    weights = iterate_weights(safetensors_files(source))
    kept = {name: tensor for name, tensor in weights if not name.startswith(gone)}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config |= {"num_hidden_layers": layers} | (
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


def quantize_ours(source: Path, out: Path, case: dict[str, Any], windows: list[list[int]]) -> None:
    from folovllm.gptq_config import GPTQConfig
    from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint

    settings = QuantizeSettings(GPTQConfig(**{"group_size": 64, **case}))
    quantize_checkpoint(source, out, settings, windows, progress=False)


def write_twin(folder: Path) -> str | None:
    """`folder`-twin, in fp16; or why we do not read `folder`."""
    from folovllm.quantize.dequantized import write_dequantized

    try:
        write_dequantized(folder, twin_of(folder), "float16")
    except ValueError as error:
        return f"we do not read it: {error}"
    return None


def twin_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-twin")


def quantize_jobs(
    cases: dict[str, dict[str, Any]], folders: dict[str, Path], source: Path, windows: list[list[int]]
) -> list[Job]:
    return [
        {
            "do": "quantize",
            "source": source,
            "folder": folders[name] / "theirs",
            "case": {"group_size": 64, **case},
            "windows": windows,
        }
        for name, case in cases.items()
    ]


def logits_jobs(folder: Path, name: str, probe: list[int]) -> list[Job]:
    common = {"do": "logits", "ids": probe, "bits": CASES[name]["bits"]}
    jobs = [common | {"folder": folder, "via": via} for via in ("gptqmodel", "transformers")]
    return [*jobs, common | {"folder": twin_of(folder), "via": "transformers"}]


def row_of(name: str, folder: Path, probe: list[int], answers: dict[str, Any], perplexity: bool) -> dict[str, Any]:
    """One checkpoint: each program's logits beside the twin's."""
    results: dict[str, torch.Tensor | str] = {"folovllm": our_logits(folder, probe)}
    for via in ("gptqmodel", "transformers"):
        results[via] = answer_of(answers, folder, via)
    twin = answer_of(answers, twin_of(folder), "transformers")
    assert isinstance(twin, torch.Tensor), f"transformers does not load a plain checkpoint: {twin}"
    distances = {via: r if isinstance(r, str) else distance(r, twin) for via, r in results.items()}
    equal = all(isinstance(d, float) and d < EQUAL for d in distances.values())
    row = {"case": name, "written_by": folder.name, "equal": equal, "distance": distances}
    return row | ({"perplexity": our_perplexity(folder)} if perplexity else {})


def answer_of(answers: dict[str, Any], folder: Path, via: str) -> torch.Tensor | str:
    """Logits, or what went wrong."""
    key = f"{folder}/{via}"
    return answers["errors"][key] if key in answers["errors"] else torch.load(answers["logits"][key])


def distance(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference, in units of the reference's standard deviation."""
    return float((logits - reference).abs().max() / reference.std())


def our_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """[n, vocab_size] fp32, computed in fp16 from the packed weights."""
    from folovllm.forward_context import set_forward_context
    from folovllm.hf_config import load_hf_config
    from folovllm.model_executor.model_loader import load_model
    from folovllm.quantize.layerwise import bind_no_cache, single_sequence

    arch = load_hf_config(folder)
    model = load_model(folder, arch, torch.float16, torch.device("cpu"), quantization="auto")
    bind_no_cache(model, arch, torch.float16)
    with torch.inference_mode(), set_forward_context(single_sequence(len(token_ids))):
        hidden = model(torch.tensor(token_ids), torch.arange(len(token_ids)))
        return model.compute_logits(hidden).float()


def our_perplexity(folder: Path) -> float:
    from folovllm.engine.tokenizer import Tokenizer
    from folovllm.quantize.perplexity import engine_scorer, measure_perplexity
    from folovllm.quantize.text import builtin_text

    token_ids = Tokenizer.from_folder(folder).encode(builtin_text("evaluation"), False)
    return measure_perplexity(engine_scorer(folder), token_ids, window=1024, stride=512).perplexity


def print_report(report: dict[str, Any]) -> None:
    print(f"\nlargest difference from the twin's logits, in standard deviations; {report['versions']}")
    for row in report["rows"]:
        if "error" in row:
            print(f"{row['case']:<26} written by {row['written_by']:<7} {row['error']}")
            continue
        shown = ", ".join(f"{k} {v if isinstance(v, str) else f'{v:.1e}'}" for k, v in row["distance"].items())
        perplexity = f"  perplexity {row['perplexity']:.4f}" if "perplexity" in row else ""
        print(f"{row['case']:<26} written by {row['written_by']:<7} {shown}{perplexity}")


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
    order = scratch / "jobs.json"
    order.write_text(json.dumps({"jobs": jobs, "answers": str(scratch / "answers.json")}, default=str))
    # GPTQModel waits for a free worker within a worker: with no more workers than cores, two, it waits for ever.
    # It also compiles its layers, which takes minutes and changes no logits.
    env = os.environ | {"GPTQMODEL_CPU_WORKERS": "8", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    python = ENVIRONMENT / "bin" / "python"
    command = [str(python), str(Path(__file__).resolve()), "--child", str(order), "--threads", str(threads)]
    subprocess.run(command, check=True, env=env, cwd=scratch)
    answers: dict[str, Any] = json.loads((scratch / "answers.json").read_text())
    return answers


def run_child(order: Path) -> None:
    """In the other environment, where folovllm is not imported. A job that fails is noted, and the rest go on."""
    import gptqmodel
    import transformers

    content = json.loads(order.read_text())
    versions = {
        "gptqmodel": gptqmodel.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    answers: dict[str, Any] = {"versions": versions, "logits": {}, "errors": {}}
    for number, job in enumerate(content["jobs"]):
        where = job["folder"] if job["do"] == "quantize" else f"{job['folder']}/{job['via']}"
        try:
            if job["do"] == "quantize":
                child_quantize(job)
            else:
                path = order.with_name(f"logits{number}.pt")
                torch.save(child_logits(job), path)
                answers["logits"][where] = str(path)
        except Exception as error:
            answers["errors"][where] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    Path(content["answers"]).write_text(json.dumps(answers))


def child_logits(job: Job) -> torch.Tensor:
    if job["via"] == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(job["folder"], device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    else:
        from transformers import AutoModelForCausalLM, GPTQConfig

        # Left alone it chooses torch's int4 kernel, which rounds differently; this is its reference.
        quantized = "quantization_config" in json.loads((Path(job["folder"]) / "config.json").read_text())
        choice = {"quantization_config": GPTQConfig(bits=job["bits"], backend="gptq_torch")} if quantized else {}
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float16, device_map="cpu", **choice)
    with torch.inference_mode():
        return model(torch.tensor([job["ids"]])).logits[0].float()


def child_quantize(job: Job) -> None:
    """With GPTQModel's defaults but for what both have: bits, groups, order, damping, calibration."""
    from gptqmodel import GPTQModel, QuantizeConfig

    case = dict(job["case"])
    form = case.pop("checkpoint_format", "gptq")
    # Act-order within groups is its own improvement, on by default; off, both run the same algorithm.
    config = QuantizeConfig(**case, format=form, damp_percent=0.01, act_group_aware=False)
    model = GPTQModel.load(job["source"], config)
    windows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in job["windows"]]
    model.quantize(windows, batch_size=1)
    model.save(job["folder"])


if __name__ == "__main__":
    main()
