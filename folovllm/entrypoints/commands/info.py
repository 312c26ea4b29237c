"""`folovllm info`: facts about this installation, about a model, or with --engine about what runs it (milestone M0).

vLLM counterpart: vllm/collect_env.py. Left out: everything that does not influence how FoloVLLM runs.
"""

import dataclasses
import json
import platform
from typing import Annotated, Any

import typer

from folovllm import __version__, milestones
from folovllm.config import DTYPE_BYTES
from folovllm.entrypoints.commands.options import DebugOption, EngineOptions, with_options


@with_options
def info(
    options: EngineOptions,
    name: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model that is here: alias, folder, id.")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine", help="Load the model and show what runs it: layers, backends, replacements.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show version, hardware, models and milestones; with MODEL, its shape and what its KV cache costs.

    \b
      folovllm info
      folovllm info smollm2-135m
      folovllm info ./my-model --json
      folovllm info --engine --preset m3
    """
    model = _one_model(name, options)
    if engine:
        facts = dataclasses.replace(options, model=model).load().describe()
    elif any(value is not None for key, value in vars(options).items() if key not in ("model", "download_dir")):
        raise ValueError("engine options say how a model is run: add --engine to see that, or leave them out")
    else:
        facts = system_facts(options.download_dir) if model is None else model_facts(model, options.download_dir)
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(_as_lines(facts)))


def _one_model(name: str | None, options: EngineOptions) -> str | None:
    if name is not None and options.model is not None:
        raise ValueError(f"the model is given twice: keep {name!r} or --model {options.model}")
    return options.model if name is None else name


def system_facts(download_dir: str | None = None) -> dict[str, Any]:
    """Returns versions, device, memory, aliases and the ladder, as plain data."""
    import psutil
    import torch

    from folovllm.csrc.levels import cpu_capabilities
    from folovllm.platforms import choose_device, default_threads, has_native_bf16

    device, memory, threads = choose_device("auto"), psutil.virtual_memory(), default_threads()
    return {
        "folovllm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": sorted(name for name, value in cpu_capabilities().items() if value is True),
        "native_bfloat16": has_native_bf16(device),
        "cpp_kernels": _kernel_facts(),
        "threads": threads.number,
        "threads_from": threads.source,
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "models": _alias_facts(download_dir),
        "milestones": [_rung_facts(rung) for rung in milestones.LADDER],
        "top_milestone": milestones.top_rung().id,
    }


def _kernel_facts() -> dict[str, Any]:
    """Returns what the C++ kernels are compiled for, and to what cpu_isa can limit them. Builds nothing."""
    from folovllm.csrc.build import compiled_for, default_cache_dir, find_library, load_ops
    from folovllm.csrc.compilers import find_compiler, how_to_install
    from folovllm.csrc.levels import levels_here

    compiler, library = find_compiler(), find_library(default_cache_dir())
    ops = None if library is None else load_ops()
    missing = "not built yet; the first engine builds them" if compiler else f"no C++ compiler: {how_to_install()}"
    return {
        "cpu_isa": levels_here(),
        "compiler": compiler,
        "library": missing if library is None else str(library),
        "compiled_for": [] if ops is None else sorted(compiled_for(ops)),
    }


def _alias_facts(download_dir: str | None) -> list[dict[str, Any]]:
    from folovllm.hub.aliases import ALIASES, alias_folder
    from folovllm.hub.fetch import is_pulled

    folders = [(alias, alias_folder(alias, download_dir)) for alias in ALIASES.values()]
    return [
        {"name": alias.name, "pulled": is_pulled(folder), "folder": str(folder), "description": alias.description}
        for alias, folder in folders
    ]


def _rung_facts(rung: milestones.Rung) -> dict[str, Any]:
    return {"id": rung.id, "title": rung.title, "built": rung.built, "adds": rung.adds}


def model_facts(model: str, download_dir: str | None = None) -> dict[str, Any]:
    """Returns shape, number of parameters and KV-cache cost of a model on this machine. The weights are not read."""
    from folovllm.hf_config import load_hf_config
    from folovllm.hub import find_model

    folder = find_model(model, download_dir)
    arch = load_hf_config(folder)
    return {
        "model": model,
        "folder": str(folder),
        **dataclasses.asdict(arch),
        "num_parameters": arch.num_parameters(),
        "kv_bytes_per_token": {dtype: arch.kv_bytes_per_token(size) for dtype, size in DTYPE_BYTES.items()},
    }


def _as_lines(facts: dict[str, Any]) -> list[str]:
    """Returns one fact per line. A list of records or sentences, or a dictionary, gets an indented line per entry."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [name, *(f"  {key:<22} {_show(key, item)}" for key, item in value.items())]
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            lines += [name, *(f"  {_record(entry)}" for entry in value)]
        elif isinstance(value, list) and any(" " in str(entry) for entry in value):
            lines += [name, *(f"  {entry}" for entry in value)]
        else:
            lines.append(f"{name:<24} {_show(name, value) or 'none'}")
    return lines


def _record(entry: dict[str, Any]) -> str:
    """E.g. "m2  Continuous batching  not built  requests join and leave at every step"."""
    if "built" in entry:
        return f"{entry['id']}  {entry['title']:<20} {'built' if entry['built'] else 'not built':<10} {entry['adds']}"
    return (
        f"{entry['name']}  {'pulled, ' + entry['folder'] if entry['pulled'] else 'not pulled'}  {entry['description']}"
    )


def _show(name: str, value: Any) -> str:
    if name.startswith("memory"):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    big = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if big else str(value)
