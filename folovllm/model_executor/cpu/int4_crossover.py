"""From how many tokens on packed bf16 multiplies faster than 4 bits: measured on this machine, once.

Milestone: M7. vLLM counterpart: none (its tuned tables ship with it, per GPU).

4 bits are a quarter of the bytes, but each tile of 6 rows unpacks them anew: for few rows memory decides, for many the
arithmetic does. Where they cross depends on the CPU and on the sizes of the layers. The answer is kept in the user's
cache under a key of all that it depends on. Other programs may be at work meanwhile, so every layer is timed by itself,
and the best of its times counts: few of a tenth of a millisecond are interrupted.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from folovllm.csrc.build import SOURCE_DIR, cpu_features
from folovllm.model_executor.cpu.int4_weight import Int4Part

ALL_ROWS = 2**31
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_REPEATS = 3
_MAX_SECONDS = 1.0
GUESS = 8  # what two AMD cores with AVX-512 VNNI measured
_SWEEP_BYTES = 96 * 2**20  # of bf16 weights: more than caches hold, so that reading costs what it does in a model


Candidate = tuple[Int4Part, int]  # a linear layer that has 4 bits and bf16, and its input size


def default_cache_file() -> Path:
    return Path.home() / ".cache" / "folovllm" / "gptq_crossover.json"


class _TooBusy(Exception):
    """Other programs leave this one too little time to measure in."""


def find_crossover(ops: Any, layers: Sequence[Candidate], cache_file: Path | None = None) -> int:
    """The largest batch, in tokens, for which 4 bits are faster; 0: none is. GUESS if that cannot be measured now."""
    file = cache_file or default_cache_file()
    key, known = _cache_key(ops, layers), _read(file)
    if key in known:
        return known[key]
    sweep, deadline = _one_sweep(layers), time.perf_counter() + _MAX_SECONDS
    try:
        known[key] = largest_winner(lambda rows: _wins(ops, sweep, rows, deadline))
    except _TooBusy:
        return GUESS  # and the next start tries again
    _write(file, known)
    return known[key]


def largest_winner(wins: Callable[[int], bool]) -> int:
    """The last of ROWS before 4 bits lose twice in a row: once may be chance."""
    best = losses = 0
    for rows in ROWS:
        if wins(rows):
            best, losses = rows, 0
            continue
        losses += 1
        if losses == 2:
            break
    return best


def _one_sweep(layers: Sequence[Candidate]) -> list[Candidate]:
    sweep, size = [], 0
    for part, input_size in layers:
        sweep.append((part, input_size))
        size += 2 * part.output_size * input_size
        if size >= _SWEEP_BYTES:
            break
    return sweep


def _wins(ops: Any, sweep: Sequence[Candidate], rows: int, deadline: float) -> bool:
    """Whether 4 bits take less time than bf16 for all layers together."""
    inputs = {size: torch.randn(rows, size).bfloat16() for size in {size for _, size in sweep}}
    best = {ALL_ROWS: [math.inf] * len(sweep), 0: [math.inf] * len(sweep)}  # seconds, by max_int4_rows
    for _ in range(_REPEATS):
        for i, (part, size) in enumerate(sweep):
            for max_rows, times in best.items():
                start = time.perf_counter()
                part.multiply(ops, inputs[size], False, max_rows)
                times[i] = min(times[i], time.perf_counter() - start)
            if start > deadline:
                raise _TooBusy
    return sum(best[ALL_ROWS]) < sum(best[0])


def _cache_key(ops: Any, layers: Sequence[Candidate]) -> str:
    shapes = sorted({str([tuple(t.shape) for t in part.tensors.values()]) for part, _ in layers})
    sources = sorted([*SOURCE_DIR.glob("int4*"), *SOURCE_DIR.glob("linear*")])
    kernels = [source.read_text(encoding="utf-8") for source in sources]
    facts = (cpu_features(), ops.name, str(torch.get_num_threads()), *kernels, *shapes)
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
