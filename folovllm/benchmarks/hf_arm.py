"""HFArm: HuggingFace's `generate`, the baseline that every reader has.

Milestone: M1. vLLM counterpart: run_hf in vllm/benchmarks/throughput.py.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import torch

from folovllm.benchmarks.arms import ArmTask, RequestTiming, Run, StepSample
from folovllm.benchmarks.workloads import BenchRequest, Feed
from folovllm.entrypoints.commands.hf_baseline import load_hf

PAD_TOKEN_ID = 0  # masked: any id will do


class StepClock:
    """A stopping criterion that never stops: `generate` tells no times, so this notes the time of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)  # a step ends when its kernels do
        self.times.append(time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # [batch]


class HFArm:
    """The benchmark's baseline: `generate`, with transformers' own choice of attention.

    One request alone is generated as it is. Several are one static batch: padded on the left to the longest prompt and
    decoded until the longest output is complete. Tokens beyond what a request asked for are dropped and not counted.
    """

    def __init__(self, task: ArmTask, model: Any = None) -> None:
        """With the checkpoint of `task`, or with a `model` that is there already."""
        self.model = load_hf(Path(task.model_path), task.dtype, task.device) if model is None else model

    def run(self, requests: list[BenchRequest]) -> Run:
        """Answer `requests` as one batch or, if some follow others, as one batch per turn. Arrivals are refused."""
        feed, total = Feed(requests), Run()
        if any(request.arrival for request in requests):
            raise ValueError("HuggingFace generate takes no request while it runs: use --baseline none")
        while turn := feed.due():
            assert turn[0] == len(total.tokens), "conversations go turn by turn, in the order of the requests"
            run = self._run_batch([feed.complete(index) for index in turn])
            for index, token_ids in zip(turn, run.tokens, strict=True):
                feed.answered(index, token_ids)
            total = total.then(run)
        return total

    def forget(self) -> None:
        """Nothing is kept between two calls of `generate`."""

    def info(self) -> dict[str, Any]:
        attention = getattr(self.model.config, "_attn_implementation", None)
        settings = {"attn_implementation": attention, "batching": "static, padded on the left"}
        return {"settings": settings, "kv_cache": None}

    @torch.inference_mode()
    def _run_batch(self, requests: list[BenchRequest]) -> Run:
        """One call of `generate`. The clock starts before the batch is padded."""
        from transformers import StoppingCriteriaList

        clock, start = StepClock(), time.monotonic()
        ids, mask = self._pad(requests)
        num_steps = max(request.output_len for request in requests)
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_steps,
            do_sample=False,
            pad_token_id=PAD_TOKEN_ID,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # [batch, longest prompt + num_steps]
        rows = output[:, ids.shape[1] :].tolist()
        seconds = time.monotonic() - start
        assert len(clock.times) == num_steps and len(rows[0]) == num_steps, "generate stopped early"
        tokens = [row[: request.output_len] for row, request in zip(rows, requests, strict=True)]
        times = [t - start for t in clock.times]
        timings = [timing_of(request, times) for request in requests]
        return Run(seconds, tokens, timings, static_batch_samples(requests, times))

    def _pad(self, requests: list[BenchRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, both [batch, longest prompt]."""
        longest = max(len(request.prompt_token_ids) for request in requests)
        gaps = [longest - len(request.prompt_token_ids) for request in requests]
        ids = [[PAD_TOKEN_ID] * gap + request.prompt_token_ids for gap, request in zip(gaps, requests, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)


def timing_of(request: BenchRequest, times: list[float]) -> RequestTiming:
    own = times[: request.output_len]
    gaps = [later - earlier for earlier, later in itertools.pairwise(own)]
    return RequestTiming(len(request.prompt_token_ids), request.output_len, own[0], gaps)


def static_batch_samples(requests: list[BenchRequest], times: list[float]) -> list[StepSample]:
    """What a static batch holds after each step, counted as for our engines: padding and finished rows are waste.

    Calculated, not observed. E.g. prompts of 2 and 3 tokens, 1 and 3 tokens out: after step 1 the first is finished,
    and the cache has 2 rows of 3 slots, of which 3 are of use; after step 2 it has 2 rows of 4, of which 4 are.
    """
    longest = max(len(request.prompt_token_ids) for request in requests)
    samples = []
    for step, seconds in enumerate(times, start=1):
        unfinished = [request for request in requests if request.output_len > step]
        # The newest token has no K/V yet. The cache lives until the last request is complete.
        used = sum(len(request.prompt_token_ids) + step - 1 for request in unfinished)
        reserved = len(requests) * (longest + step - 1) if unfinished else 0
        num_running = sum(request.output_len >= step for request in requests)
        samples.append(StepSample(seconds, num_running, used, reserved))
    return samples
