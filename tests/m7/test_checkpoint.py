"""Reading GPTQ checkpoints: what loads, in both ways, and what is refused with a reason (milestone M7)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folovllm.checkpoint_files import INDEX
from folovllm.config import EngineConfig, KernelConfig, QuantizationConfig
from folovllm.gptq_config import GPTQConfig
from folovllm.hf_config import load_hf_config
from folovllm.hub.folder import check_model_folder
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.cpu.packed_linear import OneDnnLinearMethod, onednn_packing_works
from folovllm.model_executor.layers.linear import UnquantizedLinearMethod
from folovllm.model_executor.layers.quantization.gptq import GPTQLinearMethod
from folovllm.model_executor.model_loader import load_model
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.model_executor.weight_utils import WeightsError
from tests.m7.quant_helpers import make_quantizable, quantize

pytestmark = pytest.mark.m7

LAYER0 = "model-00002-of-00003.safetensors"
DOWN = "model.layers.0.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 bits, groups of 32, act-order, untied head."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return quantize(make_quantizable("Llama", folder / "plain"), folder / "gptq", desc_act=True)


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """One that the test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "damaged")


def load(folder: Path, quantization: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return load_model(folder, load_hf_config(folder), dtype, torch.device("cpu"), quantization=quantization)


def rewrite(folder: Path, change: Callable[[Tensors], Any], name: str = LAYER0) -> None:
    """Change the tensors of one shard; the index forgets those that are gone."""
    tensors = load_file(folder / name)
    before = set(tensors)
    change(tensors)
    edit_json(folder / INDEX, lambda index: [index["weight_map"].pop(gone) for gone in before - set(tensors)])
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_auto_keeps_weights_packed_and_dequantize_does_not(checkpoint: Path) -> None:
    packed, plain = load(checkpoint, "auto"), load(checkpoint, "dequantize")
    mlp = packed.model.layers[0].mlp
    assert type(mlp.down_proj.quant_method) is GPTQLinearMethod and not hasattr(mlp.down_proj, "weight")
    assert type(packed.lm_head.quant_method) is not GPTQLinearMethod
    assert {name for name, _ in plain.named_parameters()} >= {f"{DOWN}.weight", "lm_head.weight"}
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mlp.down_proj(x), plain.model.layers[0].mlp.down_proj(x))


def test_packing_for_the_cpu_leaves_quantised_layers_alone(checkpoint: Path) -> None:
    """linear_backend packs plain bf16 layers; the head is one, the others are not."""
    arch, cpu = load_hf_config(checkpoint), torch.device("cpu")
    model = load_model(checkpoint, arch, torch.bfloat16, cpu, linear_backend="onednn", quantization="auto")
    accelerate(model, None, KernelConfig(linear_backend="onednn"))
    assert type(model.model.layers[0].mlp.down_proj.quant_method) is GPTQLinearMethod
    assert type(model.lm_head.quant_method) is (
        OneDnnLinearMethod if onednn_packing_works() else UnquantizedLinearMethod
    )


def test_the_folder_looks_like_any_other_model(checkpoint: Path) -> None:
    assert check_model_folder(checkpoint) == checkpoint
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    assert config == json.loads((checkpoint / "quantize_config.json").read_text())
    assert config | {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True} == config
    assert load_hf_config(checkpoint).quantization == GPTQConfig(4, 32, True, True, "gptq")


def test_older_checkpoints_have_their_settings_in_a_file_of_their_own(copy: Path) -> None:
    edit_json(copy / "config.json", lambda config: config.pop("quantization_config"))
    (copy / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": true, "damp_percent": 0.01}')
    assert load_hf_config(copy).quantization == GPTQConfig(4, 32, True, True, "gptq")
    load(copy, "auto")


def test_one_layer_in_several_files(copy: Path) -> None:
    """Shards are cut by size: the four tensors of a layer may be apart."""
    tensors = load_file(copy / LAYER0)
    moved = {name: tensor for name, tensor in tensors.items() if name.endswith((".qzeros", "q_proj.qweight"))}
    rewrite(copy, lambda t: [t.pop(name) for name in moved])
    save_file(moved, copy / "apart.safetensors")
    edit_json(copy / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(moved, "apart.safetensors")))
    before = tensors[f"{DOWN}.scales"]
    model = load(copy, "auto")
    assert torch.equal(model.model.layers[0].mlp.down_proj.scales, before.float())
    load(copy, "dequantize")


@pytest.mark.parametrize("quantization", ["auto", "dequantize"])
def test_biases_of_zeros_are_no_surprise(copy: Path, quantization: str) -> None:
    rewrite(copy, lambda tensors: tensors.update({f"{DOWN}.bias": torch.zeros(64)}))
    load(copy, quantization)
    rewrite(copy, lambda tensors: tensors.update({f"{DOWN}.bias": torch.ones(64)}))
    with pytest.raises(WeightsError, match=r"1 unexpected \(.*down_proj.bias\)"):
        load(copy, quantization)


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensor})


