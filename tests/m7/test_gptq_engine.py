"""GPTQ checkpoints in the engine: greedy tokens of `cpu_int4` are those of the dequantised weights, whatever is on.

Milestone: M7. In fp32 the two differ only by the order of sums, and the jobs keep clear of ties (tests/parity_helpers):
a different token is a bug (R7.23).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends.cpu_paged import CpuPagedBackend
from folovllm.config import EngineConfig, KernelConfig, QuantizationConfig
from folovllm.csrc.build import load_ops
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.hf_config import load_hf_config
from folovllm.milestones import get_rung
from folovllm.model_executor.cpu import int4_crossover
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.cpu.int4_kernel import Int4LinearMethod
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.quantization.gptq import GPTQLinearMethod
from folovllm.model_executor.model_loader import load_model
from tests.m4.test_decoder_stack import BLOCK_SIZE, MODULE_BY_MODULE, NUM_BLOCKS, ON, STEPS, CountOps, run
from tests.m7.quant_helpers import FAMILIES, make_quantizable, quantize
from tests.pairwise import pairwise
from tests.parity_helpers import GapNaiveModel, Job, make_engine, make_job, run_jobs

pytestmark = pytest.mark.m7

MAX_MODEL_LEN = 64
SHAPES = [(1, 20), (16, 16), (37, 16), (2, 12), (21, 8)]  # (prompt length, output tokens)
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "Llama": {"desc_act": True},
    "Qwen2": {"sym": False, "bits": 3, "group_size": -1},
    "Qwen3": {"sym": False, "checkpoint_format": "gptq_v2"},
}
SWITCHES: dict[str, list[Any]] = {
    "linear_backend": ["auto", "torch", "onednn"],
    "gptq_kernel": ["auto", "cpu_int4", "dequant"],
    "gptq_runtime": ["auto", "memory", "speed"],
    "attention_backend": ["cpu_paged", "torch_naive", "torch_flash"],
    "block_size": [16, 5, "max_model_len"],
    "enable_prefix_caching": [True, False],
    "num_kv_blocks": [None, "tiny"],  # tiny: one request fits, so others are preempted
    "max_num_seqs": [4, 1],
    "max_num_batched_tokens": [7, None],  # 7: prompts in chunks
}


@pytest.fixture(scope="module", autouse=True)
def _needs_ops() -> None:
    if load_ops() is None:
        pytest.skip("no C++ kernels here")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured with two layers of 64 inputs is not for the user's cache."""
    monkeypatch.setattr(int4_crossover, "default_cache_file", lambda: tmp_path / "crossover.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = quantize(make_quantizable(family, folder / "plain"), folder / "gptq", **CHECKPOINTS[family])
        return made[family]

    return get


@pytest.fixture(scope="module")
def jobs_of(checkpoint: Callable[[str], Path]) -> Callable[[str], list[Job]]:
    made: dict[str, list[Job]] = {}

    def get(family: str) -> list[Job]:
        if family not in made:
            model = GapNaiveModel(checkpoint(family))  # weights dequantised while they are loaded
            made[family] = [make_job(model, length, count, seed) for seed, (length, count) in enumerate(SHAPES)]
        return made[family]

    return get


def gptq_engine(folder: Path, **args: Any) -> LLMEngine:
    return make_engine(folder, max_model_len=MAX_MODEL_LEN, quantization="auto", **args)


def linears_of(engine: LLMEngine) -> list[LinearBase]:
    executor = engine.engine_core.executor
    assert isinstance(executor, UniProcExecutor)
    model: Any = executor.worker.model_runner.model
    return [m for name, m in model.named_modules() if isinstance(m, LinearBase) and name != "lm_head"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_the_dequantised_weights(family: str, checkpoint: Any, jobs_of: Any) -> None:
    jobs = jobs_of(family)
    engine = gptq_engine(checkpoint(family), block_size=16, **get_rung("m4").on)
    assert {type(layer.quant_method) for layer in linears_of(engine)} == {Int4LinearMethod}
    assert run_jobs(engine, jobs, late=2) == [job.tokens for job in jobs]


@pytest.mark.parametrize("case", pairwise(SWITCHES), ids=str)
def test_it_goes_with_every_other_switch(case: dict[str, Any], checkpoint: Any, jobs_of: Any) -> None:
    family = list(FAMILIES)[len(str(case)) % len(FAMILIES)]
    jobs, args = jobs_of(family), dict(case)
    if case["num_kv_blocks"] == "tiny":
        block_size = MAX_MODEL_LEN if case["block_size"] == "max_model_len" else case["block_size"]
        args["num_kv_blocks"] = -(-MAX_MODEL_LEN // block_size) + 1  # and the null block
    engine = gptq_engine(checkpoint(family), enable_chunked_prefill=case["max_num_batched_tokens"] is not None, **args)
    kernel = case["gptq_kernel"]
    dequantises = kernel == "dequant" or (kernel == "auto" and case["linear_backend"] != "auto")
    method = GPTQLinearMethod if dequantises else Int4LinearMethod
    assert {type(layer.quant_method) for layer in linears_of(engine)} == {method}
    assert run_jobs(engine, jobs, late=2) == [job.tokens for job in jobs]


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_without_packed_weights(family: str, checkpoint: Any, jobs_of: Any) -> None:
    """quantization="dequantize", the engine before M7: the same checkpoint, the same tokens."""
    engine = make_engine(checkpoint(family), max_model_len=MAX_MODEL_LEN, block_size=16)
    assert run_jobs(engine, jobs_of(family)) == [job.tokens for job in jobs_of(family)]


def test_what_nothing_is_fast_with_is_dequantised(checkpoint: Any, tmp_path: Path) -> None:
    """8 bits: cpu_int4 cannot, and `dequant` would unpack all weights in every step. One warning, and plain layers."""
    folder = quantize(checkpoint("Llama").parent / "plain", tmp_path / "gptq8", bits=8)
    job = make_job(GapNaiveModel(folder), 16, 12, 0)
    with pytest.warns(UserWarning, match="dequantised while they are loaded, as cpu_int4 holds up to 4 bits, not 8"):
        engine = gptq_engine(folder, block_size=16, linear_backend="auto")
    assert not {GPTQLinearMethod, Int4LinearMethod} & {type(layer.quant_method) for layer in linears_of(engine)}
    assert run_jobs(engine, [job]) == [job.tokens]
    packed = gptq_engine(folder, block_size=16, linear_backend="auto", gptq_runtime="memory")
    assert {type(layer.quant_method) for layer in linears_of(packed)} == {GPTQLinearMethod}
    assert run_jobs(packed, [job]) == [job.tokens]


# ---- A whole layer as one call


def build(folder: Path, runtime: str, dtype: torch.dtype, kernels: KernelConfig) -> tuple[Any, Any]:
    arch, cpu = load_hf_config(folder), torch.device("cpu")
    model = load_model(
        folder, arch, dtype, cpu, linear_backend="auto", quantization="auto", gptq_kernel="cpu_int4",
        gptq_runtime=runtime,
    )  # fmt: skip
    heads = (arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim)
    backend = CpuPagedBackend(AttentionSpec(*heads, dtype, cpu, BLOCK_SIZE))
    model.model.layers[0].mlp.down_proj.quant_method.kernel.max_int4_rows = 8
    accelerate(model, backend, kernels)
    for layer in model.attention_layers():
        layer.bind(backend, torch.zeros(backend.kv_cache_shape(NUM_BLOCKS), dtype=dtype))
    return model, backend


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("runtime", ["memory", "speed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_is_equal_to_many(family: str, runtime: str, dtype: torch.dtype, checkpoint: Any) -> None:
    """Biases, norms of heads, act-order; steps on both sides of the crossover."""
    fused, fused_backend = build(checkpoint(family), runtime, dtype, ON)
    plain, plain_backend = build(checkpoint(family), runtime, dtype, MODULE_BY_MODULE)
    assert fused.model.decoder_stack is not None and plain.model.decoder_stack is None
    for step in STEPS:
        with CountOps() as counted:
            got = run(fused, fused_backend, step)
        assert len(counted.names) == 2  # all layers, and the last norm
        assert torch.equal(got, run(plain, plain_backend, step))


# ---- Arguments


def test_arguments_are_checked() -> None:
    assert QuantizationConfig("auto", "cpu_int4", "memory").gptq_runtime == "memory"
    with pytest.raises(ValueError, match="gptq_kernel must be one of auto, dequant, cpu_int4, triton; got 'marlin'"):
        QuantizationConfig("auto", "marlin")
    with pytest.raises(ValueError, match=r"gptq_runtime must be one of .*; did you mean 'memory'"):
        QuantizationConfig("auto", gptq_runtime="memry")
    with pytest.raises(ValueError, match="gptq_runtime needs packed weights: set quantization='auto'"):
        EngineConfig.from_args(preset="m6", gptq_runtime="memory")
    assert EngineConfig.from_args(gptq_runtime="memory").quantization_config.quantization == "auto"
