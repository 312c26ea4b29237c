"""hf_config: eight public config.json files, both generations of key names, and every refusal (milestone M0)."""

import json
from pathlib import Path
from typing import Any

import pytest

from folovllm.hf_config import ModelArchitecture, RopeConfig, load_hf_config, parse_hf_config

pytestmark = pytest.mark.m0

CONFIGS = Path(__file__).parent.parent / "data" / "configs"

# name, layers, hidden, heads, KV heads, head_dim, vocabulary, KV bytes per token in bf16, parameters.
# The last two worked by hand or taken from the model cards, not printed by the code under test.
PUBLIC = [
    ("SmolLM2-135M-Instruct", 30, 576, 9, 3, 64, 49152, 23_040, 134_515_008),
    ("SmolLM2-360M", 32, 960, 15, 5, 64, 49152, 40_960, 361_821_120),
    ("SmolLM2-1.7B", 24, 2048, 32, 32, 64, 49152, 196_608, 1_711_376_384),
    ("Llama-3.2-1B", 16, 2048, 32, 8, 64, 128256, 32_768, 1_235_814_400),
    ("Llama-3.1-8B", 32, 4096, 32, 8, 128, 128256, 131_072, 8_030_261_248),
    ("Qwen2.5-0.5B-Instruct", 24, 896, 14, 2, 64, 151936, 12_288, 494_032_768),
    ("Qwen3-0.6B", 28, 1024, 16, 8, 128, 151936, 114_688, 596_049_920),
    ("Mistral-7B-v0.3", 32, 4096, 32, 8, 128, 32768, 131_072, 7_248_023_552),
]


def public(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def llama(**changes: Any) -> dict[str, Any]:
    config = public("SmolLM2-135M-Instruct") | changes
    return {key: value for key, value in config.items() if value != "absent"}


@pytest.mark.parametrize("name,layers,hidden,heads,kv_heads,head_dim,vocab,kv_bytes,parameters", PUBLIC)
def test_public_configs(
    name: str, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, vocab: int, kv_bytes: int,
    parameters: int,
) -> None:  # fmt: skip
    arch = parse_hf_config(public(name))
    shape = (arch.num_hidden_layers, arch.hidden_size, arch.num_attention_heads, arch.num_key_value_heads)
    assert (*shape, arch.head_dim, arch.vocab_size) == (layers, hidden, heads, kv_heads, head_dim, vocab)
    assert arch.kv_bytes_per_token(2) == kv_bytes
    assert arch.kv_bytes_per_token(4) == 2 * kv_bytes
    assert arch.num_parameters() == parameters
    assert arch.dtype == "bfloat16"


def test_every_public_config_is_in_the_table() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == {row[0] for row in PUBLIC}


def test_family_traits() -> None:
    traits = {
        name: (a.qkv_bias, a.o_bias, a.mlp_bias, a.qk_norm, a.tie_word_embeddings)
        for name in ("SmolLM2-360M", "Qwen2.5-0.5B-Instruct", "Qwen3-0.6B", "Mistral-7B-v0.3")
        for a in [parse_hf_config(public(name))]
    }
    assert traits == {
        "SmolLM2-360M": (False, False, False, False, True),
        "Qwen2.5-0.5B-Instruct": (True, False, False, False, True),
        "Qwen3-0.6B": (False, False, False, True, True),
        "Mistral-7B-v0.3": (False, False, False, False, False),
    }


def test_llama3_rope() -> None:
    assert parse_hf_config(public("Llama-3.1-8B")).rope == RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert parse_hf_config(public("SmolLM2-1.7B")).rope == RopeConfig(130000.0)


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "Llama-3.2-1B", "Qwen3-0.6B"])
def test_transformers_5_names_mean_the_same(name: str) -> None:
    old = public(name)
    new = {key: value for key, value in old.items() if key not in ("torch_dtype", "rope_theta", "rope_scaling")}
    new["dtype"] = old["torch_dtype"]
    scaling = old["rope_scaling"] or {"rope_type": "default"}
    new["rope_parameters"] = {**scaling, "rope_theta": old["rope_theta"]}
    assert parse_hf_config(new) == parse_hf_config(old)


def test_older_rope_scaling_key() -> None:
    arch = parse_hf_config(llama(rope_scaling={"type": "linear", "factor": 2.0}))
    assert arch.rope == RopeConfig(100000.0, "linear", 2.0)


@pytest.mark.parametrize(
    "eos,generation,expected",
    [
        (2, None, (2,)),
        ([5, 2], None, (5, 2)),
        (None, None, ()),
        (2, {"eos_token_id": [7, 2]}, (2, 7)),
        (None, {"eos_token_id": 3}, (3,)),
        (2, {"temperature": 0.7}, (2,)),
    ],
)
def test_eos(eos: Any, generation: dict[str, Any] | None, expected: tuple[int, ...]) -> None:
    assert parse_hf_config(llama(eos_token_id=eos), generation).eos_token_ids == expected


