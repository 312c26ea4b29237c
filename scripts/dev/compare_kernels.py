"""Compares versions of the C++ kernels in one process, in turn. It tells 1 % apart on a machine that varies by 20 %.

Milestone: M4. vLLM counterpart: none. A version is a git commit or a folder with a checkout, and "+MACRO" behind it
defines a macro. Each version is compiled under a namespace of its own and runs all decoder layers of the default
model's shape, with random weights, for some sizes of decode steps and a batch of prompts. It also runs the attention of
all layers alone, whose K and V then come from memory. Before and after each round the script measures how long a word
travels from core to core and back. On a virtual machine this time changes by itself, and all other times with it, so
the rounds are sorted by it.

    python scripts/dev/compare_kernels.py main~3 main . [--seconds 60] [--json OUT]
    python scripts/dev/compare_kernels.py . .+FOLOVLLM_NO_PREFETCH          what prefetching is worth
"""

import argparse
import io
import re
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.report import write_json
from folovllm.csrc.build import build, default_cache_dir
from folovllm.model_executor.cpu.huge_pages import HugeArena, huge_zeros

ROOT = Path(__file__).resolve().parents[2]
SOURCES = "folovllm/csrc"
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 30, 576, 1536, 9, 3, 64, 16
DECODE_REQUESTS = (1, 4, 11, 20, 32)
CONTEXTS = (60, 270)  # of a step's requests, evenly spread between the two
PROMPT_LENS = (60, 114, 168, 192, 236, 270)
RUNS_PER_ROUND = 6  # of which the fastest counts
FAR_NS = 150  # a round trip between cores above this is called far
_NAMESPACES = re.compile(
    r"\bfolovllm(?=::|\s*\{)|(?<=TORCH_LIBRARY_FRAGMENT\()folovllm|(?<=TORCH_LIBRARY_IMPL\()folovllm"
    r"|(?<=torch\.classes\.)folovllm"
)

Run = Callable[[Any], torch.Tensor]  # of the operators of a version
Key = tuple[str, str, str]  # distance of the cores, case, version
Figures = dict[Key, float]  # ms


def checkout(version: str, folder: Path) -> Path:
    """The C++ sources of a commit, or of a folder with a checkout, copied into `folder`."""
    if (Path(version) / SOURCES).is_dir():
        shutil.copytree(Path(version) / SOURCES, folder / SOURCES)
    else:
        archive = subprocess.run(["git", "archive", version, SOURCES], cwd=ROOT, capture_output=True, check=False)
        if archive.returncode != 0:
            raise SystemExit(f"{version!r} is neither a folder with {SOURCES} nor a commit that has it")
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
    return folder / SOURCES


def load(version: str, namespace: str) -> Any:
    """The operators of a version, as torch.ops.<namespace>."""
    version, *macros = re.split(r"\+(?=[A-Z_]+$)", version)
    with tempfile.TemporaryDirectory() as folder:
        sources = checkout(version, Path(folder))
        for path in [*sources.glob("*.cpp"), *sources.glob("*.h")]:
            path.write_text(_NAMESPACES.sub(namespace, path.read_text(encoding="utf-8")), encoding="utf-8")
        flags = tuple(f"-D{macro}" for macro in macros)
        torch.ops.load_library(str(build(default_cache_dir(), sources, flags)))
    return getattr(torch.ops, namespace)


