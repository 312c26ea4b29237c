"""What cannot be divided is refused when the config meets the model, with the numbers and with what can be done."""

import dataclasses
from typing import Any

import pytest

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import make_kv_cache_config
from folovllm.gptq_config import GPTQConfig
from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import ModelShard, ParallelConfig
from folovllm.rope_config import RopeConfig

pytestmark = pytest.mark.m9


def smollm(**changes: Any) -> ModelArchitecture:
    """SmolLM2-135M, but for `changes`: 9 query heads, 3 KV heads."""
    sizes: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(theta=100000.0),
        "tie_word_embeddings": True,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelArchitecture(**sizes | changes)


def gptq(**args: Any) -> GPTQConfig:
    return GPTQConfig(**{"bits": 4, "group_size": 128} | args)


EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8}
REFUSED: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "query heads": (
        {"tensor_parallel_size": 2},
        {},
        "tensor_parallel_size=2 does not divide the model's 9 query heads: use 1 or 3",
    ),
    "more ranks than heads": (
        {"tensor_parallel_size": 18},
        {},
        "does not divide the model's 9 query heads: use 1 or 3",
    ),
    "KV heads": (
        {"tensor_parallel_size": 4},
        {"num_attention_heads": 12, "num_key_value_heads": 6},
        "tensor_parallel_size=4 neither divides the model's 6 KV heads nor is a multiple of them: use 1, 2, 3, 6 or 12",
    ),
    "MLP": (
        {"tensor_parallel_size": 8},
        EIGHT | {"intermediate_size": 1540},
        "tensor_parallel_size=8 does not divide the model's intermediate size of 1540: use 1, 2 or 4",
    ),
    "stages": (
        {"pipeline_parallel_size": 31},
        {},
        "pipeline_parallel_size=31 is more than the model's 30 layers, .*: use at most 30",
    ),
    "packed queries": (
        {"tensor_parallel_size": 9},
        {"quantization": gptq(bits=3), "head_dim": 16, "intermediate_size": 1152},
        "tensor_parallel_size=9 gives a rank 16 of 144 query features, and 3-bit weights are packed in units of 32, "
        "unless quantization='dequantize': use 1",
    ),
    "packed keys": (
        {"tensor_parallel_size": 3},
        {"quantization": gptq(), "num_attention_heads": 18, "head_dim": 4, "intermediate_size": 1536},
        "gives a rank 4 of 12 key features, and 4-bit weights are packed in units of 8.*: use 1",
    ),
    "packed MLP": (
        {"tensor_parallel_size": 8},
        EIGHT | {"quantization": gptq(), "intermediate_size": 96},
        "gives a rank 12 of 96 MLP features, and 4-bit weights are packed in units of 8, .*: use 1, 2 or 4",
    ),
    "packed head": (
        {"tensor_parallel_size": 8},
        EIGHT | {"quantization": gptq(lm_head=True), "vocab_size": 49184, "tie_word_embeddings": False},
        "does not divide the quantised head of 49184 tokens into units of 8: use 1, 2 or 4",
    ),
}


@pytest.mark.parametrize("parallel,changes,message", REFUSED.values(), ids=REFUSED)
def test_refusals(parallel: dict[str, int], changes: dict[str, Any], message: str) -> None:
    config = EngineConfig.from_args(**parallel)
    with pytest.raises(ValueError, match=message):
        config.resolve(smollm(**changes), "cpu")


@pytest.mark.parametrize(
    "parallel,changes",
    [
        ({"tensor_parallel_size": 3, "pipeline_parallel_size": 2}, {}),
        ({"tensor_parallel_size": 9}, {"intermediate_size": 1152}),  # each KV head on three ranks
        ({"pipeline_parallel_size": 30}, {}),
        ({"tensor_parallel_size": 8}, EIGHT | {"vocab_size": 49153}),  # the vocabulary need not divide
        ({"tensor_parallel_size": 3}, {"quantization": gptq()}),
        (
            {"tensor_parallel_size": 8, "quantization": "dequantize"},
            EIGHT | {"quantization": gptq(), "intermediate_size": 96},
        ),
        ({}, {"quantization": gptq(), "intermediate_size": 1540}),  # one rank: the loader says what is wrong
    ],
)
def test_what_can_be_divided(parallel: dict[str, Any], changes: dict[str, Any]) -> None:
    EngineConfig.from_args(**parallel).resolve(smollm(**changes), "cpu")


def test_a_rank_sees_its_own_heads_and_layers() -> None:
    arch = ModelShard(1, 3, 1, 4).attention_arch(smollm())
    assert (arch.num_attention_heads, arch.num_key_value_heads, arch.num_hidden_layers) == (3, 1, 8)
    arch = ModelShard(5, 9).attention_arch(smollm())
    assert (arch.num_attention_heads, arch.num_key_value_heads, arch.num_hidden_layers) == (1, 1, 30)


def test_ranks_are_counted_through_the_stages() -> None:
    config = ParallelConfig(tensor_parallel_size=3, pipeline_parallel_size=2)
    shards = [config.shard(rank) for rank in range(6)]
    assert [shard.rank for shard in shards] == list(range(6))
    assert [(s.tp_rank, s.pp_rank) for s in shards] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    assert [(s.is_first_stage, s.is_last_stage) for s in shards[::3]] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    "tp,pp,layers,kv_heads", [(1, 1, 30, 3), (3, 1, 30, 1), (9, 1, 30, 1), (1, 4, 8, 3), (3, 4, 8, 1)]
)
def test_a_block_is_as_large_as_on_the_rank_with_the_most(tp: int, pp: int, layers: int, kv_heads: int) -> None:
    """30 layers in 4 stages are 7, 8, 8 and 7; with 9 ranks each of the 3 KV heads is there three times."""
    config = EngineConfig.from_args(tensor_parallel_size=tp, pipeline_parallel_size=pp, dtype="bfloat16")
    config = config.resolve(smollm(intermediate_size=1152), "cpu")
    kv = make_kv_cache_config(config, available_bytes=2**30)
    assert kv.bytes_per_block == 16 * 2 * layers * kv_heads * 64 * 2
    one = make_kv_cache_config(dataclasses.replace(config, parallel_config=ParallelConfig()), available_bytes=2**30)
    assert kv.num_blocks >= one.num_blocks * (30 * 3) // (layers * kv_heads) or kv.num_blocks == one.num_blocks
