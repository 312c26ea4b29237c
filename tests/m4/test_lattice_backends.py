"""The engine on every attention backend: the same greedy tokens as `generate_naive` (R4.7).

Milestone: M4. The conformance suite shows that a backend computes attention; this shows that the engine drives it
right, with pages of every size, preemption, chunks of any length, and more requests than fit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.selector import BACKENDS, refusal
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.hf_config import load_hf_config
from tests.parity_helpers import GapNaiveModel, Job, make_engine, make_job, run_jobs

pytestmark = pytest.mark.m4

MAX_MODEL_LEN = 64
SHAPES = [(1, 30), (16, 20), (5, 24), (17, 24), (40, 24), (2, 12), (33, 8)]  # (prompt length, output tokens)
MODELS = ["llama", "llama_rope", "qwen2", "qwen3", "mistral"]  # 7:1, 4:2, 7:7, 6:2 and 8:2 heads
ENGINES: dict[str, dict[str, Any]] = {
    "contiguous": {"block_size": "max_model_len", "max_num_seqs": 3},
    "blocks of 16": {"block_size": 16, "max_num_seqs": 8},
    "blocks of 5, preempting": {"block_size": 5, "num_kv_blocks": 14, "max_num_seqs": 4},
    "slots, one at a time": {"block_size": 1, "max_num_seqs": 1, "batching": "static"},
    "budget 7": {"block_size": 16, "max_num_seqs": 4, "enable_chunked_prefill": True, "max_num_batched_tokens": 7},
    "budget 40, preempting": {
        "block_size": 5, "num_kv_blocks": 14, "max_num_seqs": 8,
        "enable_chunked_prefill": True, "max_num_batched_tokens": 40,
    },
}  # fmt: skip

MakeTiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def jobs_of(tiny_model_dir: MakeTiny) -> Callable[[str], list[Job]]:
    made: dict[str, list[Job]] = {}

    def get(name: str) -> list[Job]:
        if name not in made:
            model = GapNaiveModel(tiny_model_dir(name))
            made[name] = [make_job(model, length, count, seed) for seed, (length, count) in enumerate(SHAPES)]
        return made[name]

    return get


def skip_if_refused(name: str, folder: Path) -> None:
    arch = load_hf_config(folder)
    heads = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
    reason = refusal(name, AttentionSpec(*heads, torch.float32, torch.device("cpu"), block_size=16))
    if reason is not None:
        pytest.skip(f"{name} refuses: {reason}")


def backend_name(engine: LLMEngine) -> str:
    executor = engine.engine_core.executor
    assert isinstance(executor, UniProcExecutor)
    return executor.worker.model_runner.backend.name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", BACKENDS)
def test_same_tokens(name: str, model: str, tiny_model_dir: MakeTiny, jobs_of: Callable[[str], list[Job]]) -> None:
    skip_if_refused(name, tiny_model_dir(model))
    jobs = jobs_of(model)
    for case, args in ENGINES.items():
        engine = make_engine(tiny_model_dir(model), max_model_len=MAX_MODEL_LEN, attention_backend=name, **args)
        assert backend_name(engine) == name
        assert run_jobs(engine, jobs, late=3) == [job.tokens for job in jobs], f"{name} differs with {case}"
        assert ("preempting" in case) == (engine.stats().num_preemptions > 0)


def test_auto_gives_the_same_tokens(tiny_model_dir: MakeTiny, jobs_of: Callable[[str], list[Job]]) -> None:
    engine = make_engine(tiny_model_dir("llama"), max_model_len=MAX_MODEL_LEN, attention_backend="auto", block_size=16)
    print(f"auto took {backend_name(engine)}")
    assert backend_name(engine) != "torch_naive"
    assert run_jobs(engine, jobs_of("llama")) == [job.tokens for job in jobs_of("llama")]
