"""Choosing a backend: lazy, `auto`, refusals that help, and the part (R4.8 to R4.10).

Milestone: M4.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from folovllm.attention import selector
from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_flash import TorchFlashBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.attention.backends.torch_sdpa import TorchSdpaBackend
from folovllm.attention.selector import AUTO_ORDER, BACKENDS, auto_backend, get_attn_backend, load_backend
from folovllm.config import ATTENTION_BACKENDS, AttentionConfig
from folovllm.hf_config import parse_hf_config

pytestmark = pytest.mark.m4

CPU = AttentionSpec(4, 2, 64, torch.float32, torch.device("cpu"), block_size=16)
CUDA = AttentionSpec(4, 2, 64, torch.float16, torch.device("cuda"), block_size=16)


def test_config_and_registry_know_the_same_names() -> None:
    assert set(ATTENTION_BACKENDS) == {"auto", *BACKENDS}
    for name, order in AUTO_ORDER.items():
        assert set(order) <= set(BACKENDS), name


@pytest.mark.parametrize("name", ["torch_naive", "torch_sdpa", "torch_flash"])
def test_plain_torch_runs_everywhere(name: str) -> None:
    for spec in (CPU, CUDA):
        assert selector.refusal(name, spec) is None
        assert get_attn_backend(name, spec).name == name


@pytest.mark.parametrize("name", BACKENDS)
def test_names_match_their_classes(name: str) -> None:
    try:
        backend = selector.load_backend(name)
    except (ValueError, ImportError) as error:
        assert "folovllm" not in str(error).rpartition("No module named")[2], "a registered file of ours is missing"
        pytest.skip(str(error))
    assert backend.name == name


def test_a_backend_is_imported_when_it_is_asked_for() -> None:
    script = """
import sys, torch
from folovllm.attention.backend import AttentionSpec
from folovllm.attention import selector
home = "folovllm.attention.backends."
loaded = lambda: sorted(m.removeprefix(home) for m in sys.modules if m.startswith(home))
assert loaded() == [], loaded()
spec = AttentionSpec(4, 2, 64, torch.float32, torch.device("cpu"), block_size=16)
selector.get_attn_backend("torch_naive", spec)
assert loaded() == ["block_major", "torch_naive"], loaded()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# --- auto -------------------------------------------------------------------------------------------------------------


def refuse(monkeypatch: pytest.MonkeyPatch, **reasons: str) -> None:
    """Make the named backends refuse, and all others accept, whatever this machine has."""
    monkeypatch.setattr(selector, "refusal", lambda name, spec: reasons.get(name))


@pytest.mark.parametrize(
    "spec, refusing, expected",
    [
        (CPU, [], "cpu_paged"),
        (CPU, ["cpu_paged"], "torch_sdpa"),
        (CUDA, [], "flash_attn"),
        (CUDA, ["flash_attn"], "triton_paged"),
        (CUDA, ["flash_attn", "triton_paged"], "torch_sdpa"),
    ],
)
def test_auto_takes_the_best_that_runs(
    spec: AttentionSpec, refusing: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, **dict.fromkeys(refusing, "not today"))
    assert auto_backend(spec) == expected


def test_auto_builds_what_it_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, cpu_paged="no compiler")
    assert isinstance(get_attn_backend("auto", CPU), TorchSdpaBackend)


def test_auto_reads_the_real_refusals_of_the_gpu_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention 2 wants pages of 256 tokens and half precision; Triton, where it is installed, takes the rest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    paged = "torch_sdpa" if importlib.util.find_spec("triton") is None else "triton_paged"
    assert auto_backend(CUDA) == paged
    assert auto_backend(dataclasses.replace(CUDA, block_size=256)) in ("flash_attn", paged)  # torch may be older
    assert auto_backend(dataclasses.replace(CUDA, block_size=256, dtype=torch.float32)) == paged
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert auto_backend(CUDA) == "torch_sdpa"


