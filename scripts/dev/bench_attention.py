"""Attention alone: time and peak memory of each backend against context length, in prefill and in decode.

Milestone: M4. vLLM counterpart: benchmarks/kernels/benchmark_paged_attention.py. Layers of the default model's shape
(9 query heads on 3 KV heads of 64) on pages of 16 in random order. Figures are for `forward` of one layer; `prepare`,
which runs once per step for all layers, stands beside it. Backends take turns within a case, and the median of the
rounds counts.

Prefill runs one layer. Decode runs a step: one layer after the other, each with its own K and V (30 layers, fewer where
they would be more than 256 MiB). It is held against reading its K/V once. Right before each step 0.5 GiB are read and
timed: so K and V must come from memory, not from a cache, and are held against what memory gives in that moment (on a
virtual machine it may change by half from one minute to the next). That read leaves not even Python's code in a cache,
for which the step's first layer pays; its time stands beside the mean of all.

Peak memory is what torch's allocator handed out during one `forward`, over what was there before, from the events of
torch.profiler: the output is in it (9 MiB of bf16 at 8,192 tokens), and buffers inside fused operators, but not what
a kernel allocates by other means.

    python scripts/dev/bench_attention.py [--backends torch_naive,torch_flash] [--threads 2] [--json OUT] [--plot OUT]
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; else its profiler talks on stderr

import torch
from torch.profiler import ProfilerActivity, profile

from folovllm.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec
from folovllm.attention.selector import BACKENDS, load_backend, refusal
from folovllm.benchmarks.machine import MemoryReader, machine_header, measure_bandwidth
from folovllm.benchmarks.options import positive
from folovllm.benchmarks.report import write_json
from folovllm.model_executor.cpu.huge_pages import huge_zeros

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 9, 3, 64, 16
PREFILL_LENS = (256, 512, 1024, 2048, 4096, 8192)
DECODE_BATCH, DECODE_LENS = 32, (256, 512, 1024, 2048, 4096)
MAX_LAYERS, MAX_STEP_BYTES = 30, 2**28
BANDWIDTH_BYTES = 2**29
SECONDS_PER_CASE = 6.0  # a backend stops after this, or after --repeats rounds
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """num_reqs sequences of seq_len tokens, of which the last q_len are new."""

    name: str
    num_reqs: int
    seq_len: int
    q_len: int

    @property
    def flops(self) -> float:
        """Of the two products: 2 for each visible (query, key) pair, head and element."""
        visible = self.q_len * (2 * self.seq_len - self.q_len + 1) / 2
        return 4.0 * self.num_reqs * visible * NUM_HEADS * HEAD_SIZE

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """K and V of one layer."""
        return 2 * self.num_reqs * self.seq_len * NUM_KV_HEADS * HEAD_SIZE * dtype.itemsize

    def num_layers(self, dtype: torch.dtype) -> int:
        return min(MAX_LAYERS, max(2, MAX_STEP_BYTES // self.kv_bytes(dtype))) if self.q_len == 1 else 1

    @property
    def naive_bytes(self) -> int:
        """Scores and their softmax, fp32, and the mask; of one request, as torch_naive goes one by one."""
        return self.q_len * self.seq_len * (2 * 4 * NUM_HEADS + 1)


@dataclass(frozen=True)
class Result:
    case: str
    backend: str
    seq_len: int
    num_layers: int
    prepare_ms: float
    forward_ms: float  # per layer, the mean of a step's
    first_ms: float  # of them the first
    peak_mib: float
    gflops_per_s: float
    kv_gb_per_s: float
    times_kv_read: float | None  # a step over reading its K/V once from memory, median of pairs; of decode only
    rounds: int


CASES = [
    *(Case(f"prefill {n}", 1, n, n) for n in PREFILL_LENS),
    *(Case(f"decode {DECODE_BATCH}x{n}", DECODE_BATCH, n, 1) for n in DECODE_LENS),
]


class Setup:
    """A backend with filled caches, one per layer, and the inputs of a case, ready to run."""

    def __init__(self, name: str, case: Case, dtype: torch.dtype) -> None:
        self.name, self.case = name, case
        spec = spec_of(dtype)
        self.backend: AttentionBackend = load_backend(name)(spec)
        generator = torch.Generator().manual_seed(0)
        blocks_each = -(-case.seq_len // BLOCK_SIZE)
        num_blocks = 1 + case.num_reqs * blocks_each
        order = 1 + torch.randperm(num_blocks - 1, generator=generator)
        self.block_table = order.view(case.num_reqs, blocks_each).int()  # [num_reqs, blocks_each]
        self.num_layers = case.num_layers(dtype)
        shape = (self.num_layers, *self.backend.kv_cache_shape(num_blocks))
        self.caches = huge_zeros(shape, dtype).unbind(0)  # as the worker has them
        shape = (case.num_reqs * case.seq_len, NUM_KV_HEADS, HEAD_SIZE)
        key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        history = self.metadata(case.seq_len)
        self.backend.prepare(history)
        for cache in self.caches:
            self.backend.write(key, value, cache, history)
        self.query = torch.randn(case.num_reqs * case.q_len, NUM_HEADS, HEAD_SIZE, generator=generator).to(dtype)
        self.prepare_seconds: list[float] = []
        self.forward_seconds: list[float] = []  # per layer
        self.first_seconds: list[float] = []
        self.times_kv_read: list[float] = []  # of decode only

    def metadata(self, q_len: int) -> AttentionMetadata:
        """A step that computes the last q_len tokens of every sequence."""
        case = self.case
        positions = torch.arange(case.seq_len - q_len, case.seq_len)  # [q_len]
        block_ids = self.block_table[:, positions // BLOCK_SIZE].long()  # [num_reqs, q_len]
        return AttentionMetadata(
            query_start_loc=list(range(0, case.num_reqs * q_len + 1, q_len)),
            seq_lens=[case.seq_len] * case.num_reqs,
            block_table=self.block_table,
            slot_mapping=(block_ids * BLOCK_SIZE + positions % BLOCK_SIZE).flatten(),
            block_size=BLOCK_SIZE,
        )

    def run(self) -> torch.Tensor:
        """A step; what its last layer returns."""
        metadata = self.metadata(self.case.q_len)
        marks = [time.perf_counter()]
        self.backend.prepare(metadata)
        marks.append(time.perf_counter())
        for cache in self.caches:
            output = self.backend.forward(self.query, cache, metadata)
            marks.append(time.perf_counter())
        start, prepared, first, *_ = marks
        self.prepare_seconds.append(prepared - start)
        self.first_seconds.append(first - prepared)
        self.forward_seconds.append((marks[-1] - prepared) / self.num_layers)
        return output

    def run_from_memory(self, memory: MemoryReader, dtype: torch.dtype) -> None:
        """A step whose K and V are in no cache, and how many times as long as a plain read of them it took."""
        bytes_per_second = memory.read()
        self.run()
        self.times_kv_read.append(self.forward_seconds[-1] * bytes_per_second / self.case.kv_bytes(dtype))

    def forget_runs(self) -> None:
        for seconds in (self.prepare_seconds, self.first_seconds, self.forward_seconds):
            seconds.clear()

    def peak_bytes(self) -> int:
        metadata = self.metadata(self.case.q_len)
        self.backend.prepare(metadata)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.backend.forward(self.query, self.caches[0], metadata)
        return peak_of(profiler)

    def wants_more(self, repeats: int) -> bool:
        seconds = self.num_layers * sum(self.forward_seconds)
        return len(self.forward_seconds) < repeats and seconds < SECONDS_PER_CASE

    def result(self, peak_bytes: int, dtype: torch.dtype) -> Result:
        forward = statistics.median(self.forward_seconds)
        return Result(
            case=self.case.name,
            backend=self.name,
            seq_len=self.case.seq_len,
            num_layers=self.num_layers,
            prepare_ms=round(1e3 * statistics.median(self.prepare_seconds), 4),
            forward_ms=round(1e3 * forward, 4),
            first_ms=round(1e3 * statistics.median(self.first_seconds), 4),
            peak_mib=round(peak_bytes / MIB, 2),
            gflops_per_s=round(self.case.flops / forward / 1e9, 2),
            kv_gb_per_s=round(self.case.kv_bytes(dtype) / forward / 1e9, 3),
            times_kv_read=round(statistics.median(self.times_kv_read), 2) if self.times_kv_read else None,
            rounds=len(self.forward_seconds),
        )


def spec_of(dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, dtype, torch.device("cpu"), BLOCK_SIZE)


def peak_of(profiler: Any) -> int:
    """The most bytes that were held at once, from the allocator's events: +n when n bytes are taken, -n when freed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def skip_reason(name: str, case: Case, dtype: torch.dtype) -> str | None:
    if name == "torch_naive" and case.naive_bytes > psutil.virtual_memory().available / 2:
        return f"{case.name}: would take {case.naive_bytes / MIB:,.0f} MiB, more than half of what is free"
    return refusal(name, spec_of(dtype))


