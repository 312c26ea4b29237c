"""Draw the pictures of docs/learn/04: the tiles that torch_flash really visits, and a roofline.

Milestone: M4. vLLM counterpart: none. No weights, a few seconds:

    python scripts/dev/draw_attention_figures.py [--out docs/learn/img]
    python scripts/dev/draw_attention_figures.py --measure     first measure this machine's two roofs again, alone on it

The tiles are written down while the backend runs; the roofs come from milestones/m4/results/roofline_cpu.json, and the
points under them are counted from the default model's configuration. What the page says about them is asserted here.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figure_files
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends.torch_flash import TorchFlashBackend
from folovllm.benchmarks.machine import machine_header, measure_bandwidth
from folovllm.benchmarks.report import write_json
from folovllm.hf_config import ModelArchitecture, parse_hf_config

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json"
ROOFS = ROOT / "milestones/m4/results/roofline_cpu.json"
H100 = (989e12, 3.35e12)  # bf16 dense, HBM3: NVIDIA's data sheet of the SXM board
BF16 = 2  # bytes
ALL, DIAGONAL, NEVER, INK = "#56B4E9", "#E69F00", "#DDDDDD", "#333333"


# ---- 04: which tiles are computed


@dataclass(frozen=True)
class Tile:
    position: int  # of its first query
    num_queries: int
    first_key: int
    num_keys: int
    masked: bool


def visited(seq_len: int, q_len: int, size: int) -> list[Tile]:
    """The tiles, of `size` x `size`, that torch_flash computes for the last q_len tokens of a sequence."""
    tiles: list[Tile] = []

    class Noting(TorchFlashBackend):
        BLOCK_Q = BLOCK_KV = size

        def mask_future(self, scores: torch.Tensor, first_key: int, position: int, num_rows: int) -> None:
            masked = first_key + scores.shape[-1] - 1 > position
            tiles.append(Tile(position, num_rows, first_key, scores.shape[-1], masked))
            super().mask_future(scores, first_key, position, num_rows)

    spec = AttentionSpec(1, 1, 4, torch.float32, torch.device("cpu"), block_size=1)
    run_one_head(Noting(spec), seq_len, q_len)
    return tiles


def run_one_head(backend: TorchFlashBackend, seq_len: int, q_len: int) -> None:
    """What TorchFlashBackend.forward does for one sequence of one head."""
    by_slot = torch.randn(2, seq_len, 1, 4)  # [2, num_slots, num_kv_heads, head_size]
    for first in range(seq_len - q_len, seq_len, backend.BLOCK_Q):
        num_rows = min(backend.BLOCK_Q, seq_len - first)
        q = torch.randn(1, num_rows, 4)  # [num_kv_heads, num_rows, head_size]
        backend.attend_tiles(q, by_slot, torch.arange(first + num_rows), first, num_rows)


def draw_tiles(path: Path) -> None:
    cases = {"a prompt of 24 tokens": (24, 24), "10 new tokens after 14": (24, 10), "one new token after 23": (24, 1)}
    figure, axes = plt.subplots(1, 3, figsize=(10, 4.3), layout="constrained")
    counts = []
    for ax, (name, (seq_len, q_len)) in zip(axes, cases.items(), strict=True):
        tiles = visited(seq_len, q_len, 4)
        counts.append(len(tiles))
        ax.add_patch(Rectangle((0, seq_len - q_len), seq_len, q_len, fc=NEVER, ec="none"))
        for tile in tiles:
            colour = DIAGONAL if tile.masked else ALL
            corner = (tile.first_key, tile.position)
            ax.add_patch(Rectangle(corner, tile.num_keys, tile.num_queries, fc=colour, ec="white", lw=1.5))
        ax.plot([seq_len - q_len, seq_len], [seq_len - q_len, seq_len], color=INK, lw=1)
        ax.set(xlim=(0, seq_len), ylim=(seq_len, 0), xlabel="position of the key", title=name)
        ax.set_aspect("equal")
    axes[0].set_ylabel("position of the query")
    assert counts == [21, 17, 6]  # 21 = 6 * 7 / 2 of 36
    figure.suptitle("Tiles of 4 x 4. Blue: every query sees every key. Orange: mask. Grey: never read", fontsize=11)
    figure_files.save(figure, path)


# ---- 04: the roofline


def step_work(arch: ModelArchitecture, num_seqs: int, q_len: int, seq_len: int) -> tuple[float, float]:
    """Operations and bytes of a step in bf16: q_len new tokens for each sequence, seq_len tokens afterwards.

    Weights once, K and V of every sequence once; activations stay in the caches.
    """
    head = arch.vocab_size * arch.hidden_size
    layers = arch.num_parameters() - head
    pairs = num_seqs * (q_len * seq_len - q_len * (q_len - 1) / 2)  # (query, key), causal
    attention = 4.0 * arch.num_hidden_layers * arch.q_size * pairs
    operations = 2.0 * num_seqs * (q_len * layers + head) + attention
    return operations, BF16 * arch.num_parameters() + num_seqs * seq_len * arch.kv_bytes_per_token(BF16)


def draw_roofline(path: Path) -> None:
    roofs = json.loads(ROOFS.read_text())
    here = (roofs["matmul_flop_per_s"], roofs["bandwidth"]["bytes_per_second"])
    arch = parse_hf_config(json.loads(SMOLLM2.read_text()))
    points = {f"decode of {n}, 256 tokens each": step_work(arch, n, 1, 256) for n in (1, 8, 32, 128)}
    points["decode of 32, 4,096 tokens each"] = step_work(arch, 32, 1, 4096)
    points["a prompt of 512"] = step_work(arch, 1, 512, 512)
    figure, ax = plt.subplots(figsize=(9, 4.4), layout="constrained")
    label = f"{roofs['machine']['cpu']}, {roofs['threads']} threads"
    for (peak, bandwidth), style, name in ((here, "-", label), (H100, "--", "H100 SXM (data sheet)")):
        knee = peak / bandwidth
        ax.plot([0.4, knee, 2000], [0.4 * bandwidth, peak, peak], style, color=INK, lw=1.3)
        ax.annotate(f"{name}: knee at {knee:.0f}", (knee, peak), (-30, 6), textcoords="offset points", fontsize=8)
    for (name, (operations, num_bytes)), marker in zip(points.items(), "osD^vP", strict=True):
        reachable = min(here[0], operations / num_bytes * here[1])
        ax.plot(operations / num_bytes, reachable, marker, markersize=8, label=f"{name}: {operations / num_bytes:.1f}")
    ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second at best")
    ax.set_title("SmolLM2-135M in bf16 under two roofs; in the legend, operations per byte", fontsize=10)
    ax.set_ylim(1e9, 4e15)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    assert [round(o / b, 1) for o, b in points.values()] == [1.0, 7.3, 20.0, 35.8, 5.4, 419.8], points
    figure_files.save(figure, path)


def measure(path: Path) -> None:
    """Memory reads as in compare_perf; the best of many bf16 products of a size that fits into the caches."""
    n = 1024
    a, b = torch.randn(2, n, n).bfloat16()
    result: dict[str, Any] = {
        "command": "scripts/dev/draw_attention_figures.py --measure",
        "machine": machine_header(),
        "threads": torch.get_num_threads(),
        "bandwidth": measure_bandwidth("cpu", 2**29),
        "matmul_flop_per_s": 2 * n**3 / best_seconds(lambda: a @ b, 200),
        "matmul": f"best of 200 bf16 products of [{n}, {n}] and [{n}, {n}]",
    }
    write_json(result, path)
    rates = result["bandwidth"]["bytes_per_second"] / 1e9, result["matmul_flop_per_s"] / 1e9
    print("{:.1f} GB/s, {:.0f} Gflop/s, load average {}".format(*rates, result["machine"]["load_average"][0]))


def best_seconds(work: Callable[[], Any], tries: int) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = figure_files.parser(__doc__)
    parser.add_argument("--measure", action="store_true", help="measure this machine's roofs first")
    args = parser.parse_args()
    if args.measure:
        measure(ROOFS)
    figure_files.draw_all({"04_tiles": draw_tiles, "04_roofline": draw_roofline}, args.out)


if __name__ == "__main__":
    main()
