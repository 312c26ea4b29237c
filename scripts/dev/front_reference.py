"""Blocks of docs/quick_reference.md: engine arguments, sampling parameters, commands, and parts, read from the code.

Milestone: M0. vLLM counterpart: none (its argument tables are made from the docstrings of its config classes).
The meaning of an argument is the comment behind its field, so code and page say the same.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import typer
from front_files import first_sentence
from front_index import link, table

from folovllm import config
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.field_comments import field_comments
from folovllm.milestones import LADDER, fold, top_rung
from folovllm.parts import PARTS

ROOT = Path(__file__).resolve().parents[2]
NOT_AN_ARGUMENT = {"architecture"}
SHOWN_FOR_ALL = "m1"  # all milestones have the same commands below `folovllm learn`
REPEATED = re.compile(rf"^learn (?!{SHOWN_FOR_ALL} )m\d+(?! race)")


def in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def code(value: Any) -> str:
    return f"`{value!r}`".replace("'", '"')


# ---- engine arguments


def engine_arguments(folder: Path) -> str:
    """One table per part of EngineConfig. The default is that of the newest engine, as `LLM(model)` builds it."""
    groups = [*config.CONFIG_GROUPS.values(), config.EngineConfig]
    return "\n".join(f"**{heading(cls)}**\n\n{table_of(cls)}" for cls in groups)


def heading(cls: Any) -> str:
    """E.g. "ModelConfig: Which model and tokenizer, in which precision, how long."."""
    if cls is config.EngineConfig:
        return "EngineConfig: the rest."
    return f"{cls.__name__}: {first_sentence(cls.__doc__ or '')}"


def table_of(cls: Any) -> str:
    meanings = field_comments(cls)
    fields = [f for f in dataclasses.fields(cls) if f.name not in {*NOT_AN_ARGUMENT, *config.CONFIG_GROUPS}]
    silent = [f.name for f in fields if not meanings[f.name]]
    if silent:
        raise ValueError(f"folovllm/config.py: no comment behind {', '.join(silent)}; the quick reference shows it")
    rows = ((f"`{f.name}`", default_of(f), milestone_of(f.name), in_cell(meanings[f.name])) for f in fields)
    return table("argument | default | switched by | meaning", rows)


def default_of(field: "dataclasses.Field[Any]") -> str:
    return code(fold(top_rung().id).get(field.name, field.default))


def milestone_of(name: str) -> str:
    """The rung that switches the argument on, and its value without that rung. E.g. "M5 (off: `False`)"."""
    rungs = [rung for rung in LADDER if name in rung.off and rung.off[name] != rung.on[name]]
    return ", ".join(f"{rung.id.upper()} (off: {code(rung.off[name])})" for rung in rungs)


# ---- sampling parameters, commands, parts


def sampling_parameters(folder: Path) -> str:
    from folovllm.sampling_params import RequestOutputKind, SamplingParams

    meanings = field_comments(SamplingParams)
    rows = []
    for field in dataclasses.fields(SamplingParams):
        default = f"`{field.default}`" if isinstance(field.default, RequestOutputKind) else code(field.default)
        if not meanings[field.name]:
            raise ValueError(f"folovllm/sampling_params.py: no comment behind {field.name}")
        rows.append((f"`{field.name}`", default, in_cell(meanings[field.name])))
    return table("parameter | default | meaning", rows)


def commands(folder: Path) -> str:
    """Every command and subcommand of `folovllm` with the first sentence of its help."""
    found = commands_below(typer.main.get_command(app))
    rows = [(f"`folovllm {name}`", in_cell(first)) for name, first in found if not REPEATED.search(name)]
    rows = [(name.replace(f" {SHOWN_FOR_ALL} ", " mN "), first) for name, first in rows]
    return table("command | does", rows)


def targets(folder: Path) -> str:
    """The targets of the Makefile, with the text behind ##."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := re.match(r"([a-z-]+):.*## (.+)", line))]
    return table("target | does", ((f"`make {m[1]}`", m[2]) for m in found))


def commands_below(group: Any, before: str = "") -> list[tuple[str, str]]:
    found = []
    for name, command in group.commands.items():
        if command.hidden:
            continue
        text = (command.help or "").partition("\n\n")[0].replace("\n", " ").strip()
        found.append((before + name, text))
        found += commands_below(command, f"{before}{name} ") if hasattr(command, "commands") else []
    return found


def parts(folder: Path) -> str:
    rows = []
    for part in PARTS.values():
        module, _, name = part.default.partition(":")
        file = ROOT / f"{module.replace('.', '/')}.py"
        rows.append((f"`{part.name}`", link(f"`{name}`", file, folder), ", ".join(f"`{m}`" for m in part.methods)))
    return table("part | default class | methods that a replacement has", rows)
