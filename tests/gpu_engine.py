"""An engine on a GPU that is not there: `LLM` builds it as on a machine that has one."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.worker.model_runner import ModelRunner
from tests.fake_gpu import FakeGpu, fake_gpu, pretend_cuda
from tests.fake_kernels import Launch, check_launches

MAX_MODEL_LEN = 256


@dataclass
class Machine:
    """Valid inside of `gpu_machine`."""

    gpu: FakeGpu
    launches: list[Launch]

    def llm(self, folder: Path, **args: Any) -> LLM:
        args = {"max_model_len": MAX_MODEL_LEN, "skip_tokenizer_init": True, "device": "auto"} | args
        llm = LLM(str(folder), **args)
        assert llm.config.device == "cuda"
        return llm

    def kernels(self) -> list[str]:
        """The names of the kernels that were launched since the last call, in order."""
        names = [launch.kernel for launch in self.launches]
        self.launches.clear()
        return names


@contextlib.contextmanager
def gpu_machine(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu | None = None) -> Iterator[Machine]:
    """`gpu` is one that was used before: tensors of another cannot be used."""
    pretend_cuda(monkeypatch)
    launches = check_launches(monkeypatch)
    with fake_gpu(monkeypatch, gpu) as gpu:
        yield Machine(gpu, launches)


def add(llm: LLM, request_id: str, num_tokens: int, **params: Any) -> None:
    """Adds a request with a prompt of `num_tokens` tokens."""
    params = {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "detokenize": False} | params
    prompt = {"prompt_token_ids": list(range(3, 3 + num_tokens))}
    llm.llm_engine.add_request(request_id, prompt, SamplingParams(**params))


def step(llm: LLM) -> None:
    llm.llm_engine.step()


def finish(llm: LLM) -> None:
    while llm.llm_engine.has_unfinished_requests():
        step(llm)
    llm.llm_engine.engine_core.scheduler.check_integrity()


def runner_of(llm: LLM) -> ModelRunner:
    executor: Any = llm.llm_engine.engine_core.executor
    runner: ModelRunner = executor.worker.model_runner
    return runner
