"""load_format="dummy" for a GPTQ model: packed weights without a checkpoint, for measurements of speed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.distributed.communicator import ParallelGroups
from folovllm.gptq_config import GPTQConfig
from folovllm.hf_config import load_hf_config
from folovllm.model_executor.layers.quantization.gptq import GPTQQuantization, quantized_layers
from folovllm.model_executor.model_loader import random_model
from folovllm.model_shapes import shape_config
from folovllm.parallel import ModelShard

pytestmark = pytest.mark.m7

PROMPT = list(range(5, 40))
CPU = torch.device("cpu")


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    """Only a config.json."""
    config = GPTQConfig(**{"bits": 4, "group_size": 32} | changes)
    quantization = {"quantization_config": config.to_json(damp=0.01, quantizer="random")}
    (tmp_path / "config.json").write_text(json.dumps(shape_config("tiny") | quantization))
    return tmp_path


def logprobs_of(folder: Path, **args: Any) -> torch.Tensor:
    llm = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="float32", max_model_len=64,
        num_kv_blocks=16, **args,
    )  # fmt: skip
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert output.prompt_logprobs is not None
    chosen = zip(PROMPT[1:], output.prompt_logprobs[1:], strict=True)
    return torch.tensor([row[token].logprob for token, row in chosen])


@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, -1), (3, 64), (8, 32)])
def test_levels_are_packed_and_activations_keep_their_size(tmp_path: Path, bits: int, group_size: int) -> None:
    arch = load_hf_config(folder_of(tmp_path, bits=bits, group_size=group_size))
    assert arch.quantization is not None
    models = [random_model(arch, torch.float32, CPU, seed, GPTQQuantization(arch.quantization)) for seed in (1, 1, 2)]
    first, again, other = (quantized_layers(model)[0] for model in models)
    params: Any = first
    assert torch.equal(params.qweight, again.qweight) and not torch.equal(params.qweight, other.qweight)  # type: ignore[arg-type]
    for layer in quantized_layers(models[0]):
        method: Any = layer.quant_method
        weight = torch.cat([part.dequantize() for part in method.kernel.layer_parts(layer)])
        assert float(weight.std()) * layer.input_size**0.5 == pytest.approx(1.0, abs=0.1)
        assert abs(float(weight.mean())) < 0.1 / layer.input_size**0.5 + float(params.scales.max())


def test_kernels_agree_on_the_same_random_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    dequantised = logprobs_of(folder, gptq_kernel="dequant", linear_backend="torch")
    packed = logprobs_of(folder, gptq_kernel="cpu_int4")
    plain = logprobs_of(folder, quantization="dequantize")  # other weights: plain ones
    assert torch.allclose(dequantised, packed, atol=1e-2)
    assert not torch.allclose(dequantised, plain, atol=1e-2)


def test_several_ranks_are_refused(tmp_path: Path) -> None:
    arch = load_hf_config(folder_of(tmp_path))
    assert arch.quantization is not None
    groups = ParallelGroups(ModelShard(tp_rank=0, tp_size=2))
    with pytest.raises(ValueError, match="packed weights for one rank only; use quantization='dequantize'"):
        random_model(arch, torch.float32, CPU, 0, GPTQQuantization(arch.quantization), groups=groups)
