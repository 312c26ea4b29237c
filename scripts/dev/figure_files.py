"""Writing the pictures of docs/learn: their resolution and their command line.

Milestone: M2. vLLM counterpart: none. Imported by scripts/dev/draw_*_figures.py, which say what is drawn.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from folovllm.benchmarks import plot

ROOT = Path(__file__).resolve().parents[2]
DPI = 100


def save(figure: Any, path: Path, data: Any = None) -> None:
    """Writes the PNG. `data`, the measured numbers that it shows, leaves a hash in the file, which a test compares."""
    plot.save(figure, path, DPI, None if data is None else hash_of(data))
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


def hash_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def parser(doc: str) -> argparse.ArgumentParser:
    """With `--out`; the first line of `doc` is the description."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--out", type=Path, default=ROOT / "docs/learn/img", help="folder for the PNG files")
    return made


def draw_all(figures: Mapping[str, Callable[[Path], None]], out: Path) -> None:
    """Each figure by its name, into `out`/NAME.png."""
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        draw(out / f"{name}.png")