class Model:
    """Random weights and KV cache in huge pages, as the engine has them."""

    def __init__(self) -> None:
        arena = HugeArena()

        def packed(out_features: int, in_features: int) -> torch.Tensor:
            return arena.move((torch.randn(out_features // 32, in_features // 2, 32, 2) * 0.05).bfloat16())

        norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
        self.layers: list[dict[str, torch.Tensor]] = [
            {
                "input_layernorm": norm,
                "qkv_proj.packed": packed((HEADS + 2 * KV_HEADS) * HEAD_SIZE, HIDDEN),
                "o_proj.packed": packed(HIDDEN, HEADS * HEAD_SIZE),
                "post_attention_layernorm": norm,
                "gate_up_proj.packed": packed(2 * INTERMEDIATE, HIDDEN),
                "down_proj.packed": packed(HIDDEN, INTERMEDIATE),
            }
            for _ in range(LAYERS)
        ]
        self._calls: dict[int, Callable[..., torch.Tensor]] = {}  # by the identity of a version's operators
        num_blocks = 1 + max(DECODE_REQUESTS) * -(-CONTEXTS[1] // BLOCK_SIZE)
        shape = (LAYERS, num_blocks, KV_HEADS, 2, BLOCK_SIZE * HEAD_SIZE)
        self.kv_caches = list(huge_zeros(shape, torch.bfloat16).normal_().unbind(0))

    def decoder_of(self, ops: Any) -> Callable[..., torch.Tensor]:
        """All layers of a version: a call with (hidden, residual, cos, sin, *metadata, last rows) -> those rows."""
        if id(ops) not in self._calls:
            self._calls[id(ops)] = self._flat_call(ops) if hasattr(ops, "decoder_layers") else self._stack_call(ops)
        return self._calls[id(ops)]

    def _stack_call(self, ops: Any) -> Callable[..., torch.Tensor]:
        stack = getattr(torch.classes, ops.name).DecoderStack(HEADS, INTERMEDIATE, 1e-5, HEAD_SIZE**-0.5, 0)
        for layer in self.layers:
            stack.add_layer(layer)

        def call(hidden: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
            *rest, last = args
            rows = None if len(last) == len(hidden) else last
            out: torch.Tensor = ops.decoder_stack.default(stack, hidden, *rest[:3], self.kv_caches, *rest[3:], rows)[0]
            return out

        return call

    def _flat_call(self, ops: Any) -> Callable[..., torch.Tensor]:
        """Versions before the DecoderStack class took all weights in every step, with empty tensors between them."""
        none, weights = torch.empty(0), []
        for layer in self.layers:
            weights += [
                layer["input_layernorm"],
                layer["qkv_proj.packed"],
                none,
                none,
                none,
                layer["o_proj.packed"],
                none,
            ]
            weights += [layer["post_attention_layernorm"], layer["gate_up_proj.packed"], none]
            weights += [layer["down_proj.packed"], none]
        sizes = HEADS, INTERMEDIATE, 1e-5, HEAD_SIZE**-0.5, 0, True

        def call(*args: torch.Tensor) -> torch.Tensor:
            *rest, last = args
            out: torch.Tensor = ops.decoder_layers.default(*rest[:4], weights, self.kv_caches, *rest[4:], *sizes)
            return out if len(last) == len(out) else out[last]

        return call

    def step(self, query_lens: list[int], seq_lens: list[int]) -> Run:
        """A step of requests that compute their last query_lens tokens, as one call for all layers."""
        blocks_each = -(-max(seq_lens) // BLOCK_SIZE)
        num_reqs, num_tokens = len(seq_lens), sum(query_lens)
        table = 1 + torch.arange(num_reqs * blocks_each, dtype=torch.int32).view(num_reqs, blocks_each)
        pairs = [(r, p) for r, (q, s) in enumerate(zip(query_lens, seq_lens, strict=True)) for p in range(s - q, s)]
        slots = torch.tensor([int(table[r, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for r, p in pairs])
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        hidden = torch.randn(num_tokens, HIDDEN).bfloat16()
        cos, sin = torch.ones(num_tokens, 1, HEAD_SIZE).bfloat16(), torch.zeros(num_tokens, 1, HEAD_SIZE).bfloat16()
        metadata = slots, starts, torch.tensor(seq_lens, dtype=torch.int32), table
        last = starts[1:].long() - 1  # [num_reqs]: the rows that are read

        def run(ops: Any) -> torch.Tensor:
            return self.decoder_of(ops)(hidden, torch.zeros_like(hidden), cos, sin, *metadata, last)

        return run

    def attention(self, num_reqs: int, seq_len: int) -> Run:
        """Decode attention of all layers, one right after the other, their pages in random order."""
        blocks_each = -(-seq_len // BLOCK_SIZE)
        table = (1 + torch.randperm(num_reqs * blocks_each)).int().view(num_reqs, blocks_each)
        query = torch.randn(num_reqs, HEADS, HEAD_SIZE).bfloat16()
        metadata = torch.arange(num_reqs + 1).int(), torch.full((num_reqs,), seq_len, dtype=torch.int32), table

        def run(ops: Any) -> torch.Tensor:
            out = torch.empty_like(query)
            for cache in self.kv_caches:
                ops.paged_attention.default(out, query, cache, *metadata, HEAD_SIZE**-0.5)
            return out

        return run


def cases(model: Model) -> dict[str, Run]:
    first, last = CONTEXTS
    made = {}
    for n in DECODE_REQUESTS:
        contexts = [first + (last - first) * i // max(1, n - 1) for i in range(n)]
        made[f"decode {n}"] = model.step([1] * n, contexts)
    made[f"prompts {sum(PROMPT_LENS)}"] = model.step(list(PROMPT_LENS), list(PROMPT_LENS))
    made[f"attention {DECODE_REQUESTS[-1]}x256"] = model.attention(DECODE_REQUESTS[-1], 256)
    return made


def fastest_ms(run: Run, ops: Any) -> float:
    run(ops)
    times = []
    for _ in range(RUNS_PER_ROUND):
        start = time.perf_counter()
        run(ops)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def distance(round_trip_ns: Callable[[], float]) -> str:
    time.sleep(0.02)  # OpenMP's threads spin for a while after their work
    return "far" if round_trip_ns() > FAR_NS else "near"


def rounds(ops: dict[str, Any], runs: dict[str, Run], round_trip_ns: Callable[[], float]) -> Iterator[Figures]:
    """Every version in turn, round after round; empty when the distance of the cores has changed meanwhile."""
    order = list(ops)
    while True:
        before = distance(round_trip_ns)
        times = {(before, case, v): fastest_ms(run, ops[v]) for case, run in runs.items() for v in order}
        yield times if distance(round_trip_ns) == before else {}
        order.reverse()


def measure(
    ops: dict[str, Any], runs: dict[str, Run], round_trip_ns: Callable[[], float], seconds: float
) -> dict[Key, list[float]]:
    """The ms of each round that counts."""
    results: dict[Key, list[float]] = defaultdict(list)
    end = time.monotonic() + seconds
    for figures in rounds(ops, runs, round_trip_ns):
        for key, ms in figures.items():
            results[key].append(ms)
        if time.monotonic() >= end:
            break
    return results


def check_same(ops: dict[str, Any], runs: dict[str, Run]) -> None:
    """All versions must compute the same, up to the order of their sums."""
    reference = next(iter(ops))
    for case, run in runs.items():
        expected = run(ops[reference]).float()
        for version, operators in ops.items():
            difference = float((run(operators).float() - expected).norm() / expected.norm())
            if not difference < 0.05:
                raise SystemExit(f"{version} computes something else than {reference} on {case}: {difference:.1%} off")


def sizes_of(results: dict[Key, list[float]]) -> list[tuple[str, str]]:
    """(distance of the cores, case) in the order in which they were measured."""
    return list(dict.fromkeys((where, case) for where, case, _ in results))


def row(results: dict[Key, list[float]], where: str, case: str, versions: list[str]) -> dict[str, Any]:
    """Of each version the median of the rounds, and the fastest."""
    figures = {v: results[where, case, v] for v in versions}
    medians = {v: round(statistics.median(ms), 3) for v, ms in figures.items()}
    fastest = {f"{v} fastest": round(min(ms), 3) for v, ms in figures.items()}
    return {"cores": where, "case": case, "rounds": len(figures[versions[0]]), **medians, **fastest}


def print_table(rows: list[dict[str, Any]], versions: list[str]) -> None:
    print(
        f"{'cores':<7}{'case':<18}{'rounds':>7}" + "".join(f"{v[:20]:>22}" for v in versions) + "   median (fastest) ms"
    )
    for r in rows:
        cells = [f"{r[v]:.2f} ({r[f'{v} fastest']:.2f})" for v in versions]
        print(f"{r['cores']:<7}{r['case']:<18}{r['rounds']:>7}" + "".join(f"{cell:>22}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description="Versions of the C++ kernels in one process, in turn.")
    parser.add_argument(
        "versions", nargs="+", help="git commits, or folders with a checkout ('.'), each with or without +MACRO"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to alternate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine, probe = machine_header(), load(str(ROOT), "folovllm_probe").core_round_trip_ns
    ops = {v: load(v, f"folovllm_{i}") for i, v in enumerate(args.versions)}
    with torch.inference_mode():
        runs = cases(Model())
        check_same(ops, runs)
        results = measure(ops, runs, probe, args.seconds)
    rows = [row(results, where, case, args.versions) for where, case in sizes_of(results)]
    print_table(rows, args.versions)
    if args.json:
        command = f"scripts/dev/compare_kernels.py {' '.join(args.versions)} --seconds {args.seconds:g}"
        report = {"command": command, "unit": "ms", "machine": machine, "threads": args.threads, "results": rows}
        write_json(report, args.json)


if __name__ == "__main__":
    main()