def run_case(case: Case, names: list[str], dtype: torch.dtype, repeats: int, memory: MemoryReader) -> list[Result]:
    setups = [Setup(name, case, dtype) for name in names]
    outputs = [setup.run() for setup in setups]  # the first run is not timed: kernels load, caches fill
    for name, output in zip(names, outputs, strict=True):
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=0.05, msg=f"{name} differs on {case.name}")
    peaks = [setup.peak_bytes() for setup in setups]
    for setup in setups:
        setup.forget_runs()
    while waiting := [setup for setup in setups if setup.wants_more(repeats)]:
        for setup in waiting:
            if case.q_len == 1:
                setup.run_from_memory(memory, dtype)
            else:
                setup.run()
    return [setup.result(peak, dtype) for setup, peak in zip(setups, peaks, strict=True)]


def print_table(results: list[Result]) -> None:
    print(
        f"{'case':<16}{'backend':<14}{'prepare ms':>11}{'forward ms':>11}{'first ms':>10}{'peak MiB':>10}{'GFLOP/s':>9}"
        f"{'KV GB/s':>9}{'x read KV':>11}"
    )
    for r in results:
        read = "" if r.times_kv_read is None else f"{r.times_kv_read:.2f}"
        print(
            f"{r.case:<16}{r.backend:<14}{r.prepare_ms:>11.2f}{r.forward_ms:>11.3f}{r.first_ms:>10.3f}{r.peak_mib:>10.1f}"
            f"{r.gflops_per_s:>9.1f}{r.kv_gb_per_s:>9.2f}{read:>11}"
        )


