"""The checks of m10/sizing: a toy by hand, real models on real GPUs, then the simulator's engines."""

from typing import Any

from folovllm.hf_config import ModelArchitecture, parse_hf_config
from folovllm.learn.check import Mine, check
from folovllm.model_shapes import shape_architecture
from folovllm.sim.hardware import HARDWARE, Hardware
from folovllm.sim.sizing import Sizing

H100 = HARDWARE["h100"]


def toy_arch(kv_heads: int = 2) -> ModelArchitecture:
    return parse_hf_config({
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 10, "hidden_size": 32, "head_dim": 8,
        "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": kv_heads, "vocab_size": 1000,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    })  # fmt: skip


def toy(mine: Mine, memory: float, kv_heads: int = 2, **args: Any) -> Any:
    return mine.cls(toy_arch(kv_heads), Hardware("toy", 1.0, 1.0, memory, ""), **args)


def prediction() -> str:
    tp_size, engines = Sizing(shape_architecture("llama-3.1-70b"), H100).split(8, 64 * 4_000)
    tokens = {size: Sizing(shape_architecture("llama-3.1-70b"), H100).kv_tokens(size) for size in (1, 2, 4, 8)}
    held = ", ".join(f"{size} GPUs hold {count:,} tokens" for size, count in tokens.items())
    return f"{tp_size} GPUs per engine, {engines} engines\n{held}; 64 * 4,000 are needed"


@check("unit", spec="R10.41", hint=2)
def weights_are_divided_and_so_are_heads(mine: Mine) -> None:
    """Each of two GPUs has half of the weights and one of two KV heads."""
    weights = 2 * toy_arch().num_parameters()
    per_token = 2 * 10 * 1 * 8 * 2
    memory = (weights / 2 + 1_000 * per_token) / 0.9 + 1
    got = toy(mine, memory).kv_tokens(2)
    assert got == 1_000, (
        f"2 GPUs, each with half of the weights ({weights / 2:,.0f} bytes) and room for 1,000 tokens of {per_token} "
        "bytes "
        f"(10 layers, K and V, one head of 8 numbers, 2 bytes): {got:,} tokens, expected 1,000"
    )


@check("unit", spec="R10.41", hint=3)
def a_head_is_not_divided(mine: Mine) -> None:
    """With more GPUs than KV heads, a GPU still holds a whole head."""
    weights = 2 * toy_arch().num_parameters()
    memory = (weights / 4 + 1_000 * 320) / 0.9 + 1
    got = toy(mine, memory).kv_tokens(4)
    assert got == 1_000, (
        "4 GPUs and 2 KV heads: each GPU holds one head, 320 bytes per token, and has room for 1,000 tokens; "
        "kv_tokens(4) "
        f"is {got:,}. Half a head does not exist: two GPUs hold the same one"
    )


@check("unit", spec="R10.41", hint=3)
def weights_that_do_not_fit_leave_nothing(mine: Mine) -> None:
    """If the weights do not fit, there is no cache, and no negative one."""
    got = toy(mine, memory=1_000.0).kv_tokens(1)
    assert got == 0, f"a GPU of 1,000 bytes cannot hold the weights; kv_tokens(1) is {got}, expected 0"