DAMAGES = [
    ("auto", drop(f"{DOWN}.g_idx"), r"1 missing \(.*down_proj.g_idx\).*under desc_act g_idx alone"),
    ("dequantize", drop(f"{DOWN}.g_idx"), "g_idx of .*down_proj; found no g_idx; to fix it"),
    ("auto", drop(f"{DOWN}.scales"), r"1 missing \(.*down_proj.scales\)"),
    ("dequantize", drop(f"{DOWN}.scales"), "found no scales"),
    ("auto", put(f"{DOWN}.qweight", torch.zeros(9, 64).int()), r"down_proj.qweight': expected shape \[12, 64\]; fou"),
    ("dequantize", put(f"{DOWN}.qweight", torch.zeros(9, 64).int()), r"down_proj': qweight: expected shape \[12, 64\]"),
    ("auto", put(f"{DOWN}.qzeros", torch.zeros(3, 7).int()), r"qzeros': expected shape \[3, 8\]; found \[3, 7\]"),
    ("dequantize", put(f"{DOWN}.qzeros", torch.zeros(3, 7).int()), r"qzeros: expected shape \[3, 8\]; found \[3, 7\]"),
    ("auto", put(f"{DOWN}.g_idx", torch.full((96,), 5).int()), "expected groups 0 .. 2 in g_idx; found 5 .. 5"),
    ("dequantize", put(f"{DOWN}.g_idx", torch.full((96,), 5).int()), "expected groups 0 .. 2 in g_idx; found 5 .. 5"),
    ("auto", put(f"{DOWN}.qweight", torch.zeros(12, 64)), "expected integer values; found float32"),
    ("dequantize", put(f"{DOWN}.qweight", torch.zeros(12, 64)), "expected int32 values; found float32"),
    ("dequantize", put(f"{DOWN}.scales", torch.zeros(3, 64).int()), "expected floating-point values; found int32"),
    ("auto", put(f"{DOWN}.weight", torch.zeros(64, 96)), r"1 unexpected \(.*down_proj.weight\)"),
]


@pytest.mark.parametrize("quantization,change,message", DAMAGES)
def test_damaged_weights_are_refused(
    copy: Path, quantization: str, change: Callable[[Tensors], Any], message: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(WeightsError, match=message) as caught:
        load(copy, quantization)
    text = str(caught.value)
    assert "expected" in text and "found" in text and "to fix it:" in text and copy.name in text


@pytest.mark.parametrize("quantization", ["auto", "dequantize"])
def test_a_truncated_file_is_refused(copy: Path, quantization: str) -> None:
    path = copy / LAYER0
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"expected a whole safetensors file; found .*fetch it again"):
        load(copy, quantization)
    with pytest.raises(ValueError, match="bytes, as its header says"):
        check_model_folder(copy)


def test_weights_whose_config_forgot_them(copy: Path) -> None:
    (copy / "quantize_config.json").unlink()
    edit_json(copy / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(WeightsError, match=r"these are GPTQ weights: give config\.json back its 'quantization_config'"):
        load(copy, "auto")


CONFIGS = [
    ({"bits": 5}, "expected bits of 2, 3, 4, 8; found 5"),
    ({"bits": "4"}, "expected bits of 2, 3, 4, 8; found '4'"),
    ({"bits": None}, "expected bits of 2, 3, 4, 8; found None"),
    ({"group_size": 0}, "expected a group_size of at least 1, or -1; found 0"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format of gptq, gptq_v2; found 'marlin'"),
    ({"dynamic": {"-:.*down.*": {}}}, "one setting for all layers; found 'dynamic'"),
    ({"is_marlin_format": True}, "AutoGPTQ's layout; found Marlin's"),
    ({"desc_act": "false"}, "true or false as 'desc_act'; found 'false'"),
    ({"lm_head": 1}, "true or false as 'lm_head'; found 1"),
    ({"pack_dtype": "int8"}, "packed into int32; found pack_dtype 'int8'"),
    ({"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, "every linear layer.*found only q_proj"),
    ({"quant_method": "awq"}, "GPTQ or unquantised weights; found quantization_config of 'awq'"),
]


@pytest.mark.parametrize("change,message", CONFIGS)
def test_settings_we_cannot_run(copy: Path, change: dict[str, Any], message: str) -> None:
    edit_json(copy / "config.json", lambda config: config["quantization_config"].update(change))
    with pytest.raises(ValueError, match=message) as caught:
        load_hf_config(copy)
    assert "to fix it:" in str(caught.value) and copy.name in str(caught.value)


def test_a_tied_head_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match="a plain lm_head, as it is the embedding"):
        GPTQConfig.from_json({"bits": 4, "lm_head": True}, tied_head=True)
    assert GPTQConfig.from_json({"bits": 4, "lm_head": True}).lm_head


def test_all_linears_listed_is_fine() -> None:
    """What transformers' own quantiser writes."""
    names = [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.o_proj"],
             ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]  # fmt: skip
    assert GPTQConfig.from_json({"bits": 4, "group_size": 128, "modules_in_block_to_quantize": names}).group_size == 128


def test_the_switch() -> None:
    assert EngineConfig.from_args(quantization="dequantize").quantization_config.quantization == "dequantize"
    assert QuantizationConfig("auto").quantization == "auto"
    with pytest.raises(ValueError, match="quantization must be one of auto, dequantize, gptq, gptq_marlin; got 'awq'"):
        QuantizationConfig("awq")