def plot(report: dict[str, Any], path: Path) -> None:
    """Time and memory of prefill, and time of decode, against context length; both axes logarithmic."""
    from folovllm.benchmarks.plot import plt, save

    results = [Result(**result) for result in report["results"]]
    prefill, decode = ([r for r in results if kind in r.case] for kind in ("prefill", "decode"))
    figure, axes = plt.subplots(1, 3, figsize=(17, 5.2), layout="constrained")
    figure.suptitle(title_of(report), fontsize=10)
    plot_lines(axes[0], prefill, "forward_ms", "Prefill: ms per layer", "tokens of the prompt")
    plot_lines(axes[1], prefill, "peak_mib", "Prefill: peak memory per layer, MiB", "tokens of the prompt")
    plot_lines(axes[2], decode, "forward_ms", f"Decode of {DECODE_BATCH} requests: ms per layer", "tokens of context")
    annotate_memory(axes[1], prefill)
    read = {r.seq_len: r.forward_ms / r.times_kv_read for r in decode if r.times_kv_read}
    axes[2].plot(list(read), list(read.values()), "k--", linewidth=1, label="reading its K/V once")
    axes[2].legend(fontsize=8)
    save(figure, path)


def plot_lines(ax: Any, results: list[Result], key: str, title: str, xlabel: str) -> None:
    """One line per backend."""
    lengths = sorted({r.seq_len for r in results})
    for name in dict.fromkeys(r.backend for r in results):
        points = [(r.seq_len, getattr(r, key)) for r in results if r.backend == name]
        ax.plot(*zip(*points, strict=True), marker="o", ms=4, label=name)
    ax.set(xscale="log", yscale="log", title=title, xlabel=xlabel)
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.xaxis.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def annotate_memory(ax: Any, prefill: list[Result]) -> None:
    """How much less flash holds than naive, at the longest prompt that both ran."""
    peaks = {(r.backend, r.seq_len): r.peak_mib for r in prefill}
    both = [n for name, n in peaks if name == "torch_naive" and ("torch_flash", n) in peaks]
    if both:
        naive, flash = (peaks[name, max(both)] for name in ("torch_naive", "torch_flash"))
        ax.annotate("", (max(both), flash), (max(both), naive), arrowprops={"arrowstyle": "->", "color": "black"})
        text = f"{naive / flash:,.0f}x less"
        ax.annotate(text, (max(both), (naive * flash) ** 0.5), (-6, 0), textcoords="offset points", ha="right")


def title_of(report: dict[str, Any]) -> str:
    machine = report["machine"]
    before, after = machine["load_average"][0], report["load_average_after"][0]
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    return (
        f"Attention of one layer, {NUM_HEADS}/{NUM_KV_HEADS} heads of {HEAD_SIZE}, {report['dtype']}, blocks of "
        f"{BLOCK_SIZE}, {machine['cpu']}, {threads}, load average {before} before the run and {after} after"
    )


def backend_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BACKENDS]:
        raise argparse.ArgumentTypeError(f"no backend is called {', '.join(unknown)}; there are {', '.join(BACKENDS)}")
    return names


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and peak memory of the attention backends on a CPU.")
    parser.add_argument("--backends", type=backend_names, default=list(BACKENDS), help="names, separated by commas")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=positive, default=7, help="rounds, the median of which counts")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw them to this PNG")
    return parser.parse_args()


def command_of(args: argparse.Namespace) -> str:
    """What was run, without where its results went."""
    backends = "" if args.backends == list(BACKENDS) else f" --backends {','.join(args.backends)}"
    numbers = f"--dtype {args.dtype} --threads {args.threads} --repeats {args.repeats}"
    return f"scripts/dev/bench_attention.py{backends} {numbers}"


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    dtype, machine = DTYPES[args.dtype], machine_header()
    bandwidth, memory = measure_bandwidth("cpu", BANDWIDTH_BYTES), MemoryReader("cpu", BANDWIDTH_BYTES)
    results: list[Result] = []
    skipped: dict[str, str] = {}
    for case in CASES:
        reasons = {name: skip_reason(name, case, dtype) for name in args.backends}
        skipped |= {name: reason for name, reason in reasons.items() if reason is not None}
        with torch.inference_mode():
            wanted = [name for name, why in reasons.items() if why is None]
            results += run_case(case, wanted, dtype, args.repeats, memory)
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_of(args),
        "unit": "ms",
        "machine": machine,
        "load_average_after": [round(load, 2) for load in psutil.getloadavg()],
        "dtype": args.dtype,
        "threads": args.threads,
        "bandwidth": bandwidth,
        "skipped": skipped,
        "results": [asdict(result) for result in results],
    }
    print(title_of(report))
    print_table(results)
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    if args.json:
        write_json(report, args.json)
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
