"""The default model in 4 bits: `cpu_int4` in bf16 beside HuggingFace in bf16 with the same weights (R7.24).

Milestone: M7. The criteria are R1.49's for bf16: along a text, logprobs at most 1.2 times as far from fp32's as
HuggingFace's own bf16, and another likeliest token only where fp32's top two logits are closer than 0.5. fp32 is
HuggingFace with the weights that the checkpoint stands for, unrounded. They are rounded to nearest: it takes
seconds, and the quantiser is not what is tested.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.csrc.build import load_ops
from folovllm.gptq_config import GPTQConfig
from folovllm.milestones import get_rung
from folovllm.model_executor.cpu import int4_kernel
from folovllm.model_executor.layers.quantization.quantized_linear import dequantize_weights
from folovllm.model_executor.weight_utils import iterate_weights, safetensors_files
from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint
from tests.m1.test_parity_real import (
    ARGMAX_GAP,
    MEAN_AND_P99_LIMIT,
    ROWS,
    TOKEN_BY_TOKEN,
    Forced,
    forced_hf,
    forced_ours,
    mean_and_p99,
)

pytestmark = [pytest.mark.m7, pytest.mark.weights]

CONFIG = GPTQConfig(4, 64)
TEXTS = [row for row in ROWS if row["name"] in ("capital", "history", "python", "french", "sql")]
KERNELS = {name: value for name, value in get_rung("m4").on.items() if name != "attention_backend"}
INT4 = KERNELS | {"quantization": "auto", "gptq_kernel": "cpu_int4"}
RUNS: dict[str, dict[str, Any]] = {
    "whole texts, 4 bits": {"gptq_runtime": "memory"},
    "whole texts, packed bf16": {"gptq_runtime": "speed"},
    "token by token, 4 bits": TOKEN_BY_TOKEN | {"gptq_runtime": "memory"},
}


@pytest.fixture(scope="module")
def checkpoint(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if load_ops() is None:
        pytest.skip("no C++ kernels here")
    out = tmp_path_factory.mktemp("real") / "rtn"
    quantize_checkpoint(model_dir, out, QuantizeSettings(CONFIG, "rtn"), progress=False)
    return out


@pytest.fixture(scope="module")
def hf(model_dir: Path, checkpoint: Path) -> dict[str, Forced]:
    from folovllm.entrypoints.commands.hf_baseline import load_hf

    model = load_hf.__wrapped__(model_dir, "float32")  # not the one that is kept: its weights are replaced here
    plain = dict(dequantize_weights(iterate_weights(safetensors_files(checkpoint)), CONFIG))
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert not unexpected and missing == ["lm_head.weight"]  # tied to the embedding
    return {"float32": forced_hf(model, TEXTS), "bfloat16": forced_hf(model.bfloat16(), TEXTS)}


@pytest.mark.parametrize("args", RUNS.values(), ids=RUNS)
def test_bf16_is_as_near_to_fp32_as_huggingfaces(
    args: dict[str, Any], checkpoint: Path, hf: dict[str, Forced], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_kernel, "find_crossover", lambda *_: 8)  # nothing is measured here
    ours, exact = forced_ours(checkpoint, TEXTS, **INT4, **args), hf["float32"]
    (our_mean, our_p99), (their_mean, their_p99) = mean_and_p99(ours, exact), mean_and_p99(hf["bfloat16"], exact)
    flips = ours.argmax != exact.argmax
    widest = exact.gaps[flips].max().item() if flips.any() else 0.0
    print(
        f"{len(exact.gaps)} tokens; |logprob - fp32's|: mean {our_mean:.5f} (HuggingFace {their_mean:.5f}, ratio "
        f"{our_mean / their_mean:.3f}), p99 {our_p99:.4f} ({their_p99:.4f}, {our_p99 / their_p99:.3f}); argmax differs "
        f"at {int(flips.sum())}, the widest gap there {widest:.3f}"
    )
    assert our_mean <= MEAN_AND_P99_LIMIT * their_mean
    assert our_p99 <= MEAN_AND_P99_LIMIT * their_p99
    assert widest < ARGMAX_GAP


def test_the_checkpoint_is_what_runs(hf: dict[str, Forced]) -> None:
    """4 bits chose other tokens than the plain model, whose own text this is: the runs above did not load that one."""
    text = torch.tensor([token for row in TEXTS for token in row["token_ids"]])
    others = (hf["float32"].argmax != text).float().mean().item()
    print(f"{others:.1%} of the plain model's tokens are not the 4-bit model's first choice")
    assert 0.02 < others < 0.5
