"""Blocks of docs/roadmap.md and docs/milestone_checklist.md, from milestones/manifest.toml and the SPECs.

Milestone: M0. vLLM counterpart: none.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

from front_index import link, table

from folovllm.milestones import LADDER, Rung

MILESTONES = Path(__file__).resolve().parents[2] / "milestones"
ACCEPTED = re.compile(r"^## Accepted as done when\n\n(.+?)\Z", re.MULTILINE | re.DOTALL)
REQUIREMENT = re.compile(r"^(?:- )?R\d+\.\d+ ", re.MULTILINE)
LINK_TARGET = re.compile(r"\]\((?!\w+:)([^()\s]+)\)")


def manifest() -> dict[str, dict[str, Any]]:
    return tomllib.loads((MILESTONES / "manifest.toml").read_text(encoding="utf-8"))


def roadmap(folder: Path) -> str:
    """Milestones with what they build on."""
    rows = []
    for rung in LADDER:
        needs = ", ".join(need.upper() for need in manifest()[rung.id]["needs"])
        switches = ", ".join(f"`{name}`" for name in list(rung.on)[:2]) + (", ..." if len(rung.on) > 2 else "")
        name = link(f"{rung.id.upper()} {rung.title}", MILESTONES / rung.id / "README.md", folder)
        rows.append((name, rung.adds, needs or "-", switches or "-", "built" if rung.built else "not built"))
    return table("milestone | adds | builds on | switches | state", rows)


def checklist(folder: Path) -> str:
    """Per milestone: how many requirements, then what else must be shown."""
    return "\n".join(section(rung, folder) for rung in LADDER)


def section(rung: Rung, folder: Path) -> str:
    spec = MILESTONES / rung.id / "SPEC.md"
    text = spec.read_text(encoding="utf-8")
    accepted = ACCEPTED.search(text)
    if accepted is None:
        raise ValueError(f"{spec.name} of {rung.id} does not close with '## Accepted as done when'")
    done, total = accepted[1].count("- [x]"), accepted[1].count("- [")
    requirements = link(f"{len(REQUIREMENT.findall(text))} requirements", spec, folder)
    head = f"## {rung.id.upper()} {rung.title}\n\n{requirements}, "
    return f"{head}and {done} of {total} points shown:\n\n{rebased(accepted[1].strip(), spec.parent, folder)}\n"


def rebased(text: str, at: Path, folder: Path) -> str:
    """`text` of a page in `at` with its relative links as they are seen from `folder`."""

    def moved(match: re.Match[str]) -> str:
        path, hash_, anchor = match[1].partition("#")
        return f"]({os.path.relpath(at / path, folder)}{hash_}{anchor})"

    return LINK_TARGET.sub(moved, text)


def size(folder: Path) -> str:
    """How large the package is: the engine, and everything else beside it."""
    package = MILESTONES.parent / "folovllm"
    beside = {"learn", "sim", "trace", "benchmarks", "entrypoints", "quantize"}
    python = [p for p in package.rglob("*.py") if "__pycache__" not in p.parts]
    engine = [p for p in python if p.relative_to(package).parts[0] not in beside and p.name != "viz.py"]
    native = [*package.glob("csrc/*.cpp"), *package.glob("csrc/*.h")]
    cells = [f"{hundreds(files):,}" for files in (engine, native, sorted(set(python) - set(engine)))]
    return (
        f"FoloVLLM's engine has about {cells[0]} lines of Python and {cells[1]} of C++, with comments and blank lines; "
        f"traces, simulator, benchmark, quantizer, commands and exercises are {cells[2]} more.\n"
    )


def hundreds(files: list[Path]) -> int:
    return round(sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) / 100) * 100