def test_auto_says_what_it_passed_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    refuse(monkeypatch, cpu_paged="no compiler")
    with caplog.at_level("INFO", logger=selector.__name__):
        auto_backend(CPU)
    assert [record.getMessage() for record in caplog.records] == [
        "attention_backend='auto' passes over cpu_paged: no compiler"
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------


class Picky(TorchNaiveBackend):
    name = "picky"

    @classmethod
    def refusal(cls, spec: AttentionSpec) -> str | None:
        return f"it wants blocks of 256 tokens, not {spec.block_size}" if spec.block_size != 256 else None


def test_a_refusal_names_the_reason_and_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "torch_flash", f"{__name__}:Picky")
    with pytest.raises(ValueError) as error:
        get_attn_backend("torch_flash", CPU)
    assert str(error.value) == (
        "attention_backend='torch_flash' cannot run here: it wants blocks of 256 tokens, not 16. "
        "Use attention_backend='auto', which takes the best that can, or 'torch_sdpa', which runs everywhere"
    )


@pytest.mark.parametrize("statement", ["import a_kernel_library", "raise ImportError('libcudart.so.12 is missing')"])
def test_a_library_that_is_missing_or_broken_is_a_refusal(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernel_of_others.py").write_text(f"{statement}\nclass Kernel: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BACKENDS, "torch_flash", "kernel_of_others:Kernel")
    with pytest.raises(
        ValueError, match=r"'torch_flash' cannot run here: .*(a_kernel_library|libcudart).*'auto'.*'torch_sdpa'"
    ):
        get_attn_backend("torch_flash", CPU)


@pytest.mark.parametrize(
    "name, message",
    [
        ("flash", "unknown attention_backend 'flash'; did you mean 'flash_attn'"),
        ("triton", "did you mean 'triton_paged'"),
        ("torch_spda", "did you mean 'torch_sdpa'"),
        ("cpu", "did you mean 'cpu_paged'|known: auto, torch_naive, torch_sdpa"),
        ("xxxx", "known: auto, torch_naive, torch_sdpa, torch_flash, cpu_paged, triton_paged, flash_attn"),
    ],
)
def test_an_unknown_name_leads_to_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_attn_backend(name, CPU)


def test_the_config_refuses_it_before_a_model_is_loaded() -> None:
    with pytest.raises(
        ValueError, match=r"must be one of auto, torch_naive, .*got 'torch_spda'; did you mean 'torch_sdpa'"
    ):
        AttentionConfig(attention_backend="torch_spda")
    for name in ATTENTION_BACKENDS:
        assert AttentionConfig(attention_backend=name).attention_backend == name


# --- the part ---------------------------------------------------------------------------------------------------------


def test_the_part_comes_before_the_name() -> None:
    parts = {"attention.backend": "folovllm.attention.backends.torch_flash:TorchFlashBackend"}
    assert isinstance(get_attn_backend("torch_naive", CPU, parts), TorchFlashBackend)
    assert isinstance(get_attn_backend("auto", CPU, parts), TorchFlashBackend)
    assert isinstance(get_attn_backend("torch_naive", CPU, {"sample.sampler": "x.py:Y"}), TorchNaiveBackend)


def test_a_learners_backend_may_refuse_too() -> None:
    with pytest.raises(ValueError, match=r":Picky as part 'attention.backend' cannot run here: it wants blocks of 256"):
        get_attn_backend("auto", CPU, {"attention.backend": f"{__name__}:Picky"})


def test_no_backend_inherits_from_the_oracle() -> None:
    """A fast backend that forgot a method would run the oracle's, and be compared with itself."""
    for name in set(BACKENDS) - {"torch_naive", "triton_paged"}:  # triton may not be installed
        assert not issubclass(load_backend(name), TorchNaiveBackend), name


def test_a_spec_is_read_from_the_architecture() -> None:
    arch = parse_hf_config(
        json.loads((Path(__file__).parents[1] / "data/configs" / "SmolLM2-135M-Instruct.json").read_text())
    )
    spec = AttentionSpec.from_arch(arch, torch.float32, torch.device("cpu"), 16)
    assert spec == AttentionSpec(9, 3, 64, torch.float32, torch.device("cpu"), 16)


def test_the_metadata_of_a_single_sequence() -> None:
    step = AttentionMetadata.single_sequence(6, [7, 2], block_size=4, num_computed_tokens=4)
    assert (step.query_start_loc, step.seq_lens, step.block_table.tolist()) == ([0, 2], [6], [[7, 2]])
    assert step.slot_mapping.tolist() == [8, 9] and step.block_size == 4
    without_cache = AttentionMetadata.single_sequence(3)
    assert without_cache.query_start_loc == [0, 3] and without_cache.seq_lens == [3]
    assert without_cache.slot_mapping.numel() == without_cache.block_table.numel() == 0
