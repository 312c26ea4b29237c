"""Which group an input belongs to: g_idx under act-order, i // group_size without, whatever the tool wrote.

Public reports: g_idx left out (1b5d/llm-api#8, AutoGPTQ pull 771, intel/auto-round pull 267) or left zero
(turboderp/exllama#44, neural-compressor pull 2204). vLLM looks at g_idx only if desc_act is true.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folovllm.gptq_config import GPTQConfig
from folovllm.hf_config import load_hf_config
from folovllm.model_executor.layers.quantization.quantized_linear import settle_g_idx
from folovllm.model_executor.model_loader import load_model
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.model_executor.weight_utils import WeightsError
from tests.m7.quant_helpers import make_quantizable, quantize

pytestmark = pytest.mark.m7

Tensors = dict[str, torch.Tensor]
HOWS = pytest.mark.parametrize("how", ["auto", "dequantize"])
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def plain_order(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantised without act-order: three groups of 32 in down_proj, two elsewhere."""
    root = tmp_path_factory.mktemp("g_idx")
    return quantize(make_quantizable("Llama", root / "plain"), root / "gptq", desc_act=False)


@pytest.fixture
def copy(plain_order: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain_order, tmp_path / "changed")


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """The checkpoint in one file, changed."""
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    for path in folder.glob("*.index.json"):
        path.unlink()
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, folder / "model.safetensors")


def set_desc_act(folder: Path, value: bool) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = value
    (folder / "config.json").write_text(json.dumps(config))


def load(folder: Path, how: str) -> LlamaForCausalLM:
    return load_model(folder, load_hf_config(folder), torch.float32, torch.device("cpu"), quantization=how)


def logits_of_layer(model: LlamaForCausalLM) -> torch.Tensor:
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    return model.model.layers[0].mlp.down_proj(x)


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if not (k.endswith(".g_idx") and part in k)}


def zeroed(tensors: Tensors) -> Tensors:
    return {k: torch.zeros_like(v) if k.endswith(".g_idx") else v for k, v in tensors.items()}


def as_int64(tensors: Tensors) -> Tensors:
    return {k: v.long() if k.endswith(".g_idx") else v for k, v in tensors.items()}


@HOWS
@pytest.mark.parametrize(
    "change", [without(""), without("down_proj"), zeroed, as_int64], ids=["none", "some layers", "zeros", "int64"]
)
def test_without_act_order_any_g_idx_means_i_over_group_size(
    how: str, change: Callable[[Tensors], Tensors], plain_order: Path, copy: Path
) -> None:
    rewrite(copy, change)
    assert torch.equal(logits_of_layer(load(copy, how)), logits_of_layer(load(plain_order, how)))


@HOWS
def test_under_act_order_zeros_are_refused(how: str, copy: Path) -> None:
    rewrite(copy, zeroed)
    set_desc_act(copy, True)
    with pytest.raises(WeightsError, match=r"groups of g_idx; found \d groups without any: .*'desc_act': false"):
        load(copy, how)


@HOWS
def test_under_act_order_a_missing_g_idx_is_refused(how: str, copy: Path) -> None:
    rewrite(copy, without("down_proj"))
    set_desc_act(copy, True)
    with pytest.raises(WeightsError, match="g_idx"):
        load(copy, how)


@HOWS
def test_another_order_without_act_order_is_refused(how: str, copy: Path) -> None:
    """Either g_idx or desc_act is wrong: HuggingFace would believe the one, vLLM the other."""
    rewrite(copy, lambda t: t | {f"{DOWN}.g_idx": t[f"{DOWN}.g_idx"].flip(0)})
    with pytest.raises(WeightsError, match=rf"g_idx of {DOWN} to be i // group_size.*set 'desc_act': true"):
        load(copy, how)
    set_desc_act(copy, True)
    load(copy, how)  # it is a permutation: with desc_act it says what it means


@HOWS
@pytest.mark.parametrize(
    "change,message",
    [
        (
            lambda t: t | {f"{DOWN}.g_idx": torch.zeros(64).int()},
            "the 64 inputs that g_idx of .* has; found 96 in qweight",
        ),
        (
            lambda t: t | {"model.norm.g_idx": torch.zeros(64).int()},
            "64 inputs that g_idx of model.norm has; found no qw",
        ),
    ],
)
def test_a_g_idx_without_its_layer_is_refused(
    how: str, change: Callable[[Tensors], Tensors], message: str, copy: Path
) -> None:
    rewrite(copy, change)
    with pytest.raises(WeightsError, match=message):
        load(copy, how)


@pytest.mark.parametrize("config", [GPTQConfig(4, -1), GPTQConfig(4, 32), GPTQConfig(8, 64)])
def test_every_layer_gets_a_g_idx(config: GPTQConfig) -> None:
    words = torch.zeros(config.num_words(128), 8).int()
    settled = dict(settle_g_idx([("a.qweight", words), ("norm.weight", torch.ones(8))], config))
    groups = torch.arange(128) // (128 if config.group_size == -1 else config.group_size)
    assert torch.equal(settled["a.g_idx"], groups.int()) and set(settled) == {"a.qweight", "a.g_idx", "norm.weight"}


@pytest.mark.parametrize("leaf", ["scales"])
@HOWS
def test_scales_of_eight_bits_are_refused(how: str, leaf: str, copy: Path) -> None:
    def shrink(tensors: Tensors) -> Any:
        return tensors | {f"{DOWN}.{leaf}": tensors[f"{DOWN}.{leaf}"].to(torch.float8_e4m3fn)}

    rewrite(copy, shrink)
    with pytest.raises(WeightsError, match="expected floating-point values; found float8_e4m3fn"):
        load(copy, how)
