"""Reading a HuggingFace config.json: the one module that knows its key names.

Milestone: M0. vLLM counterpart: vllm/transformers_utils/config.py and ModelConfig's getters. Left out: configs that
need remote code, multimodal sub-configs, architectures other than SUPPORTED_ARCHITECTURES.

Row 0: plain data, no torch. transformers renames keys between its versions (`torch_dtype` became `dtype`; `rope_theta`
and `rope_scaling` became `rope_parameters`), so nothing else in the engine looks into that dictionary. Rotary settings
have a module of their own, rope_config.py; sampling defaults are read by generation_config.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.generation_config import GENERATION_FILE, eos_token_ids, read_generation_config
from folovllm.gptq_config import GPTQConfig
from folovllm.hf_json import ConfigError, positive_float, positive_int, read_json, refuse
from folovllm.hf_overrides import apply_overrides
from folovllm.rope_config import RopeConfig, parse_rope
from folovllm.utils import nearest_name

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelArchitecture:
    """The shape of a model, in names that do not change between transformers versions."""

    architecture: str  # e.g. "LlamaForCausalLM": the key of the model registry
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str  # "float32" | "bfloat16" | "float16"
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # config.json's first, then those that generation_config.json adds
    quantization: GPTQConfig | None = None  # how the checkpoint's linear layers are quantised (M7)

    @property
    def max_context_len(self) -> int:
        """Tokens that the model can hold, prompt and output together: rope scaling may stretch its positions."""
        return self.rope.max_model_len(self.max_position_embeddings)

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of KV cache one token takes: K and V, in every layer.

        E.g. SmolLM2-135M in bf16: 2 * 30 layers * 3 KV heads * 64 * 2 bytes = 23,040.
        """
        return 2 * self.num_hidden_layers * self.kv_size * dtype_bytes

    def num_parameters(self) -> int:
        """Weights of the model, tied embeddings counted once."""
        embedding = self.vocab_size * self.hidden_size
        embeddings = embedding if self.tie_word_embeddings else 2 * embedding
        return embeddings + self.num_hidden_layers * self._layer_parameters() + self.hidden_size  # + the final norm

    def _layer_parameters(self) -> int:
        qkv_size = self.q_size + 2 * self.kv_size
        attention = self.hidden_size * (qkv_size + self.q_size)
        attention += qkv_size * self.qkv_bias + self.hidden_size * self.o_bias + 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        return attention + mlp + 2 * self.hidden_size  # + the two norms


def load_hf_config(
    folder: Path, hf_overrides: Mapping[str, Any] | None = None, generation_config: str = "auto"
) -> ModelArchitecture:
    """Read `folder`/config.json and the generation config. ConfigError says what is wrong with either.

    `hf_overrides` replaces values of config.json before it is understood; `generation_config` names the folder of
    another generation_config.json, or is "auto" or "vllm": then the one beside config.json names the end-of-text ids.
    """
    path = folder / "config.json"
    try:
        if not path.is_file():
            refuse("config.json", f"none in {folder}", "pass the folder of a HuggingFace model")
        config = _with_quantize_config(read_json(path), folder / "quantize_config.json")
        config = apply_overrides(config, hf_overrides or {})
        return parse_hf_config(config, read_generation_config(folder, generation_config))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None


