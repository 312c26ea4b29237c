"""Milestone M0 without weights: config.json -> architecture -> what its KV cache costs, and errors that name the fix.

Run: python milestones/m0/demo.py
"""

from typing import Any

from folovllm.config import DTYPE_BYTES, EngineConfig
from folovllm.core.kv_cache_utils import make_kv_cache_config
from folovllm.hf_config import parse_hf_config
from folovllm.sampling_params import SamplingParams

# The keys of three public config.json files that decide the shape.
COMMON: dict[str, Any] = {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "tie_word_embeddings": True}
SMOLLM2: dict[str, Any] = COMMON | {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN3: dict[str, Any] = COMMON | {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960,
}  # fmt: skip
QWEN25: dict[str, Any] = COMMON | {
    "architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
}  # fmt: skip

print(f"{'model':<14}{'parameters':>14}{'KV B/token':>12}{'with hidden_size (wrong)':>26}")
for name, config in {"SmolLM2-135M": SMOLLM2, "Qwen3-0.6B": QWEN3, "Qwen2.5-0.5B": QWEN25}.items():
    arch = parse_hf_config(config)
    right = arch.kv_bytes_per_token(DTYPE_BYTES["bfloat16"])
    wrong = 2 * arch.num_hidden_layers * arch.hidden_size * 2
    print(f"{name:<14}{arch.num_parameters():>14,}{right:>12,}{wrong:>18,} ({wrong / right:.0f}x)")
    assert right == {"SmolLM2-135M": 23_040, "Qwen3-0.6B": 114_688, "Qwen2.5-0.5B": 12_288}[name]

engine = EngineConfig.preset("m1", max_model_len=2048).resolve(parse_hf_config(SMOLLM2), device="cpu")
cache = make_kv_cache_config(engine, available_bytes=2**30)
print(f"\nthe engine as of m1: {engine.max_num_seqs} request at a time, cache of {cache}")
assert cache.bytes_per_block == 2048 * 23_040

print("\nwhat a typing error is told:")
for attempt in (
    lambda: EngineConfig.preset("m1", max_num_seq=4),
    lambda: SamplingParams.from_dict({"temprature": 0.7}),
    lambda: EngineConfig.preset("m0"),
    lambda: parse_hf_config(SMOLLM2 | {"architectures": ["GemmaForCausalLM"]}),
):
    try:
        attempt()
        raise AssertionError("it should have been refused")
    except ValueError as error:
        print(f"  {error}")
