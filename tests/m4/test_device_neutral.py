"""Does a step of the engine stay on its device? Asked without a GPU (R4.30).

Milestone: M4. The device "meta" has shapes and no data, and stands for the GPU. `OneDevice` watches every operator for
tensors of two devices, which a GPU refuses. What needs the data (`tolist()` at the end of sampling, `nonzero()` in
top-p) cannot run on meta and is not covered; nor are kernels that are no torch operators.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.selector import BACKENDS, load_backend
from folovllm.config import KernelConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.model_loader import load_model
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.sampler import Sampler
from folovllm.sampling_params import SamplingParams
from folovllm.worker.model_runner import ForwardHandle, ModelRunner
from folovllm.worker.profile_run import largest_step
from tests.parity_helpers import make_config
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.m4

META = torch.device("meta")
# The other two are kernels: they run where their machine is, or under their interpreter.
PLAIN_TORCH = [name for name in BACKENDS if name not in ("cpu_paged", "triton_paged")]

REPLACED = ("linear_backend", "fused_ops", "fused_mlp", "decoder_stack", "sampler_backend")

MakeTiny = Callable[[str], Path]


class OneDevice(TorchDispatchMode):
    """AssertionError where an operator is given tensors of two devices. Copies may have them, and numbers (0-dim)."""

    COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.dim() > 0 or t.device == META}
        assert len(devices) < 2 or func in self.COPIES, f"{func} is given tensors of {sorted(devices)}"
        return func(*args, **(kwargs or {}))


def test_two_devices_are_noticed() -> None:
    """Or the tests below would show nothing. (meta itself lets this product pass.)"""
    with OneDevice():
        torch.ones(3, device=META) * torch.tensor(2.0) + torch.ones(3).to(META)
        with pytest.raises(AssertionError, match=r"aten.mm.default is given tensors of \['cpu', 'meta'\]"):
            torch.ones(3, 4, device=META) @ torch.ones(4, 2)


def run_a_step(folder: Path, backend_name: str) -> tuple[ModelRunner, ForwardHandle]:
    config = make_config(folder, max_model_len=64, block_size=16, num_kv_blocks=20)
    arch = config.model_config.arch
    model = load_model(folder, arch, torch.bfloat16, META)
    spec = AttentionSpec(arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim, torch.bfloat16, META, 16)
    backend, sampler = load_backend(backend_name)(spec), Sampler()
    replaced = accelerate(model, backend, KernelConfig(**dict.fromkeys(REPLACED, "auto")), sampler)
    assert [item.switch for item in replaced if item.after is not None] == ["sampler_backend"], "the rest is the CPU's"
    runner = ModelRunner(config, model, backend, META, sampler)
    runner.initialize_kv_cache(KVCacheConfig(20, 16, bytes_per_block=0))
    with OneDevice():
        return runner, runner.execute(largest_step([20, 1, 33], [2, 1, 3]))


@pytest.mark.parametrize("model", ["llama_rope", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", PLAIN_TORCH)
def test_the_forward_pass(name: str, model: str, tiny_model_dir: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "flash_attn":  # its own operator wants a GPU; everything around it runs
        monkeypatch.setattr(
            "folovllm.attention.backends.flash_attn.find_kernel", lambda: lambda query, *rest: torch.empty_like(query)
        )
    runner, handle = run_a_step(tiny_model_dir(model), name)
    assert handle.hidden_states.device == META and handle.hidden_states.shape[0] == 3  # of 54 rows
    with OneDevice():
        logits = runner.model.compute_logits(handle.hidden_states)
    assert logits.device == META and logits.shape == (3, VOCAB_SIZE)


@pytest.mark.parametrize(
    "args",
    [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"temperature": 0.7, "logit_bias": {7: 2.0}, "allowed_token_ids": [5, 7, 9]},
        {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": [4]},
    ],
    ids=lambda args: ", ".join(args),
)
def test_sampling(args: dict[str, Any]) -> None:
    rows = [SamplingRow(SamplingParams(**args), [3, 4], [5], 2, seed, [[6]]) for seed in range(3)]
    sampler, logits = Sampler(), torch.empty(3, VOCAB_SIZE, device=META)
    with OneDevice():
        metadata = SamplingMetadata.build(rows, VOCAB_SIZE, META)
        sampler.apply_logits_processors(logits, metadata)
        assert sampler.sample(logits, metadata).device == META
