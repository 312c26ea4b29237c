"""`hf_overrides`: values that replace those of config.json before it is understood.

Milestone: M0. vLLM counterpart: ModelConfig.hf_overrides (vllm/config/model.py). Left out: a function as the override.

Row 0: plain data, no torch.
"""

from collections.abc import Mapping
from typing import Any

from folovllm.hf_json import ConfigError
from folovllm.utils import nearest_name

# Keys that transformers 4 and 5 spell differently: an override under either name replaces both.
_OTHER_NAME = {"dtype": "torch_dtype", "torch_dtype": "dtype"}
_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
# What hf_config.py reads and a config.json may well leave out.
_OPTIONAL_KEYS = (
    *("architectures", "attention_bias", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act"),
    *("layer_types", "max_window_layers", "mlp_bias", "model_type", "num_key_value_heads", "quantization_config"),
    *("original_max_position_embeddings", "partial_rotary_factor", "rms_norm_eps", "sliding_window", "text_config"),
    *("tie_word_embeddings", "torch_dtype", "use_sliding_window", *_ROPE_KEYS),
)


def check_overrides(overrides: Any) -> None:
    """ValueError unless `overrides` is a dict with names as keys."""
    if not isinstance(overrides, Mapping) or not all(isinstance(key, str) for key in overrides):
        example = "{'max_position_embeddings': 4096}"
        raise ValueError(f"hf_overrides must be a dict of keys of config.json like {example}, got {overrides!r}")


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A new config with the values of `overrides`. Nested objects are merged, key by key; null removes a value.

    E.g. `rope_scaling` with rope_type="yarn" and factor=4.0 stretches a model's context and keeps its `rope_theta`.
    ConfigError for a key that neither config.json has nor FoloVLLM reads: the override would change nothing.
    """
    result = dict(config)
    for key, value in overrides.items():
        if key not in config and key not in _OPTIONAL_KEYS:
            near = nearest_name(key, [*config, *_OPTIONAL_KEYS], cutoff=0.5)
            hint = f"did you mean {near!r}?" if near else "remove it"
            raise ConfigError(f"hf_overrides: {key!r} is no key of config.json; {hint}")
        if key in _ROPE_KEYS:
            _override_rope(result, key, value)
        else:
            result.pop(_OTHER_NAME.get(key, ""), None)
            result[key] = _merge(config.get(key), value)
    return result


def _override_rope(config: dict[str, Any], key: str, value: Any) -> None:
    """transformers 4 and 5 keep rotary settings in different places: whichever the config has, the override wins."""
    before = config.pop("rope_parameters", None) or config.pop("rope_scaling", None) or {}
    config.pop("rope_scaling", None)
    theta = before.get("rope_theta") or config.get("rope_theta")
    if key == "rope_theta":
        config["rope_theta"] = value
        config["rope_parameters"] = {**before, "rope_theta": value}
        return
    value = value or {}
    kind = value.get("rope_type") or value.get("type")
    same_kind = kind is None or kind == (before.get("rope_type") or before.get("type") or "default")
    # The settings of another rope type mean nothing to the new one, but the base holds for both.
    kept = before if value and same_kind else {}
    config["rope_parameters"] = {**({"rope_theta": theta} if theta else {}), **kept, **value}


def _merge(old: Any, new: Any) -> Any:
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return new
    return {**old, **{key: _merge(old.get(key), value) for key, value in new.items()}}