@check("unit", spec="R10.41", hint=2)
def a_tenth_is_for_activations(mine: Mine) -> None:
    """Of each GPU's memory, 90 % may hold weights and cache; small weights and small numbers take less of it."""
    weights, memory = toy_arch().num_parameters(), 10e6
    expected = int((0.9 * memory - weights / 2) // 640)
    got = toy(mine, memory, weight_bits=4).kv_tokens(1)
    assert got == expected, (
        f"a GPU of 10 MB, weights of 4 bits ({weights / 2:,.0f} bytes), 640 bytes per token: {got:,} tokens, expected "
        f"{expected:,}. If all memory were used, the first long prompt would have no room for its activations"
    )
    got, expected = toy(mine, memory, dtype_bytes=1).kv_tokens(1), int((0.9 * memory - 2 * weights) // 320)
    assert got == expected, f"with K and V of 1 byte: {got:,} tokens, expected {expected:,}"


@check("unit", spec="R10.41", hint=2)
def real_models_on_an_h100(mine: Mine) -> None:
    """Qwen3-8B fits into one H100. Llama-3.1-70B fits into two, with room for two long conversations."""
    for model, tp_size in (("qwen3-8b", 1), ("llama-3.1-70b", 1), ("llama-3.1-70b", 2), ("llama-3.1-70b", 8)):
        arch = shape_architecture(model)
        got, expected = mine.cls(arch, H100).kv_tokens(tp_size), Sizing(arch, H100).kv_tokens(tp_size)
        assert got == expected, f"{model} on {tp_size} x H100: {got:,} tokens of KV cache, expected {expected:,}"


@check("unit", spec="R10.41", hint=2)
def the_smallest_engine_that_is_large_enough(mine: Mine) -> None:
    """As few GPUs per engine as possible, and as many engines as there are GPUs for."""
    sizing = mine.cls(shape_architecture("llama-3.1-70b"), H100)
    for num_gpus, tokens, expected in (
        (8, 5_000, (2, 4)),
        (8, 256_000, (4, 2)),
        (8, 1_000_000, (8, 1)),
        (7, 5_000, (2, 3)),
    ):
        got = sizing.split(num_gpus, tokens)
        assert got == expected, (
            f"llama-3.1-70b, {num_gpus} x H100, {tokens:,} tokens per engine: split is {got}, expected {expected} "
            "(GPUs per engine, engines). More GPUs per engine leave fewer engines; GPUs that are left over make none"
        )


@check("unit", spec="R10.41", hint=3)
def sizes_that_do_not_divide_the_heads_are_skipped(mine: Mine) -> None:
    """SmolLM2-135M has 9 query heads and 3 KV heads: 2 GPUs cannot share it, 3 can."""
    gpu = Hardware("small", 1.0, 1.0, 200e6, "")
    sizing = mine.cls(shape_architecture("smollm2-135m"), gpu)
    got = sizing.split(6, 1_000)
    assert got == (3, 2), (
        f"smollm2-135m (9 query heads, 3 KV heads) on 6 GPUs of 200 MB, 1,000 tokens per engine: split is {got}, "
        "expected "
        "(3, 2). The engine refuses tensor_parallel_size=2"
    )


@check("unit", spec="R10.41", hint=3)
def too_little_is_said(mine: Mine) -> None:
    """If even all GPUs together hold no such engine, split raises a ValueError."""
    sizing = mine.cls(shape_architecture("llama-3.1-70b"), H100)
    try:
        got = sizing.split(1, 1_000)
    except ValueError:
        return
    raise AssertionError(
        f"one H100 cannot hold llama-3.1-70b, and split(1, 1_000) returned {got}, expected a ValueError"
    )


@check("property", spec="R10.41", hint=2)
def every_split_is_the_best_one(mine: Mine) -> None:
    """For any number of GPUs and tokens: the engine holds them, and a smaller one would not."""
    for memory in (40e9, 80e9, 141e9):
        gpu = Hardware("gpu", 1.0, 1.0, memory, "")
        for model in ("qwen3-8b", "llama-3.1-70b", "smollm2-1.7b"):
            ours, theirs = mine.cls(shape_architecture(model), gpu), Sizing(shape_architecture(model), gpu)
            for num_gpus in range(1, 17):
                for tokens in (1, 10_000, 300_000):
                    got, expected = _result(ours, num_gpus, tokens), _result(theirs, num_gpus, tokens)
                    assert got == expected, (
                        f"{model} on {num_gpus} GPUs of {memory / 1e9:.0f} GB, {tokens:,} tokens per engine: {got}, "
                        f"expected {expected}"
                    )


def _result(sizing: Any, num_gpus: int, tokens: int) -> Any:
    try:
        return sizing.split(num_gpus, tokens)
    except ValueError:
        return "a ValueError"
