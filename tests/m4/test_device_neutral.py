"""Does everything that an engine does stay on its device? Asked without a GPU (R4.30).

Milestone: M4. `LLM` builds each engine for "cuda", as on a machine with a GPU, and runs steps of every kind: a whole
prompt, a chunk, a decode. The GPU's tensors have no values (tests/fake_gpu.py), and our Triton kernels are not run:
their launches are checked (tests/fake_kernels.py). What the kernels compute is the subject of test_triton_paged.py.

The last part runs on "meta", where several threads can run at once (tests/m9/test_parallel_worker.py).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from folovllm import LLM, transfers
from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends import flash_attn
from folovllm.attention.selector import load_backend
from folovllm.config import EngineConfig, KernelConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.distributed.communicator import Communicator, ParallelGroups
from folovllm.engine.start_core import resolve_config
from folovllm.hf_config import load_hf_config
from folovllm.milestones import engine_rungs
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.layers.quantization import triton_gptq
from folovllm.model_executor.model_loader import load_model
from folovllm.sample.sampler import Sampler
from folovllm.worker.model_runner import ModelRunner
from folovllm.worker.profile_run import largest_step
from folovllm.worker.worker import Worker
from tests.fake_gpu import GPU, FakeGpu, OneDevice
from tests.gpu_engine import Machine, add, finish, gpu_machine, runner_of, step
from tests.m7.quant_helpers import make_quantizable, quantize
from tests.m9.parallel_models import make_parallel
from tests.parity_helpers import make_config
from tests.tiny_models import TINY_MODELS

pytestmark = pytest.mark.m4

META = torch.device("meta")
REPLACED = ("linear_backend", "fused_ops", "fused_mlp", "decoder_stack", "sampler_backend")
PRESETS = [rung.id for rung in engine_rungs()]
BACKENDS = ("torch_naive", "torch_sdpa", "torch_flash", "triton_paged", "flash_attn")

MakeTiny = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def models(tiny_model_dir: MakeTiny) -> None:
    """Makes them before there seems to be a GPU."""
    for name in TINY_MODELS:
        tiny_model_dir(name)


@pytest.fixture(scope="module")
def parallel_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parallel("qwen3", tmp_path_factory.mktemp("parallel"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with gpu_machine(monkeypatch) as machine:
        yield machine


def run(llm: LLM) -> None:
    """Prompts of one token, of several blocks and of several chunks, alone and beside others, to their ends."""
    check_devices(llm)
    add(llm, "long", 60, max_tokens=2)
    step(llm)
    add(llm, "one", 1, max_tokens=2)
    add(llm, "short", 20, max_tokens=2)
    finish(llm)


def check_devices(llm: LLM) -> None:
    runner = runner_of(llm)
    model: Any = runner.model
    tensors = [*model.parameters(), *model.buffers(), model.model.rotary_emb.cos_sin, runner.kv_caches]
    assert {tensor.device for tensor in tensors} == {GPU}
    worker: Any = llm.llm_engine.engine_core.executor
    replaced = [item.switch for item in worker.worker.replacements if item.after is not None]
    assert set(replaced) <= {"sampler_backend"}, "the rest is for CPUs"


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset: str, machine: Machine, tiny_model_dir: MakeTiny) -> None:
    """With the profile run, which says how much memory is left for the cache."""
    chunked = {} if preset in ("m1", "m2", "m3", "m4") else {"max_num_batched_tokens": 32}
    llm = machine.llm(tiny_model_dir("qwen3"), preset=preset, **chunked)
    run(llm)
    textbook = preset in ("m1", "m2", "m3")
    assert runner_of(llm).backend.name == ("torch_naive" if textbook else "triton_paged")
    assert set(machine.kernels()) == (
        set() if textbook else {"write_kernel", "chunk_kernel", "single_kernel", "merge_kernel"}
    )


@pytest.mark.parametrize("model", TINY_MODELS)
def test_every_architecture(model: str, machine: Machine, tiny_model_dir: MakeTiny) -> None:
    run(machine.llm(tiny_model_dir(model), dtype="bfloat16", num_kv_blocks=40, max_num_batched_tokens=32))


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend(name: str, machine: Machine, tiny_model_dir: MakeTiny) -> None:
    """FlashAttention's operator is torch's own: it checks its arguments and computes nothing."""
    page = 16
    if name == "flash_attn":
        if flash_attn.find_kernel() is not flash_attn.call_torch:
            pytest.skip("torch < 2.12")
        page = flash_attn.page_multiple()
    llm = machine.llm(
        tiny_model_dir("mistral"), attention_backend=name, dtype="bfloat16", num_kv_blocks=40, block_size=page,
        max_num_batched_tokens=32,
    )  # fmt: skip
    run(llm)
    runner = runner_of(llm)
    assert runner.backend.name == name
    with machine.gpu.step() as account:
        runner.backend.copy_blocks(runner.kv_caches, [(1, 2), (2, 3)])
    assert (account.waits, account.up) == (0, [])


def test_random_weights(machine: Machine, tiny_model_dir: MakeTiny) -> None:
    run(machine.llm(tiny_model_dir("qwen2"), load_format="dummy", dtype="float16"))


def pack_as(dtype: type, device: str | None = None) -> Callable[..., list[torch.Tensor]]:
    return lambda lists, own_device, own_dtype: transfers.to_device_packed(lists, device or own_device, dtype)


@pytest.mark.parametrize(
    "target, fault, message",
    [
        ("folovllm.attention.backends.triton_paged.to_device_packed", pack_as(np.int64), "start_ptr is torch.int64"),
        ("folovllm.attention.backends.triton_paged.to_device_packed", pack_as(np.int32, "cpu"), "start_ptr is on cpu"),
        ("folovllm.transfers._ALIGNMENT", 4, "lens_ptr begins at an odd address"),
    ],
    ids=["dtype", "device", "alignment"],
)
def test_a_wrong_launch_is_found(
    target: str, fault: Any, message: str, machine: Machine, tiny_model_dir: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = machine.llm(tiny_model_dir("qwen3"), num_kv_blocks=40)
    monkeypatch.setattr(target, fault)
    add(llm, "0", 5)
    with pytest.raises(AssertionError, match=message):
        step(llm)


# --- several ranks ----------------------------------------------------------------------------------------------------


class Alone(Communicator):
    """One end of a group whose other ranks are not there: it gets tensors as they would send them."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        super().__init__(rank, size)
        self.device = device

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat([tensor] * self.size, dim=dim)

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        assert tensor.device == self.device

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)


