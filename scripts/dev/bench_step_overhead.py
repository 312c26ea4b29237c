"""What a step of the engine costs beside the model: Python and numpy around a forward pass that does nothing.

Milestone: M2. vLLM counterpart: none. The persistent input batch is there so that this cost does not grow with the
length of the prompts: a row is copied when a request joins, and a step touches only what changed. The bench runs decode
steps of 32 requests of 100 and of 4,000 tokens through LLMEngine.step, with a model whose forward pass returns zeros,
and takes away the time of forward pass, logits and sampler. What remains is scheduling, input preparation, bookkeeping
and output processing. The attention backend's `prepare` is off while that is measured, and timed in steps of its own:
torch_naive lists the slots of every sequence there, which grows with the context as attention itself does (and pushes
all other data out of the processor's cache, so it cannot merely be subtracted).

Steps of the different lengths take turns, so that the machine's other work hits all of them alike.

    python scripts/dev/bench_step_overhead.py [--requests 32] [--lengths 100,4000] [--steps 300] [--json OUT]
"""

import argparse
import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.layer import Attention
from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.options import numbers
from folovllm.benchmarks.report import write_json
from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.base import Executor
from folovllm.forward_context import get_attn_metadata
from folovllm.model_shapes import shape_architecture
from folovllm.outputs import ModelRunnerOutput
from folovllm.sample.metadata import SamplingMetadata
from folovllm.sample.sampler import Sampler, SamplerOutput
from folovllm.sampling_params import SamplingParams
from folovllm.worker.model_runner import ForwardHandle, ModelRunner

CPU = torch.device("cpu")
HIDDEN_SIZE, VOCAB_SIZE = 8, 512  # the vocabulary is that of the tiny shape
MAX_MODEL_LEN = 8192
BLOCK_SIZE = 16
LIMIT = 1.15  # the longest prompts may cost this much more than the shortest: noise, not growth


class Stopwatch:
    """Adds up the seconds spent inside `with stopwatch:`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class ZeroModel(nn.Module):
    """A CausalLM whose hidden states and logits are zero; its one attention layer is never called."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.stopwatch = stopwatch
        self.attention = Attention(num_heads=1, head_size=1, num_kv_heads=1)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        with self.stopwatch:
            selected = get_attn_metadata().logits_indices
            rows = len(input_ids) if selected is None else len(selected)
            return torch.zeros(rows, HIDDEN_SIZE)  # [num_selected, hidden_size]

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with self.stopwatch:
            return torch.zeros(len(hidden_states), VOCAB_SIZE)  # [num_rows, vocab_size]

    def attention_layers(self) -> list[Attention]:
        return [self.attention]


