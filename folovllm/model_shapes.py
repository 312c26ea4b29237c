"""The shapes of public models by name, for everything that needs a model's numbers and not its weights.

Milestone: M0; the benchmark's random weights, the scheduler's benchmarks and the simulator read it. vLLM counterpart:
none (it reads config.json). Left out: tokenizers and weights.

Row 0: plain data, no torch.
"""

from typing import Any

from folovllm.hf_config import ModelArchitecture, parse_hf_config
from folovllm.utils import unknown_name_message

# Numbers as published; tests compare those whose config.json the project has.
_COLUMNS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "rope_theta"),
)
# fmt: off
_TABLE = {  #                     layers hidden inner  heads K/V size   vocab positions  tied   theta
    "tiny":            ("Llama",    2,    64,    128,   4,  2,  16,     512,    8_192, True,  1e4),  # made for tests
    "smollm2-135m":    ("Llama",   30,   576,  1_536,   9,  3,  64,  49_152,    8_192, True,  1e5),
    "smollm2-360m":    ("Llama",   32,   960,  2_560,  15,  5,  64,  49_152,    8_192, True,  1e5),
    "smollm2-1.7b":    ("Llama",   24, 2_048,  8_192,  32, 32,  64,  49_152,    8_192, True,  1.3e5),
    "qwen2.5-0.5b":    ("Qwen2",   24,   896,  4_864,  14,  2,  64, 151_936,   32_768, True,  1e6),
    "qwen3-0.6b":      ("Qwen3",   28, 1_024,  3_072,  16,  8, 128, 151_936,   40_960, True,  1e6),
    "qwen3-1.7b":      ("Qwen3",   28, 2_048,  6_144,  16,  8, 128, 151_936,   40_960, True,  1e6),
    "qwen3-4b":        ("Qwen3",   36, 2_560,  9_728,  32,  8, 128, 151_936,   40_960, True,  1e6),
    "qwen3-8b":        ("Qwen3",   36, 4_096, 12_288,  32,  8, 128, 151_936,   40_960, False, 1e6),
    "llama-3.2-1b":    ("Llama",   16, 2_048,  8_192,  32,  8,  64, 128_256,  131_072, True,  5e5),
    "llama-3.2-3b":    ("Llama",   28, 3_072,  8_192,  24,  8, 128, 128_256,  131_072, True,  5e5),
    "llama-3.1-8b":    ("Llama",   32, 4_096, 14_336,  32,  8, 128, 128_256,  131_072, False, 5e5),
    "llama-3.1-70b":   ("Llama",   80, 8_192, 28_672,  64,  8, 128, 128_256,  131_072, False, 5e5),
    "mistral-7b-v0.3": ("Mistral", 32, 4_096, 14_336,  32,  8, 128,  32_768,   32_768, False, 1e6),
}
# fmt: on
_LLAMA3_FACTORS = {"llama-3.2-1b": 32.0, "llama-3.2-3b": 32.0, "llama-3.1-8b": 8.0, "llama-3.1-70b": 8.0}


def _config(name: str, family: str, *numbers: float) -> dict[str, Any]:
    """A config.json."""
    config: dict[str, Any] = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6 if family.startswith("Qwen") else 1e-5,
        "sliding_window": None,
        **dict(zip(_COLUMNS, numbers, strict=True)),
    }
    if name in _LLAMA3_FACTORS:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": _LLAMA3_FACTORS[name],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config


SHAPES = {name: _config(name, *row) for name, row in _TABLE.items()}


def shape_config(name: str) -> dict[str, Any]:
    """The config.json of that shape. Raises ValueError with the nearest name if there is none."""
    if name in SHAPES:
        return SHAPES[name]
    raise ValueError(unknown_name_message("shape", name.lower().rsplit("/")[-1], list(SHAPES)))


def shape_architecture(name: str) -> ModelArchitecture:
    return parse_hf_config(shape_config(name))
