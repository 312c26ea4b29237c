"""HFArm: HuggingFace's `generate`, the baseline everybody has.

Milestone: M1. vLLM counterpart: run_hf in vllm/benchmarks/throughput.py.

One request alone is generated as it is. Several are one static batch: padded on the left to the longest prompt, decoded
until the longest output is complete; tokens beyond what a request asked for are dropped and not counted. `generate`
tells no times, so a stopping criterion that never stops notes the time of every step.
"""

import itertools
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from folovllm.benchmarks.engine_arm import Run
from folovllm.benchmarks.measure import RequestTiming, StepSample
from folovllm.benchmarks.requests import BenchRequest, Feed
from folovllm.benchmarks.task import ArmTask

PAD_TOKEN_ID = 0  # masked: any id will do


class StepClock(StoppingCriteria):
    """Called after every step with all tokens so far: notes the time and lets everybody go on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # a step is over when its kernels are
        self.times.append(time.monotonic())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)  # [batch]


class HFArm:
    """The model of `task` in HuggingFace's hands, with its own choice of attention."""

    def __init__(self, task: ArmTask) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.device = torch.device(task.device)
        model: Any = AutoModelForCausalLM.from_pretrained(task.model_path, dtype=getattr(torch, task.dtype))
        self.model = model.eval().to(self.device)
        self.model.generation_config.eos_token_id = None  # as ignore_eos=True: the length is forced
        self.model.generation_config.pad_token_id = PAD_TOKEN_ID

    def run(self, requests: list[BenchRequest]) -> Run:
        """Answer `requests` as one batch, or, where some follow others, as one batch per turn. No arrivals."""
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

    @torch.inference_mode()
    def _run_batch(self, requests: list[BenchRequest]) -> Run:
        """One call of `generate`. The clock starts before the batch is padded."""
        clock = StepClock(self.device)
        start = time.monotonic()
        ids, mask = self._pad(requests)
        num_steps = max(request.output_len for request in requests)
        output = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_steps,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # [batch, longest prompt + num_steps]
        rows = output[:, ids.shape[1] :].tolist()
        seconds = time.monotonic() - start
        assert len(clock.times) == num_steps and len(rows[0]) == num_steps, "generate stopped early"
        tokens = [row[: request.output_len] for row, request in zip(rows, requests, strict=True)]
        times = [t - start for t in clock.times]
        return Run(seconds, tokens, [_timing(r, times) for r in requests], static_batch_samples(requests, times))

    def info(self) -> dict[str, Any]:
        attention = getattr(self.model.config, "_attn_implementation", None)
        return {
            "settings": {"attn_implementation": attention, "batching": "static, padded on the left"},
            "kv_cache": None,
        }

    def _pad(self, requests: list[BenchRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, both [batch, longest prompt]."""
        longest = max(len(request.prompt_token_ids) for request in requests)
        gaps = [longest - len(request.prompt_token_ids) for request in requests]
        ids = [[PAD_TOKEN_ID] * gap + request.prompt_token_ids for gap, request in zip(gaps, requests, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


def _timing(request: BenchRequest, times: list[float]) -> RequestTiming:
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