class TimedSampler(Sampler):
    def __init__(self, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.stopwatch = stopwatch

    def __call__(self, logits: torch.Tensor, metadata: SamplingMetadata) -> SamplerOutput:
        with self.stopwatch:
            return self.forward(logits, metadata)


class TimedBackend(TorchNaiveBackend):
    """`prepare` is timed, and off until it is wanted."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        self.stopwatch = Stopwatch()
        self.prepares = False

    def prepare(self, metadata: AttentionMetadata) -> None:
        with self.stopwatch:
            if self.prepares:
                super().prepare(metadata)


class ZeroExecutor(Executor):
    """A real ModelRunner around the ZeroModel. `stopwatch` collects what is not overhead."""

    def __init__(self, config: EngineConfig) -> None:
        self.stopwatch = Stopwatch()
        self.backend = TimedBackend(AttentionSpec(1, 1, 1, torch.float32, CPU, config.block_size))
        model, sampler = ZeroModel(self.stopwatch), TimedSampler(self.stopwatch)
        self.runner = ModelRunner(config, model, self.backend, CPU, sampler)

    def available_kv_cache_bytes(self) -> int:
        return 2**62

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self.runner.initialize_kv_cache(kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> ForwardHandle:
        return self.runner.execute(scheduler_output)

    def sample(self, handle: ForwardHandle) -> ModelRunnerOutput:
        return self.runner.sample(handle)


@dataclass(frozen=True)
class Result:
    """Microseconds per decode step."""

    requests: int
    prompt_len: int
    overhead_median: float  # step() without model, sampler and the backend's prepare
    overhead_p99: float
    prepare_median: float  # of the attention backend


def make_engine(num_requests: int) -> tuple[LLMEngine, ZeroExecutor]:
    config = EngineConfig(
        model_config=ModelConfig(max_model_len=MAX_MODEL_LEN),
        cache_config=CacheConfig(block_size=BLOCK_SIZE),
        scheduler_config=SchedulerConfig(max_num_seqs=num_requests),
    ).resolve(shape_architecture("tiny"), "cpu")
    executor = ZeroExecutor(config)
    return LLMEngine(config, executor, tokenizer=None), executor


class Runner:
    """An engine in the middle of decoding, and the times of its steps."""

    def __init__(self, num_requests: int, prompt_len: int) -> None:
        self.num_requests, self.prompt_len = num_requests, prompt_len
        self.engine, self.executor = make_engine(num_requests)
        self.overhead: list[float] = []
        self.prepare: list[float] = []
        params = SamplingParams(temperature=0.0, max_tokens=MAX_MODEL_LEN, ignore_eos=True, detokenize=False)
        for i in range(num_requests):
            self.engine.add_request(str(i), [1 + (i * 7 + k) % (VOCAB_SIZE - 1) for k in range(prompt_len)], params)
        while self.engine.stats().num_scheduled_tokens != num_requests or self.engine.stats().num_waiting:
            self.engine.step()

    def step(self) -> None:
        """One decode step, timed."""
        self.executor.stopwatch.take(), self.executor.backend.stopwatch.take()
        start = time.perf_counter()
        outputs = self.engine.step()
        seconds = time.perf_counter() - start
        assert len(outputs) == self.num_requests, "a decode step gives every request a token"
        self.overhead.append((seconds - self.executor.stopwatch.take()) * 1e6)
        self.prepare.append(self.executor.backend.stopwatch.take() * 1e6)

    def forget(self) -> None:
        self.overhead, self.prepare = [], []

    def result(self, overhead: list[float]) -> Result:
        p99 = sorted(overhead)[int(len(overhead) * 0.99)]
        median = statistics.median(overhead)
        return Result(self.num_requests, self.prompt_len, median, p99, statistics.median(self.prepare))


def measure(num_requests: int, lengths: list[int], steps: int) -> list[Result]:
    """Decode steps of all lengths in turns: warm-up, `steps` timed ones, and a few more for the backend's prepare."""
    runners = [Runner(num_requests, length) for length in lengths]
    take_turns(runners, steps // 10)
    for runner in runners:
        runner.forget()
    take_turns(runners, steps)
    overheads = [runner.overhead for runner in runners]
    for runner in runners:
        runner.forget()
        runner.executor.backend.prepares = True
    take_turns(runners, steps // 10 + 1)
    return [runner.result(overhead) for runner, overhead in zip(runners, overheads, strict=True)]


def take_turns(runners: list[Runner], steps: int) -> None:
    for _ in range(steps):
        for runner in runners:
            runner.step()


def print_table(results: list[Result]) -> None:
    print("microseconds per decode step; forward pass, logits and sampler taken away")
    print(f"{'requests':>8} {'prompt':>7} | {'overhead':>9} {'p99':>9} | {'prepare of torch_naive':>22}")
    for r in results:
        print(
            f"{r.requests:8} {r.prompt_len:7} | {r.overhead_median:9.0f} {r.overhead_p99:9.0f} "
            f"| {r.prepare_median:22.0f}"
        )
    ratio = results[-1].overhead_median / results[0].overhead_median
    verdict = "does not grow" if ratio <= LIMIT else "GROWS"
    print(f"overhead at {results[-1].prompt_len} tokens / at {results[0].prompt_len}: {ratio:.2f}: it {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=32, help="requests in the batch")
    parser.add_argument("--lengths", type=numbers, default=[100, 4000], help="prompt lengths to compare")
    parser.add_argument("--steps", type=int, default=300, help="timed steps per row")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write machine and results there")
    args = parser.parse_args()
    header = machine_header()  # first: the load average should not be ours
    torch.set_num_threads(1)
    results = measure(args.requests, sorted(args.lengths), args.steps)
    print_table(results)
    if args.json is not None:
        command = f"scripts/dev/bench_step_overhead.py --requests {args.requests} --steps {args.steps}"
        rows = [dataclasses.asdict(result) for result in results]
        write_json({"machine": header, "command": command, "unit": "us", "results": rows}, args.json)


if __name__ == "__main__":
    main()