def parse_hf_config(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelArchitecture:
    """Translate config.json (written by transformers 4 or 5) into our names. ConfigError if we cannot run the model."""
    architecture = _architecture(config)
    _check_supported(config)
    is_llama, is_qwen2, is_qwen3 = (architecture.startswith(name) for name in ("Llama", "Qwen2", "Qwen3"))
    attention_bias = (is_llama or is_qwen3) and bool(config.get("attention_bias"))
    hidden_size, num_heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    return ModelArchitecture(
        architecture=architecture,
        model_type=str(config.get("model_type", "")),
        num_hidden_layers=positive_int(config, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=positive_int(config, "intermediate_size"),
        num_attention_heads=num_heads,
        # Only Llama's default is "as many as query heads"; the others' defaults changed with the version.
        num_key_value_heads=_kv_heads(config, num_heads, default=num_heads if is_llama else None),
        head_dim=_head_dim(config, hidden_size, num_heads, required=is_qwen3),
        vocab_size=positive_int(config, "vocab_size"),
        max_position_embeddings=positive_int(config, "max_position_embeddings"),
        rms_norm_eps=positive_float(config, "rms_norm_eps"),
        rope=parse_rope(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=is_qwen2 or attention_bias,
        o_bias=attention_bias,
        mlp_bias=is_llama and bool(config.get("mlp_bias")),
        qk_norm=is_qwen3,
        dtype=_dtype(config),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_eos_token_ids(config, generation_config or {}),
        quantization=_quantization(config),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    known = ", ".join(SUPPORTED_ARCHITECTURES)
    if not isinstance(names, list) or not names:
        refuse("'architectures' in config.json", repr(names), f"name one of {known} there")
    name = str(names[0])
    if name not in SUPPORTED_ARCHITECTURES:
        near = nearest_name(name, SUPPORTED_ARCHITECTURES, cutoff=0.0)
        refuse(f"one of the architectures {known}", name, f"use a model of one of these; the nearest is {near}")
    return name


def _check_supported(config: Mapping[str, Any]) -> None:
    """Refuse what would load and then quietly answer wrongly."""
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        refuse("hidden_act 'silu'", repr(activation), "use a model with a SwiGLU MLP; no other activation is written")
    window = _active_sliding_window(config)
    if window is not None:
        todo = (
            "use a model with full attention (e.g. Mistral-7B-v0.3), or, as the window changes nothing within itself, "
            f"set 'sliding_window': null and 'max_position_embeddings': {window} in config.json to run that far"
        )
        refuse("full attention", f"a sliding window of {window} tokens within {_context_len(config)} positions", todo)


def _with_quantize_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """AutoGPTQ before 0.5 wrote its settings into a file of their own, and nothing into config.json."""
    if config.get("quantization_config") is None and path.is_file():
        return {**config, "quantization_config": {"quant_method": "gptq", **read_json(path)}}
    return config


def _quantization(config: Mapping[str, Any]) -> GPTQConfig | None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else quantization
    if not isinstance(method, str) or method.lower() != "gptq":
        todo = "use the unquantised model, or a GPTQ version of it"
        refuse("GPTQ or unquantised weights", f"quantization_config of {method!r}", todo)
    try:
        return GPTQConfig.from_json(quantization, bool(config.get("tie_word_embeddings", False)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _active_sliding_window(config: Mapping[str, Any]) -> int | None:
    """Returns the window if a layer would use it, and None if it is absent, switched off or never reached."""
    window = config.get("sliding_window")
    if window is None or window >= _context_len(config):
        return None
    if config.get("layer_types") is not None:
        return window if "sliding_attention" in config["layer_types"] else None
    if not str(config.get("model_type", "")).startswith("qwen"):
        return int(window)  # Mistral: a window that is set is used
    # Qwen: off by default, and only layers from max_window_layers on would slide.
    used = config.get("use_sliding_window", False) and config.get("max_window_layers", 0) < config["num_hidden_layers"]
    return int(window) if used else None


def _context_len(config: Mapping[str, Any]) -> int:
    """The positions that the model can reach: rope scaling may stretch them beyond the window."""
    return parse_rope(config).max_model_len(positive_int(config, "max_position_embeddings"))


def _kv_heads(config: Mapping[str, Any], num_heads: int, default: int | None) -> int:
    missing = config.get("num_key_value_heads") is None
    num_kv_heads = default if missing and default is not None else positive_int(config, "num_key_value_heads")
    if num_heads % num_kv_heads != 0:
        expected = "num_attention_heads to be a multiple of num_key_value_heads"
        refuse(expected, f"{num_heads} and {num_kv_heads}", "correct config.json or download it again")
    return num_kv_heads


def _head_dim(config: Mapping[str, Any], hidden_size: int, num_heads: int, required: bool) -> int:
    if config.get("head_dim") is None and not required:
        if hidden_size % num_heads != 0:
            expected = "'head_dim', or a hidden_size divisible by num_attention_heads"
            refuse(expected, f"{hidden_size} and {num_heads}", "add 'head_dim' to config.json")
        return hidden_size // num_heads
    head_dim = positive_int(config, "head_dim")
    if head_dim % 2 != 0:
        refuse("an even head_dim (rotary embedding turns pairs)", str(head_dim), "correct config.json")
    return head_dim


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        refuse(f"a dtype of {', '.join(DTYPES)}", repr(value), "set 'torch_dtype' in config.json to one of them")
    return name


def _eos_token_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The model's own first, then those that generation_config adds. E.g. 2 and [2, 7] -> (2, 7)."""
    own = config.get("eos_token_id")
    if own is None and isinstance(config.get("text_config"), Mapping):  # as in configs of multimodal models
        own = config["text_config"].get("eos_token_id")
    ids = eos_token_ids(own, "config.json") + eos_token_ids(generation_config.get("eos_token_id"), GENERATION_FILE)
    return tuple(dict.fromkeys(ids))  # without repetitions, order kept
