"""`folovllm quantize`: makes a GPTQ checkpoint (milestone M7). vLLM leaves this to other tools."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from folovllm.entrypoints.commands.options import DebugOption, DownloadDirOption, parse_parts

if TYPE_CHECKING:
    from folovllm.quantize.output import LayerErrors

GROUP_SIZES = (32, 64, 128, -1)


def quantize(
    model: Annotated[str, typer.Argument(help="An alias, a HuggingFace folder or a HuggingFace id.")],
    out: Annotated[Path, typer.Argument(help="A new folder, or that of an interrupted run to go on with.")],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 32, 64, 128, or -1 for all.")] = 64,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Grids around zero, or from least to largest.")] = True,
    desc_act: Annotated[bool, typer.Option("--desc-act", help="Act-order: the most active inputs first.")] = False,
    static_groups: Annotated[
        bool, typer.Option("--static-groups", help="Fix all scales first; with --desc-act, for 2 and 3 bits.")
    ] = False,
    damp: Annotated[float, typer.Option(help="Damping, as a share of the Hessian's mean diagonal.")] = 0.01,
    calib: Annotated[
        str, typer.Option(metavar="FILE", help="Calibration text: a file, builtin, or hf:DATASET.")
    ] = "builtin",
    samples: Annotated[int, typer.Option(min=1, help="Calibration sequences, at most.")] = 64,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in each.")] = 512,
    method: Annotated[str, typer.Option(help="gptq, or rtn: rounding to nearest.")] = "gptq",
    checkpoint_format: Annotated[
        str | None, typer.Option(help="gptq or gptq_v2. Default: gptq if symmetric, else gptq_v2.")
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE.py:CLASS",
            help="Replace a part of the quantiser by a class of yours, e.g. quantize.gptq=mine.py:GPTQ. Repeatable.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: as many as torch chooses.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing unless it fails.")] = False,
    download_dir: DownloadDirOption = None,
    debug: DebugOption = False,
) -> None:
    """Quantise a model's linear layers with GPTQ, into a checkpoint in AutoGPTQ's format.

    \b
      folovllm quantize smollm2-135m ./gptq4         4 bits, groups of 64
      folovllm quantize smollm2-135m ./gptq3 --bits 3 --desc-act
      folovllm quantize ./my-model ./my-gptq --calib notes.txt

    Interrupted, the same command goes on after the last finished layer.
    """
    import torch

    from folovllm.gptq_config import GPTQConfig
    from folovllm.hub import find_model
    from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint

    if group_size not in GROUP_SIZES:
        raise ValueError(f"--group-size must be one of {', '.join(map(str, GROUP_SIZES))}; got {group_size}")
    config = GPTQConfig(bits, group_size, sym, desc_act, checkpoint_format or ("gptq" if sym else "gptq_v2"))
    settings = QuantizeSettings(config, method, damp, static_groups, parse_parts(part or ()))
    if threads is not None:
        torch.set_num_threads(threads)
    source = find_model(model, download_dir)
    windows = _windows(source, calib, samples, seq_len) if method == "gptq" else []
    try:
        errors = quantize_checkpoint(source, out, settings, windows, progress=not quiet)
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; the same command goes on after the last finished layer in {out}", err=True)
        raise
    if not quiet:
        typer.echo(summary(out, errors))


def summary(out: Path, errors: "list[LayerErrors]") -> str:
    """E.g. "120 linear layers in 214 s (forward passes 55%, Hessians 27%, ..), memory 693 MiB at most"."""
    from folovllm.quantize.output import LOG

    log = json.loads((out / LOG).read_text(encoding="utf-8"))
    parts = sorted(log["parts"].items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {seconds / log['seconds']:.0%}" for name, seconds in parts[:3])
    facts = f"{log['seconds']:.0f} s ({shares}), memory {log['peak_memory_bytes'] / 2**20:.0f} MiB at most"
    lines = [f"{len(errors)} linear layers in {facts}"]
    measured = [(e.error, e.rtn_error) for e in errors if e.error is not None and e.rtn_error is not None]
    if measured:
        gptq, nearest = (sum(column) / len(measured) for column in zip(*measured, strict=True))
        lines.append(f"mean error of an output {gptq:.1e}, rounding to nearest {nearest:.1e}")
    return "\n".join([*lines, f"the checkpoint is in {out}"])


def _windows(source: Path, calib: str, samples: int, seq_len: int) -> list[list[int]]:
    from folovllm.engine.tokenizer import Tokenizer
    from folovllm.quantize.text import calibration_windows, read_text

    text = read_text(calib, "calibration")
    token_ids = Tokenizer.from_folder(source).encode(text, add_special_tokens=False)
    return calibration_windows(token_ids, samples, seq_len)
