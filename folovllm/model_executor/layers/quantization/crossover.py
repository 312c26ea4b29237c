"""From how many tokens on packed bf16 multiplies faster than 4 bits: measured on this machine, once.

Milestone: M7. vLLM counterpart: none (its tuned tables ship with it, per GPU).

4 bits are a quarter of the bytes, but each tile of 8 rows unpacks them anew: for few rows memory decides, for many the
arithmetic does. Where they cross depends on the CPU and on the sizes of the layers. The answer is kept in the user's
cache under a key of all that it depends on.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from folovllm.csrc.build import SOURCE_DIR, cpu_features

ALL_ROWS = 2**31
ROWS = (1, 2, 4, 8, 16, 32, 64)
_REPEATS = 2
_SWEEP_BYTES = 48 * 2**20  # of bf16 weights: more than caches hold, so that reading costs what it does in a model


@dataclass(frozen=True)
class Candidate:
    """A linear layer that has both: its tensors in the order of csrc/layer.cpp."""

    tensors: list[torch.Tensor]
    output_size: int
    input_size: int


def default_cache_file() -> Path:
    return Path.home() / ".cache" / "folovllm" / "gptq_crossover.json"


def find_crossover(ops: Any, layers: Sequence[Candidate], cache_file: Path | None = None) -> int:
    """The largest batch, in tokens, for which 4 bits are faster; 0: none is."""
    file = cache_file or default_cache_file()
    key, known = _cache_key(layers), _read(file)
    if key not in known:
        sweep = _one_sweep(layers)
        known[key] = largest_winner(lambda rows: _wins(ops, sweep, rows))
        _write(file, known)
    return known[key]


def largest_winner(wins: Callable[[int], bool]) -> int:
    """The last of ROWS before 4 bits lose for the first time."""
    best = 0
    for rows in ROWS:
        if not wins(rows):
            break
        best = rows
    return best


def _one_sweep(layers: Sequence[Candidate]) -> list[Candidate]:
    sweep, size = [], 0
    for layer in layers:
        sweep.append(layer)
        size += 2 * layer.output_size * layer.input_size
        if size >= _SWEEP_BYTES:
            break
    return sweep


def _wins(ops: Any, sweep: Sequence[Candidate], rows: int) -> bool:
    """Whether 4 bits take less time than bf16: the best of a few sweeps in turn, as others use the machine, too."""
    times: dict[int, list[float]] = {ALL_ROWS: [], 0: []}
    inputs = {size: torch.randn(rows, size).bfloat16() for size in {layer.input_size for layer in sweep}}
    for _ in range(_REPEATS):
        for max_rows, taken in times.items():
            start = time.perf_counter()
            for layer in sweep:
                ops.linear_mixed(inputs[layer.input_size], layer.tensors, layer.output_size, False, max_rows)
            taken.append(time.perf_counter() - start)
    return min(times[ALL_ROWS]) < min(times[0])


def _cache_key(layers: Sequence[Candidate]) -> str:
    shapes = sorted({str([tuple(t.shape) for t in layer.tensors]) for layer in layers})
    kernels = [(SOURCE_DIR / name).read_text(encoding="utf-8") for name in ("int4.cpp", "linear.cpp")]
    facts = (cpu_features(), str(torch.get_num_threads()), *kernels, *shapes)
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


def _read(file: Path) -> dict[str, int]:
    """What earlier runs measured; nothing if the file is missing or damaged."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    fits = isinstance(known, dict) and all(type(rows) is int for rows in known.values())
    return known if fits else {}


def _write(file: Path, known: dict[str, int]) -> None:
    """Appears with one rename. A cache that cannot be written costs the next start a second, not this one its life."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(known), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        pass