@pytest.mark.parametrize("rank", range(4))
def test_each_rank_of_two_stages_of_two(
    rank: int, parallel_dir: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are on its own GPU, and only a rank of the last stage waits for it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    args = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "num_kv_blocks": 20, "max_model_len": 64}
    config = EngineConfig.from_args(model=str(parallel_dir), **args)
    config = resolve_config(config, load_hf_config(parallel_dir))
    shard, device = config.parallel_config.shard(rank), torch.device("cuda", rank)
    groups = ParallelGroups(shard, Alone(shard.tp_rank, 2, device), Alone(shard.pp_rank, 2, device))
    worker = Worker(config, parallel_dir, groups)
    assert worker.device == device
    worker.initialize_kv_cache(KVCacheConfig(20, 16, bytes_per_block=0))
    with machine.gpu.step() as account:
        answer = worker.sample(worker.execute(largest_step([20, 1, 33], [2, 1, 3])))
    last = rank >= 2
    assert (len(answer.sampled_token_ids), account.waits) == ((3, 1) if last else (0, 0))


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gptq_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    return quantize(make_quantizable("Qwen2", folder / "plain"), folder / "gptq", desc_act=True)


@pytest.mark.parametrize("kernel, in_order", [("triton", True), ("triton", False), ("dequant", False)])
def test_gptq(kernel: str, in_order: bool, machine: Machine, gptq_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which input belongs to which group is a question of values, so the answer is given: in order, or in no order."""
    machine.gpu.equal = in_order
    monkeypatch.setattr(
        triton_gptq, "input_order", lambda g_idx, num_groups: torch.arange(len(g_idx)).view(num_groups, -1)
    )
    run(machine.llm(gptq_dir, gptq_kernel=kernel, dtype="bfloat16", num_kv_blocks=40, max_num_batched_tokens=32))
    ours = {"gemv_kernel", "tile_kernel"} & set(machine.kernels())
    assert ours == ({"gemv_kernel", "tile_kernel"} if kernel == "triton" else set())


def test_dequantised_at_load(machine: Machine, gptq_dir: Path) -> None:
    run(machine.llm(gptq_dir, quantization="dequantize", num_kv_blocks=40))


# --- sampling ---------------------------------------------------------------------------------------------------------

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8, "seed": 7},
    "top_k": {"temperature": 0.8, "top_k": 5},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "min_p": {"temperature": 0.8, "min_p": 0.1},
    "all": {"temperature": 1.2, "min_p": 0.1, "top_k": 50, "top_p": 0.5},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.1},
    "logit_bias": {"logit_bias": {7: 2.0, 9: -100}},
    "allowed": {"allowed_token_ids": [5, 7, 9]},
    "min_tokens": {"min_tokens": 2, "stop_token_ids": [4]},
    "logprobs": {"logprobs": 3},
    "chosen logprob": {"logprobs": 0, "temperature": 0.5},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "several": {"n": 3, "temperature": 1.0},
}
PLAIN_GPU = FakeGpu()


@pytest.fixture(scope="module")
def plain_llm(tiny_model_dir: MakeTiny) -> LLM:
    with pytest.MonkeyPatch.context() as monkeypatch, gpu_machine(monkeypatch, PLAIN_GPU) as machine:
        return machine.llm(tiny_model_dir("qwen3"), skip_tokenizer_init=False, max_num_batched_tokens=32)


@pytest.mark.parametrize("name", [*SAMPLING, "bad_words", "together"])
def test_sampling(name: str, plain_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bad_words = {"bad_words": ["a", "th"]}
    cases = {"together": [*SAMPLING.values(), bad_words], "bad_words": [bad_words]}
    with gpu_machine(monkeypatch, PLAIN_GPU):
        for i, params in enumerate(cases.get(name) or [SAMPLING[name]]):
            add(plain_llm, f"{name} {i}", 4 + 3 * i, max_tokens=2, **params)
        finish(plain_llm)


# --- on "meta" --------------------------------------------------------------------------------------------------------


def test_two_devices_are_noticed() -> None:
    """Or the test below would show nothing. (meta itself lets this product pass.)"""
    with OneDevice():
        torch.ones(3, device=META) * torch.tensor(2.0) + torch.ones(3).to(META)
        with pytest.raises(AssertionError, match=r"aten.mm.default is given tensors of \['cpu', 'meta'\]"):
            torch.ones(3, 4, device=META) @ torch.ones(4, 2)


@pytest.mark.parametrize("name", ["torch_naive", "torch_sdpa", "torch_flash"])
def test_the_forward_pass_on_meta(name: str, tiny_model_dir: MakeTiny) -> None:
    folder = tiny_model_dir("qwen3")
    config = make_config(folder, max_model_len=64, block_size=16, num_kv_blocks=20)
    arch = config.model_config.arch
    model = load_model(folder, arch, torch.bfloat16, META)
    backend, sampler = load_backend(name)(AttentionSpec.from_arch(arch, torch.bfloat16, META, 16)), Sampler()
    replaced = accelerate(model, backend, KernelConfig(**dict.fromkeys(REPLACED, "auto")), sampler)
    assert [item.switch for item in replaced if item.after is not None] == ["sampler_backend"], "the rest is the CPU's"
    runner = ModelRunner(config, model, backend, META, sampler)
    runner.initialize_kv_cache(KVCacheConfig(20, 16, bytes_per_block=0))
    with OneDevice():
        handle = runner.execute(largest_step([20, 1, 33], [2, 1, 3]))
        logits = model.compute_logits(handle.hidden_states)
    assert handle.hidden_states.shape[0] == 3 and logits.device == META
