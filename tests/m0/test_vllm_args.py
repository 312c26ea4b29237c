"""Every engine argument of vLLM has an answer: FoloVLLM has it, it changes nothing, or it says what to do instead."""

import ast
import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from folovllm.config import EngineConfig, engine_arg_names
from folovllm.gptq_config import GPTQConfig
from folovllm.vllm_args import ANYTHING, NONE_MEANS_DEFAULT, SHORT_FORMS, VLLM_ARGS
from tests.core_helpers import tiny_arch

pytestmark = pytest.mark.m0

RECORD = json.loads((Path(__file__).parent.parent / "data" / "vllm_engine_args.json").read_text())
NAMES: list[str] = RECORD["names"]
# Engine arguments of FoloVLLM that an answer may name.
INSTEAD = (
    "kv_cache_memory",
    "num_kv_blocks",
    "hf_overrides",
    "parts",
    "trace",
    "dtype",
    "long_prefill_token_threshold",
)


def names_in(source: str) -> list[str]:
    """The fields of the classes that RECORD names, in vLLM's arg_utils.py."""
    classes = [c for c in ast.parse(source).body if isinstance(c, ast.ClassDef) and c.name in RECORD["classes"]]
    return sorted(s.target.id for c in classes for s in c.body if isinstance(s, ast.AnnAssign))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_vllm_has_an_answer(name: str) -> None:
    ours = name in engine_arg_names()
    assert ours != (name in VLLM_ARGS), "either FoloVLLM has it, or the table has a sentence about it"


@pytest.mark.slow
def test_the_list_is_that_of_the_release(tmp_path: Path) -> None:
    """Downloads the wheel (440 MB) and reads the class; nothing of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest"]
    subprocess.run([*command, str(tmp_path), f"vllm=={RECORD['vllm']}"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert names_in(archive.read(RECORD["file"]).decode()) == NAMES


def test_the_reader_of_the_release_reads_fields() -> None:
    source = "class EngineArgs:\n    b: int = 1\n    a: str\n    x = 3\nclass Other:\n    c: int\n"
    assert names_in(source) == ["a", "b"]


@pytest.mark.parametrize("name", VLLM_ARGS)
def test_answers_say_what_to_do(name: str) -> None:
    instead = VLLM_ARGS[name].instead
    assert (len(instead) > 15 and instead[0].islower()) or instead.startswith(("FoloVLLM", "LLM", "LoRA"))
    for word in instead.replace("(", " ").split():
        argument = word.partition("=")[0]
        if "=" in word and argument in INSTEAD:
            assert argument in engine_arg_names()


@pytest.mark.parametrize(
    "args",
    [
        # What scripts written for vLLM pass, at values that mean "off" or "as always".
        {"tensor_parallel_size": 1, "trust_remote_code": True, "swap_space": 4, "disable_custom_all_reduce": True},
        {"pipeline_parallel_size": 1, "distributed_executor_backend": None, "enable_lora": False, "cpu_offload_gb": 0},
        {"kv_cache_dtype": "auto", "revision": None, "tokenizer_revision": None, "speculative_config": None},
        {"limit_mm_per_prompt": {"image": 1}, "compilation_config": 0, "task": "generate", "runner": "auto"},
        dict.fromkeys(VLLM_ARGS),
    ],
)
def test_harmless_values_change_nothing(args: dict[str, Any]) -> None:
    assert EngineConfig.from_args(**args) == EngineConfig.from_args()


@pytest.mark.parametrize("name", NONE_MEANS_DEFAULT)
def test_none_means_not_given_where_it_does_in_vllm(name: str) -> None:
    assert EngineConfig.from_args(**{name: None}) == EngineConfig.from_args()


@pytest.mark.parametrize(
    "args,message",
    [
        (
            {"decode_context_parallel_size": 2},
            "decode_context_parallel_size=2 is an engine argument of vLLM .*there is no other parallelism",
        ),
        ({"nnodes": 2}, "several machines are joined through Ray"),
        ({"data_parallel_size_local": 1}, "data_parallel_size engines run on this machine"),
        ({"kv_cache_memory_bytes": 2**30}, "use kv_cache_memory="),
        ({"num_gpu_blocks_override": 100}, "use num_kv_blocks="),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "use hf_overrides="),
        ({"revision": "main"}, "hf download"),
        ({"scheduler_cls": "mine.Scheduler"}, r"use parts=\{'core.scheduler'"),
        ({"speculative_config": {"method": "ngram"}}, "speculative decoding is not built yet"),
        ({"enable_lora": True}, "merge the adapter into the weights"),
        ({"kv_cache_dtype": "fp8"}, "the KV cache has the model's dtype"),
        ({"swap_spaces": 4}, "unknown engine argument 'swap_spaces'"),
        ({"quantization": "awq"}, "quantization must be one of auto, dequantize, gptq, gptq_marlin; got 'awq'"),
        ({"tokenizer_mode": "slow"}, "tokenizer_mode must be 'auto', got 'slow': .*save_pretrained"),
        ({"load_format": "gguf"}, "load_format must be one of auto, safetensors, dummy; got 'gguf'"),
        ({"served_model_name": [""]}, "served_model_name must be a name or a list of names"),
        ({"hf_overrides": lambda config: config}, "hf_overrides must be a dict of keys of config.json"),
    ],
)
def test_other_values_are_refused_with_what_to_do(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_args(**args)


@pytest.mark.parametrize(
    "name, meant",
    [
        ("tp", "tensor_parallel_size"),
        ("tp_size", "tensor_parallel_size"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("pp", "pipeline_parallel_size"),
        ("dp_size", "data_parallel_size"),
        ("dpb", "data_parallel_backend"),
    ],
)
def test_short_forms_are_understood_well_enough_to_be_suggested(name: str, meant: str) -> None:
    """LLM(tp=2) was answered with "did you mean 'dtype'?"."""
    with pytest.raises(ValueError, match=f"unknown engine argument '{name}'; did you mean '{meant}'?"):
        EngineConfig.from_args(**{name: 2})


def test_short_forms_stand_for_arguments() -> None:
    assert set(SHORT_FORMS.values()) - {"api_server_count"} <= set(VLLM_ARGS) | set(engine_arg_names())


@pytest.mark.parametrize("name", [name for name, answer in VLLM_ARGS.items() if answer.harmless is not ANYTHING])
def test_no_other_value_slips_through(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='something else' is an engine argument of vLLM"):
        EngineConfig.from_args(**{name: "something else"})


class TorchDtype:
    """Prints like torch.float16, which this row must not import."""

    def __str__(self) -> str:
        return "torch.float16"


@pytest.mark.parametrize("given,dtype", [("half", "float16"), ("float", "float32"), (TorchDtype(), "float16")])
def test_vllms_names_of_the_dtypes(given: Any, dtype: str) -> None:
    assert EngineConfig.from_args(dtype=given) == EngineConfig.from_args(dtype=dtype)


@pytest.mark.parametrize("name", ["gptq", "gptq_marlin"])
def test_the_quantization_that_vllm_scripts_name(name: str) -> None:
    """LLM(model="...-GPTQ", quantization="gptq"), as in vllm/examples/offline_inference/lora_with_quantization."""
    config = EngineConfig.from_args(quantization=name)
    plain = dataclasses.replace(tiny_arch(), quantization=None)
    packed = dataclasses.replace(plain, quantization=GPTQConfig(bits=4))
    assert config.resolve(packed, "cpu").quantization_config.quantization == "auto"
    with pytest.raises(ValueError, match=f"quantization='{name}', but the model's weights are not quantised"):
        config.resolve(plain, "cpu")