def test_defaults_of_old_llama_configs() -> None:
    arch = parse_hf_config(
        llama(num_key_value_heads="absent", rope_theta="absent", torch_dtype="absent", head_dim=None)
    )
    assert (arch.num_key_value_heads, arch.rope.theta, arch.dtype, arch.head_dim) == (9, 10000.0, "float32", 64)


def test_head_dim_wins_over_the_quotient() -> None:
    assert parse_hf_config(llama(head_dim=128)).head_dim == 128


def qwen2(**changes: Any) -> dict[str, Any]:
    return public("Qwen2.5-0.5B-Instruct") | changes


def mistral(**changes: Any) -> dict[str, Any]:
    return public("Mistral-7B-v0.3") | changes


@pytest.mark.parametrize(
    "config",
    [
        qwen2(sliding_window=4096),  # set, but use_sliding_window is false
        qwen2(use_sliding_window=True),  # 32768 positions, a window as large
        qwen2(use_sliding_window=True, sliding_window=4096, max_window_layers=24),  # no layer left to slide
        qwen2(use_sliding_window=True, sliding_window=4096, layer_types=["full_attention"] * 24),
        mistral(sliding_window=32768),
    ],
)
def test_inactive_sliding_windows_are_fine(config: dict[str, Any]) -> None:
    assert isinstance(parse_hf_config(config), ModelArchitecture)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

REFUSED = [
    (mistral(sliding_window=4096), r"sliding window of 4096 tokens.*Mistral-7B-v0\.3"),
    (
        mistral(sliding_window=32768, rope_scaling={"rope_type": "yarn", "factor": 4.0}),  # stretched beyond the window
        "sliding window of 32768 tokens within 131072 positions",
    ),
    (qwen2(use_sliding_window=True, sliding_window=4096), "sliding window of 4096 tokens within 32768 positions"),
    (qwen2(sliding_window=4096, layer_types=["full_attention", "sliding_attention"]), "sliding window of 4096"),
    (llama(architectures=["LlamaForCausualLM"]), "found LlamaForCausualLM;.*the nearest is LlamaForCausalLM"),
    (llama(architectures=["Qwen3MoeForCausalLM"]), "the nearest is Qwen3ForCausalLM"),
    (llama(architectures="absent"), "expected 'architectures'.*name one of LlamaForCausalLM"),
    (llama(architectures=[]), "expected 'architectures'"),
    (llama(hidden_size="absent"), "expected 'hidden_size' in config.json; found no such key"),
    (llama(vocab_size=None), "expected 'vocab_size'"),
    (llama(num_hidden_layers=0), "positive integer as 'num_hidden_layers'; found 0"),
    (llama(intermediate_size="1536"), "positive integer as 'intermediate_size'; found '1536'"),
    (llama(num_attention_heads=True), "positive integer as 'num_attention_heads'; found True"),
    (llama(rms_norm_eps=0), "positive number as 'rms_norm_eps'; found 0"),
    (llama(num_key_value_heads=2), "multiple of num_key_value_heads; found 9 and 2"),
    (llama(num_attention_heads=10, num_key_value_heads=5), "divisible by num_attention_heads; found 576 and 10"),
    (llama(head_dim=63), "even head_dim.*63"),
    (llama(hidden_act="gelu"), "hidden_act 'silu'; found 'gelu'"),
    (
        llama(rope_scaling={"rope_type": "longrope", "factor": 4.0}),
        "rope_type of default, linear, dynamic, yarn, llama3; found 'longrope'",
    ),
    (llama(rope_scaling={"rope_type": "linear"}), "expected 'factor'"),
    (llama(rope_scaling=LLAMA3), "expected 'original_max_position_embeddings'"),
    (
        llama(rope_scaling={**LLAMA3, "original_max_position_embeddings": 64, "low_freq_factor": 4.0}),
        "low_freq_factor below high_freq_factor; found 4.0 and 4.0",
    ),
    (llama(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    (llama(torch_dtype="float8_e4m3fn"), "dtype of float32, bfloat16, float16; found 'float8_e4m3fn'"),
    (llama(quantization_config={"quant_method": "awq"}), "unquantised weights; found quantization_config of 'awq'"),
    (qwen2(num_key_value_heads=None), "expected 'num_key_value_heads'"),
    (public("Qwen3-0.6B") | {"head_dim": None}, "expected 'head_dim'"),
]


@pytest.mark.parametrize("config,message", REFUSED)
def test_refusals_name_expected_found_and_fix(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_hf_config(config)
    assert "expected" in str(caught.value) and "to fix it:" in str(caught.value)


def test_load_reads_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama()))
    assert load_hf_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert load_hf_config(tmp_path).eos_token_ids == (2, 9)


@pytest.mark.parametrize(
    "text,message",
    [(None, "expected config.json; found none"), ("{", "valid JSON in config.json"), ("[]", "JSON object.*found list")],
)
def test_load_refuses_unreadable_files(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_hf_config(tmp_path)


def test_load_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama(hidden_act="relu")))
    with pytest.raises(ValueError, match=tmp_path.name):
        load_hf_config(tmp_path)
