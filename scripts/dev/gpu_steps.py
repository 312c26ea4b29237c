"""Where a decode step waits: the GPU's idle time within and between steps, its synchronisations, its longest kernels.

Milestone: M4. vLLM counterpart: vllm's --profile option (torch.profiler). The last rung runs the shapes of
gpu_ladder.py with random weights. All requests decode; the first steps are not counted. Medians per step:

    step_ms           wall time, without the profiler, which slows the host down
    gpu_busy_ms       time in which a kernel or a copy runs, from torch.profiler. CUDA graphs and a faster host could
                      save what step_ms has more than this
    between_steps_ms  from a step's last kernel to the first one of the next step, with the profiler running
    kernels, copies   launched per step; waits: calls of the CUDA runtime that wait for the GPU
    sync_warnings     per step, as torch.cuda.set_sync_debug_mode("warn") counts; their places are in `places`

    python scripts/dev/gpu_steps.py [--device cuda|cpu] [--out DIR]
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gpu_ladder import SIZES, TOP, Entry, Loaded
from gpu_result import Case, Options, Result, Row, parse_options
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from folovllm.benchmarks.arms import EngineArm
from folovllm.engine.llm_engine import LLMEngine
from folovllm.sampling_params import RequestOutputKind, SamplingParams

BATCHES = {"cuda": (1, 32, 256), "cpu": (1, 3)}  # of the small shape; of the large one, a batch of 1
STEPS = {"cuda": 30, "cpu": 5}  # of each measurement
WARM_UP_STEPS, PROMPT_TOKENS = 5, 16
STEP = "engine step"
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
NUM_LONGEST = 12


@contextmanager
def decoding_requests(engine: LLMEngine, count: int, num_tokens: int) -> Iterator[None]:
    """`count` requests that decode while the body of `with` runs, and are aborted after it."""
    params = SamplingParams(
        temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    names = [f"steps-{count}-{index}" for index in range(count)]
    for index, name in enumerate(names):
        tokens = [100 + (index + place) % 100 for place in range(PROMPT_TOKENS)]
        engine.add_request(name, {"prompt_token_ids": tokens}, params)
    for _ in range(count + num_tokens):  # enough steps to admit all, if the KV cache has room for them
        if engine.stats().num_running == count:
            break
        engine.step()
    else:
        engine.abort_request(names)
        raise MemoryError(f"the KV cache is too small for {count} requests at once")
    for _ in range(WARM_UP_STEPS):
        engine.step()
    try:
        yield
    finally:
        engine.abort_request(names)


def measure(shape: str, count: int, options: Options, loaded: Loaded, content: dict[str, Any]) -> list[Row]:
    entry = Entry(shape, TOP, "steps")
    arm, num_steps = loaded.get(entry), STEPS[options.device]
    assert isinstance(arm, EngineArm)
    engine, name = arm.engine, name_of(shape, count)
    with decoding_requests(engine, count, 4 * num_steps + 2 * WARM_UP_STEPS):
        step_ms = statistics.median(timed_step(engine) for _ in range(num_steps))
        places = sync_places(engine, num_steps) if options.device == "cuda" else Counter[str]()
        events = profiled_steps(engine, num_steps, options.device)
    content["places"][name] = dict(places.most_common())
    content["longest"][name] = longest(events, num_steps)
    row: Row = {"case": name, "step_ms": round(step_ms, 3)} | step_figures(events)
    return [row | {"sync_warnings": round(places.total() / num_steps, 2)}]


def name_of(shape: str, count: int) -> str:
    return f"{shape} batch {count}"


def timed_step(engine: LLMEngine) -> float:
    """Milliseconds. A step ends with the sampled ids on the host, so nothing of it still runs on the GPU."""
    start = time.perf_counter()
    engine.step()
    return 1e3 * (time.perf_counter() - start)


def sync_places(engine: LLMEngine, num_steps: int) -> Counter[str]:
    """File and line of every operation that waited for the GPU, as far as torch notices."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(num_steps):
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))


