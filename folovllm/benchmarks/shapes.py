"""Shapes of public models: what their config.json says, and nothing of their weights.

Milestone: M4. vLLM counterpart: `load_format="dummy"` (which still needs the config of a downloaded model). The speed
of a model depends on its shape and not on what its weights say, so a GPU without network can be measured on any of
these. Numbers as published; tests compare those whose config.json the project has. No torch.
"""

import difflib
from typing import Any

from folovllm.hf_config import ModelArchitecture, parse_hf_config

_COMMON: dict[str, Any] = {"hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(
    family: str,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: tuple[int, int, int],
    vocab: int,
    positions: int,
    tied: bool,
    theta: float,
    eps: float = 1e-5,
    **more: Any,
) -> dict[str, Any]:
    """A config.json. `heads`: query heads, K/V heads, head size."""
    return _COMMON | {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "rms_norm_eps": eps,
        **more,
    }


def _qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool) -> dict[str, Any]:
    return _shape("Qwen3", layers, hidden, intermediate, (heads, 8, 128), 151_936, 40_960, tied, 1e6, 1e-6)


def _llama3(layers: int, hidden: int, intermediate: int, heads: int, size: int, tied: bool, factor: float) -> Any:
    rope = _LLAMA3_ROPE | {"factor": factor}
    return _shape(
        "Llama", layers, hidden, intermediate, (heads, 8, size), 128_256, 131_072, tied, 5e5, rope_scaling=rope
    )


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape("Llama", 2, 64, 128, (4, 2, 16), 512, 8192, True, 1e4),  # no public model: for tests
    "smollm2-135m": _shape("Llama", 30, 576, 1536, (9, 3, 64), 49_152, 8192, True, 1e5),
    "smollm2-360m": _shape("Llama", 32, 960, 2560, (15, 5, 64), 49_152, 8192, True, 1e5),
    "smollm2-1.7b": _shape("Llama", 24, 2048, 8192, (32, 32, 64), 49_152, 8192, True, 130_000),
    "qwen2.5-0.5b": _shape("Qwen2", 24, 896, 4864, (14, 2, 64), 151_936, 32_768, True, 1e6, 1e-6),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12_288, 32, tied=False),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, 64, tied=True, factor=32.0),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, 128, tied=True, factor=32.0),
    "llama-3.1-8b": _llama3(32, 4096, 14_336, 32, 128, tied=False, factor=8.0),
    "mistral-7b-v0.3": _shape(
        "Mistral", 32, 4096, 14_336, (32, 8, 128), 32_768, 32_768, False, 1e6, sliding_window=None
    ),
}


def shape_config(name: str) -> dict[str, Any]:
    """The config.json of that shape; ValueError with the nearest name if there is none."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower().rsplit("/")[-1], SHAPES, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown shape {name!r}; there are {', '.join(SHAPES)}{hint}")


def shape_architecture(name: str) -> ModelArchitecture:
    return parse_hf_config(shape_config(name))
