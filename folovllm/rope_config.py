"""RopeConfig: how a model turns positions into angles, read from `rope_parameters` or `rope_scaling` of config.json.

Milestone: M0. vLLM counterpart: patch_rope_parameters (vllm/transformers_utils/config.py) and _get_and_verify_max_len
(vllm/config/model.py). Left out: longrope, multimodal sections (mrope), rotation of a part of the head.

Row 0: plain data, no torch. The angles themselves are computed in model_executor/layers/rotary_embedding.py.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from folovllm.hf_json import CORRECT_IT, positive_float, positive_int, refuse

logger = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},  # the second is not read, neither here nor elsewhere
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate", "finetuned"),
    },
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
# Keys that other programs act on: a model with one of them would load here and answer differently.
_REFUSED_KEYS = ("alpha", "attn_factor", "extrapolation_factor", "mixed_b", "mrope_section", "short_factor")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base, and how it is stretched beyond the context that the model was trained on."""

    theta: float = 10000.0
    rope_type: str = "default"  # one of ROPE_TYPES
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 8192  # dynamic, llama3, yarn: the context before it was stretched
    attention_factor: float = 1.0  # yarn: scales cos and sin, so that long contexts keep the attention sharp
    beta_fast: float = 32.0  # yarn: pairs that turn at least this often in the original context keep their speed
    beta_slow: float = 1.0  # yarn: pairs that turn at most this often are slowed by the whole factor
    truncate: bool = True  # yarn: round these bounds to whole pairs

    def max_model_len(self, max_position_embeddings: int) -> int:
        """Tokens of context that the model can hold. E.g. yarn with factor 4 over 32,768 tokens -> 131,072.

        Linear and dynamic scaling multiply `max_position_embeddings`, yarn multiplies the original context; in a Llama
        3.1 config `max_position_embeddings` already is the stretched one. vLLM derives the same lengths.
        """
        if self.rope_type == "yarn":
            return int(self.original_max_position_embeddings * self.factor)
        if self.rope_type in ("linear", "dynamic"):
            return int(max_position_embeddings * self.factor)
        return max_position_embeddings

    def long_request_offset(self, max_model_len: int) -> int | None:
        """Returns the first row of the angles for long requests, or None if all requests have the same frequencies.

        Under dynamic scaling transformers computes the frequencies anew from the length that a text has reached, and
        turns the keys in its cache by the frequencies of earlier steps. Blocks of a KV cache are shared and kept, so
        here a request has one set of frequencies: the plain ones if it ends within the original context, as in
        transformers; else those of a text of `max_model_len` tokens, as in vLLM (which uses them for short requests,
        too).
        """
        original = self.original_max_position_embeddings
        return original if self.rope_type == "dynamic" and max_model_len > original else None

    def position_offset(self, length: int, max_model_len: int) -> int:
        """What to add to the positions of a text that may reach `length` tokens, to look up its angles."""
        offset = self.long_request_offset(max_model_len)
        return 0 if offset is None or length <= offset else offset


def parse_rope(config: Mapping[str, Any]) -> RopeConfig:
    """From config.json, as transformers 4 writes it (`rope_theta` beside `rope_scaling`) or 5 (`rope_parameters`)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        refuse("an object as 'rope_scaling'", repr(scaling), CORRECT_IT)
    scaling = _of_every_layer(scaling)
    theta = positive_float({"rope_theta": scaling.get("rope_theta") or config.get("rope_theta")}, "rope_theta", 10000.0)
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        todo = "use a model without it; where it only serves long contexts, delete 'rope_scaling' from config.json"
        refuse(f"a rope_type of {', '.join(ROPE_TYPES)}", repr(rope_type), todo)
    _check_keys(rope_type, scaling)
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        refuse("rotary embedding over the whole head", f"partial_rotary_factor {partial}", "use another model")
    return _PARSERS[rope_type](theta, scaling, config)


def _of_every_layer(scaling: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings themselves where transformers 5 nests them by kind of layer; they must be the same for each kind."""
    nested = [value for value in scaling.values() if isinstance(value, Mapping)]
    if not nested:
        return scaling
    if any(value != nested[0] for value in nested):
        refuse(
            "one rotary embedding for all layers", f"{len(nested)} of them in 'rope_parameters'", "use another model"
        )
    return nested[0]


def _check_keys(rope_type: str, scaling: Mapping[str, Any]) -> None:
    for key in _REFUSED_KEYS:
        if scaling.get(key) not in (None, 1, 1.0):
            refuse(f"rope_type {rope_type!r} with its own keys", f"{key!r}: {scaling[key]!r}", "use another model")
    unknown = sorted(set(scaling) - _COMMON_KEYS - _KEYS[rope_type] - set(_REFUSED_KEYS))
    if unknown:
        logger.warning("config.json: rope_type %r has no use for %s: ignored", rope_type, ", ".join(unknown))


def _default(theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> RopeConfig:
    return RopeConfig(theta)


def _linear(theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> RopeConfig:
    return RopeConfig(theta, "linear", factor=positive_float(scaling, "factor"))


def _dynamic(theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> RopeConfig:
    original = positive_int(config, "max_position_embeddings")
    return RopeConfig(theta, "dynamic", positive_float(scaling, "factor"), original_max_position_embeddings=original)


def _llama3(theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> RopeConfig:
    keys = ("factor", "low_freq_factor", "high_freq_factor")
    factor, low, high = (positive_float(scaling, key) for key in keys)
    original = positive_float(_with_original(scaling, config), "original_max_position_embeddings")
    if low >= high:
        refuse("low_freq_factor below high_freq_factor", f"{low} and {high}", "correct rope_scaling in config.json")
    return RopeConfig(theta, "llama3", factor, low, high, int(original))


def _yarn(theta: float, scaling: Mapping[str, Any], config: Mapping[str, Any]) -> RopeConfig:
    positions = positive_int(config, "max_position_embeddings")
    original = positive_float(_with_original(scaling, config), "original_max_position_embeddings", float(positions))
    factor = positive_float(scaling, "factor", positions / original)  # DeepSeek's configs give the two lengths only
    fast, slow = positive_float(scaling, "beta_fast", 32.0), positive_float(scaling, "beta_slow", 1.0)
    if fast < slow:
        refuse("beta_fast of at least beta_slow", f"{fast} and {slow}", "correct rope_scaling in config.json")
    truncate = scaling.get("truncate", True)
    if not isinstance(truncate, bool):
        refuse("true or false as 'truncate'", repr(truncate), CORRECT_IT)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position_embeddings=int(original),
        attention_factor=positive_float(scaling, "attention_factor", _yarn_attention_factor(scaling, factor)),
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
    )


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """1 + 0.1 * ln(factor), as the YaRN paper recommends (equation 22), or the ratio that `mscale` asks for."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(positive_float(scaling, "mscale")) / scale(positive_float(scaling, "mscale_all_dim"))
    return scale(1.0)


def _with_original(scaling: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`scaling`, with the original context from the top level of config.json where that has it (as transformers)."""
    original = config.get("original_max_position_embeddings")
    return scaling if original is None else {**scaling, "original_max_position_embeddings": original}


_PARSERS = {"default": _default, "linear": _linear, "dynamic": _dynamic, "yarn": _yarn, "llama3": _llama3}