def profiled_steps(engine: LLMEngine, num_steps: int, device: str) -> list[Any]:
    """The profiler's events of `num_steps` steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(num_steps):
            with record_function(STEP):
                engine.step()
    return list(profiler.events())


# ---- from events to figures


def is_work(event: Any) -> bool:
    """A kernel or a copy on the GPU; without a GPU, an operator of torch's that no other one has called."""
    if event.name == STEP:
        return False  # the profiler repeats it on the GPU's line
    if event.device_type == DeviceType.CUDA:
        return True
    parent = event.cpu_parent
    return event.name.startswith("aten::") and not (parent and parent.name.startswith("aten::"))


def work_of(events: Sequence[Any]) -> list[Any]:
    """What computes: on a machine with a GPU, only what runs there."""
    work = [event for event in events if is_work(event)]
    on_gpu = [event for event in work if event.device_type == DeviceType.CUDA]
    return sorted(on_gpu or work, key=lambda event: event.time_range.start)


def step_figures(events: Sequence[Any]) -> Row:
    """Medians over the steps."""
    steps = sorted(
        (e.time_range.start, e.time_range.end) for e in events if e.name == STEP and e.device_type == DeviceType.CPU
    )
    work = work_of(events)
    by_step = [[event for event in work if start <= event.time_range.start < end] for start, end in steps]
    by_step = [found for found in by_step if found]
    spans = [(found[0].time_range.start, max(e.time_range.end for e in found)) for found in by_step]
    gaps = [after[0] - before[1] for before, after in pairwise(spans)]
    inside = (e for e in events if any(start <= e.time_range.start < end for start, end in steps))
    waits = sum(event.name in WAITS for event in inside) / max(len(steps), 1)
    return {
        "gpu_busy_ms": median_ms([busy(found) for found in by_step]),
        "between_steps_ms": median_ms(gaps),
        "kernels": statistics.median(sum(not is_copy(e) for e in found) for found in by_step),
        "copies": statistics.median(sum(is_copy(e) for e in found) for found in by_step),
        "waits": round(waits, 2),
    }


def is_copy(event: Any) -> bool:
    return event.name.startswith(("Memcpy", "Memset"))


def busy(work: Sequence[Any]) -> float:
    """Microseconds in which at least one of `work`, which is sorted by its start, runs."""
    total, until = 0.0, 0.0
    for event in work:
        start, end = max(event.time_range.start, until), event.time_range.end
        if end > start:
            total, until = total + end - start, end
    return total


def median_ms(microseconds: Sequence[float]) -> float:
    return round(statistics.median(microseconds) / 1e3, 4)


def longest(events: Sequence[Any], num_steps: int) -> list[Row]:
    """The kernels with the most time per step."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in work_of(events):
        times[event.name].append(event.time_range.end - event.time_range.start)
    most = sorted(times.items(), key=lambda item: -sum(item[1]))[:NUM_LONGEST]
    return [
        {"kernel": name[:120], "per_step": round(len(us) / num_steps, 2), "us_per_step": round(sum(us) / num_steps, 2)}
        for name, us in most
    ]


def main() -> int:
    options = parse_options(__doc__ or "")
    result = Result("steps", "ms per step", options, ("step_ms", "gpu_busy_ms", "kernels", "waits", "sync_warnings"))
    for table in ("places", "longest"):
        result.content.setdefault(table, {})
    with tempfile.TemporaryDirectory() as folder:
        loaded = Loaded(options, SIZES[options.device], Path(folder))
        cases = [(loaded.sizes.small, count) for count in BATCHES[options.device]] + [(loaded.sizes.large, 1)]
        return result.run(
            [
                Case(name_of(*case), partial(measure, *case, options, loaded, result.content))
                for case in dict.fromkeys(cases)
            ]
        )


if __name__ == "__main__":
    sys.exit(main())
