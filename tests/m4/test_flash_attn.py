"""flash_attn without a GPU: how its calls are built, and what it refuses.

Milestone: M4 (R4.29). A stand-in takes the place of the kernel: it has the kernel's signature, wants what the
kernel wants of its arguments, and computes from them alone with the formula of torch_naive. So the whole conformance
suite runs through our side of the call. The real `varlen_attn` is called too, on tensors without data.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends import flash_attn
from folovllm.attention.backends.flash_attn import FlashAttnBackend, FlashMetadata
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.selector import get_attn_backend, refusal
from tests.fake_gpu import fake_gpu
from tests.m4.conformance import BLOCK_SIZES, GROUPS, check, make_batch, random_batch

pytestmark = pytest.mark.m4

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def attend_pages(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, scale: float, block_table: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """What FlashAttention computes, from what it is given, with torch_naive. It checks what the kernel checks."""
    for tensor in (cu_seq_q, cu_seq_k, block_table):
        assert tensor.dtype == torch.int32 and tensor.stride(-1) == 1
    q_lens, k_lens = cu_seq_q.diff(), cu_seq_k.diff()
    assert len(q_lens) == len(k_lens) == len(block_table) and cu_seq_q[-1] == len(query)
    assert max_q == q_lens.max() and max_k == k_lens.max() and max_k <= block_table.shape[1] * key.shape[1]
    spec = AttentionSpec(query.shape[1], key.shape[2], query.shape[2], query.dtype, query.device, key.shape[1])
    assert scale == pytest.approx(spec.scale)
    naive, nothing = TorchNaiveBackend(spec), torch.empty(0, dtype=torch.int64)
    metadata = AttentionMetadata(cu_seq_q.tolist(), k_lens.tolist(), block_table, nothing, key.shape[1])
    naive.prepare(metadata)
    return naive.forward(query, torch.stack([key, value]), metadata)


def stand_in_for_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor | None,
    max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None, num_splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    assert return_aux is None and window_size == (-1, 0) and num_splits == 1
    assert scale is not None and seqused_k is not None and block_table is not None and cu_seq_k is not None
    assert enable_gqa or query.shape[1] == key.shape[2]
    assert seqused_k.dtype == torch.int32 and torch.equal(seqused_k, cu_seq_k.diff())
    return attend_pages(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, block_table)


def stand_in_for_package(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The signature of flash-attn 2.8."""
    assert causal and softmax_scale is not None and block_table is not None
    return attend_pages(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, block_table
    )  # fmt: skip


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As if flash-attn were installed."""
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = stand_in_for_package  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture(params=["torch", "package"])
def kernel(request: pytest.FixtureRequest, package: ModuleType, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in behind either way of calling."""
    if request.param == "torch":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", stand_in_for_torch)
    else:
        monkeypatch.setattr(flash_attn, "_torch_has_pages", lambda: False)
    return str(request.param)


# --- the call ---------------------------------------------------------------------------------------------------------


def test_the_stand_in_has_the_kernels_signature() -> None:
    from torch.nn.attention.varlen import varlen_attn

    def shape(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(stand_in_for_torch) == shape(varlen_attn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_random_steps(kernel: str, dtype: torch.dtype) -> None:
    for seed in range(40):
        batch = random_batch(
            np.random.default_rng((40, seed)), dtype, group=GROUPS[seed % 4], block_size=BLOCK_SIZES[seed % 9]
        )
        check(FlashAttnBackend, batch, TorchNaiveBackend)


def test_a_prefix_that_is_being_written_in_this_very_step(kernel: str) -> None:
    batch = make_batch(np.random.default_rng(41), [("prefill", 0, 40), ("prefix hit", 32, 5)], block_size=16)
    check(FlashAttnBackend, batch, TorchNaiveBackend)


def test_what_the_layers_share(package: ModuleType) -> None:
    """The example in the head of flash_attn.py."""
    table = torch.tensor([[7, 2, 0], [4, 0, 0]], dtype=torch.int32)
    metadata = AttentionMetadata([0, 2, 5], [5, 3], table[:, :2], torch.arange(5), 4)
    FlashAttnBackend(AttentionSpec(4, 2, 64, torch.bfloat16, CPU, 4)).prepare(metadata)
    step: FlashMetadata = metadata.prepared
    assert step.cu_seq_q.tolist() == [0, 2, 5] and step.cu_seq_k.tolist() == [0, 5, 8]
    assert step.seqused_k.tolist() == [5, 3] and (step.max_q, step.max_k) == (3, 5)
    assert step.block_table.tolist() == [[7, 2], [4, 0]] and step.block_table.is_contiguous()


@pytest.mark.parametrize("group", [1, 3])
def test_torch_takes_the_call(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `varlen_attn`, on tensors that have shapes and a device but no data: arguments and result fit."""
    if not flash_attn._torch_has_pages():
        pytest.skip("torch < 2.12")
    with fake_gpu(monkeypatch):
        spec = AttentionSpec(2 * group, 2, 64, torch.bfloat16, CUDA, 256)
        backend = FlashAttnBackend(spec)
        query = torch.empty(5, 2 * group, 64, dtype=spec.dtype, device=CUDA)
        cache = torch.empty(backend.kv_cache_shape(9), dtype=spec.dtype, device=CUDA)
        table = torch.zeros(2, 3, dtype=torch.int32, device=CUDA)
        metadata = AttentionMetadata([0, 2, 5], [300, 3], table, torch.empty(5, dtype=torch.int64), 256)
        backend.prepare(metadata)
        out = backend.forward(query, cache, metadata)
    assert out.shape == query.shape and out.dtype == query.dtype and out.device.type == "cuda"


# --- who may run it ---------------------------------------------------------------------------------------------------


def spec_of(dtype: torch.dtype = torch.bfloat16, head: int = 64, page: int = 256, device: Any = CUDA) -> AttentionSpec:
    return AttentionSpec(4, 2, head, dtype, device, page)


@pytest.mark.parametrize(
    "asked, reason",
    [
        (spec_of(device=CPU), "on an NVIDIA GPU, not on cpu; use 'torch_flash'"),
        (spec_of(torch.float32), "in bfloat16 and float16, not in torch.float32; use 'triton_paged'"),
        (spec_of(head=512), "a head size up to 256 .* not 512; use 'triton_paged'"),
        (spec_of(head=20), "divisible by 8, not 20"),
        (spec_of(page=16), "divisible by 256 tokens, not hold 16; use block_size=256 or 'triton_paged'"),
    ],
)
def test_refusals(asked: AttentionSpec, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'flash_attn' cannot run here: .*{reason}"):
        get_attn_backend("flash_attn", asked)


def test_flash_attention_3_takes_any_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3")
    assert "divisible" not in str(refusal("flash_attn", spec_of(page=16)))
    monkeypatch.setattr(flash_attn, "_torch_has_pages", lambda: False)
    assert flash_attn.page_multiple() == 256, "the package is FlashAttention 2"


def test_the_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in str(refusal("flash_attn", spec_of()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability 8.0 (Ampere) or later, this GPU has 7.5" in str(refusal("flash_attn", spec_of()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert refusal("flash_attn", spec_of()) is None


def test_without_any_kernel_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "_torch_has_pages", lambda: False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "neither torch >= 2.12 nor the flash-attn package" in str(refusal("flash_attn", spec_of()))


def test_an_older_torch_has_no_pages(monkeypatch: pytest.MonkeyPatch, package: ModuleType) -> None:
    assert flash_attn.find_kernel() is flash_attn.call_torch
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, cu_seq_q: None)
    assert flash_attn.find_kernel() is flash_attn.call_package
