"""The checks of m0/kv_budget: four real models, then the three rules for the number of blocks."""

import random
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheBudget
from folovllm.hf_config import ModelArchitecture, parse_hf_config
from folovllm.learn.check import Mine, check

# name -> (layers, hidden_size, query heads, KV heads, head_dim, bytes per token in bf16), from the models' config.json
MODELS = {
    "SmolLM2-135M": (30, 576, 9, 3, 64, 23_040),
    "Qwen2.5-0.5B": (24, 896, 14, 2, 64, 12_288),
    "Qwen3-0.6B": (28, 1024, 16, 8, 128, 114_688),
    "Llama-3.1-8B": (32, 4096, 32, 8, 128, 131_072),
}
BF16, FP32 = 2, 4  # bytes per number


def make_arch(name: str) -> ModelArchitecture:
    layers, hidden, heads, kv_heads, head_dim, _ = MODELS[name]
    return parse_hf_config({
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": hidden, "head_dim": head_dim,
        "intermediate_size": 4 * hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": 1000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    })  # fmt: skip


def make_config(**args: Any) -> EngineConfig:
    return EngineConfig.preset("m3", **args).resolve(make_arch("SmolLM2-135M"), "cpu")


def prediction() -> str:
    budget = KVCacheBudget()
    per_token = budget.bytes_per_token(make_arch("Qwen2.5-0.5B"), BF16)
    blocks = budget.num_blocks(make_config(kv_cache_memory=256 * 2**20), 0, 16 * per_token)
    sums = "2 (K and V) * 24 layers * 2 heads * 64 numbers * 2 bytes, and 16 tokens to a block."
    return f"{per_token:,} bytes per token, and {blocks:,} blocks\n{sums}"


@check("unit", spec="R0.5", hint=1)
def four_real_models(mine: Mine) -> None:
    """A token adds K and V in every layer: one vector of head_dim numbers per KV head, not per query head."""
    for name, (layers, hidden, heads, kv_heads, head_dim, expected) in MODELS.items():
        got = mine.cls().bytes_per_token(make_arch(name), BF16)
        by_hidden_size = 2 * layers * hidden * BF16
        by_quotient = 2 * layers * kv_heads * (hidden // heads) * BF16
        why = " (2 * layers * hidden_size counts query heads)" if got == by_hidden_size else ""
        why = (
            " (hidden_size // query heads is not always the head_dim; use arch.head_dim)" if got == by_quotient else why
        )
        assert got == expected, (
            f"{name} in bf16: {got:,} bytes per token, expected {expected:,}{why}. It has {layers} layers and "
            f"{kv_heads} KV heads of {head_dim} numbers. A wrong figure wastes memory or runs out of it"
        )


@check("unit", spec="R0.5", hint=2)
def float32_takes_twice_the_bytes(mine: Mine) -> None:
    """The size of a number counts: float32 takes twice the bytes of bf16."""
    arch = make_arch("Llama-3.1-8B")
    small, large = mine.cls().bytes_per_token(arch, BF16), mine.cls().bytes_per_token(arch, FP32)
    assert large == 2 * small, f"dtype_bytes 2 gives {small:,} bytes and dtype_bytes 4 gives {large:,}, expected double"


@check("unit", spec="R1.13", hint=2)
def an_explicit_count_decides(mine: Mine) -> None:
    """num_kv_blocks decides alone, and kv_cache_memory decides over the memory that is free."""
    config = make_config(max_model_len=64, num_kv_blocks=7, kv_cache_memory=50_000)
    got = mine.cls().num_blocks(config, available_bytes=10**9, bytes_per_block=1000)
    assert got == 7, f"num_kv_blocks=7 with 10**9 bytes free gives {got} blocks, expected 7: the user's count decides"
    config = make_config(max_model_len=64, kv_cache_memory=50_000)
    got = mine.cls().num_blocks(config, available_bytes=10**9, bytes_per_block=1000)
    assert got == 50, f"kv_cache_memory=50,000 in blocks of 1,000 bytes gives {got} blocks, expected 50"


@check("unit", spec="R1.13", hint=2)
def a_part_of_a_block_does_not_fit(mine: Mine) -> None:
    """The cache never takes more bytes than it was given."""
    config = make_config(max_model_len=64, kv_cache_memory=4_999)
    got = mine.cls().num_blocks(config, available_bytes=10**9, bytes_per_block=1000)
    assert got == 4, (
        f"kv_cache_memory=4,999 in blocks of 1,000 bytes gives {got} blocks, expected 4: 5 blocks take 5,000 bytes, "
        "which is more memory than there is"
    )


@check("unit", spec="R1.13", hint=3)
def no_more_than_can_be_used(mine: Mine) -> None:
    """Free memory that no request can ever use is left alone; the null block is counted beside the usable ones."""
    config = make_config(max_model_len=100, max_num_seqs=3)
    got = mine.cls().num_blocks(config, available_bytes=10**12, bytes_per_block=1000)
    assert got == 22, (
        f"100 tokens in blocks of 16 fill 6 blocks and a part of the 7th, so 3 requests of this length use 3 * 7 = 21 "
        f"blocks; with plenty of memory the count is {got}, expected 22 (with the null block). More is wasted memory, "
        "less makes the last request wait"
    )


@check("property", spec="R1.13", hint=2)
def the_count_is_the_largest_that_fits(mine: Mine) -> None:
    """For any memory: the blocks fit, and one more either would not fit or could never be used."""
    rng = random.Random(0)
    for size in range(1, 60):
        seqs, length, per_block = rng.randint(1, size), rng.randint(16, 16 * size), rng.randint(1, 1000)
        available = rng.randint(0, per_block * 20 * size)
        config = make_config(max_num_seqs=seqs, max_model_len=length)
        got = mine.cls().num_blocks(config, available, per_block)
        case = f"max_num_seqs={seqs}, max_model_len={length}, {available:,} bytes in blocks of {per_block:,}"
        usable = seqs * -(-length // 16)
        assert got * per_block <= available, f"{case}: {got} blocks take {got * per_block:,} bytes, which do not fit"
        assert got <= usable + 1, f"{case}: {got} blocks, but {usable} and the null block are all that can be in use"
        assert got == usable + 1 or (got + 1) * per_block > available, f"{case}: {got} blocks, and one more would fit"
