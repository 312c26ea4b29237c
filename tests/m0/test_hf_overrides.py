"""`hf_overrides`: values of config.json changed by hand, under the key names of either transformers version."""

import json
from pathlib import Path
from typing import Any

import pytest

from folovllm.hf_config import ModelArchitecture, load_hf_config, parse_hf_config
from folovllm.hf_overrides import apply_overrides

pytestmark = pytest.mark.m0

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def public(name: str, version: int) -> dict[str, Any]:
    """config.json as transformers 4 or 5 writes it."""
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    if version == 5:
        theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling", None)
        config["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
        config["dtype"] = config.pop("torch_dtype")
    return config


def overridden(name: str, version: int, **overrides: Any) -> ModelArchitecture:
    return parse_hf_config(apply_overrides(public(name, version), overrides))


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_yarn_is_switched_on_and_the_base_stays(version: int, key: str) -> None:
    """What Qwen's model cards ask of vLLM's users."""
    arch = overridden("Qwen3-0.6B", version, **{key: YARN}, max_position_embeddings=131072)
    assert (arch.rope.rope_type, arch.rope.theta, arch.max_context_len) == ("yarn", 1000000.0, 131072)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaling_is_switched_off_with_null(version: int, key: str) -> None:
    arch = overridden("Llama-3.1-8B", version, **{key: None})
    assert (arch.rope.rope_type, arch.rope.theta) == ("default", 500000.0)


@pytest.mark.parametrize("version", [4, 5])
def test_one_value_of_a_scaling_can_be_changed(version: int) -> None:
    before = parse_hf_config(public("Llama-3.1-8B", version)).rope
    arch = overridden("Llama-3.1-8B", version, rope_scaling={"factor": 32.0})
    assert arch.rope.factor == 32.0 and arch.rope.low_freq_factor == before.low_freq_factor
    assert arch.rope.rope_type == "llama3"


@pytest.mark.parametrize("version", [4, 5])
def test_theta_is_changed_and_the_scaling_stays(version: int) -> None:
    arch = overridden("Llama-3.1-8B", version, rope_theta=123.0)
    assert (arch.rope.theta, arch.rope.rope_type) == (123.0, "llama3")


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype(version: int, key: str) -> None:
    assert overridden("Qwen3-0.6B", version, **{key: "float16"}).dtype == "float16"


def test_plain_values_and_nested_ones() -> None:
    assert overridden("Qwen3-0.6B", 4, tie_word_embeddings=False, eos_token_id=[1, 2]).eos_token_ids == (1, 2)
    config = {"quantization_config": {"bits": 4, "group_size": 128}, "text_config": {"a": {"b": 1, "c": 2}}}
    changed = apply_overrides(config, {"quantization_config": {"bits": 8}, "text_config": {"a": {"b": 3}}})
    assert changed["quantization_config"] == {"bits": 8, "group_size": 128}
    assert changed["text_config"] == {"a": {"b": 3, "c": 2}}
    assert config["text_config"] == {"a": {"b": 1, "c": 2}}, "the original must stay as it is"


def test_a_key_that_would_change_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(public("Qwen3-0.6B", 4)))
    with pytest.raises(
        ValueError, match=r"'max_position_embedings' is no key .*did you mean 'max_position_embeddings'"
    ):
        load_hf_config(tmp_path, {"max_position_embedings": 64})


def test_the_result_is_checked_like_any_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(public("Qwen3-0.6B", 4)))
    with pytest.raises(ValueError, match="positive integer as 'vocab_size'; found -1"):
        load_hf_config(tmp_path, {"vocab_size": -1})
