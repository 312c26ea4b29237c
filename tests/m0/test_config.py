"""EngineConfig: what a user writes, what resolve makes of it, and how much KV cache comes out.

The refusals that name a fix stand in one table, tests/m1/test_bad_input.py; here is the rest of their promise: junk of
any type is refused by a ValueError, never by an accident further in.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm import milestones
from folovllm.config import (
    DEFAULT_MAX_NUM_BATCHED_TOKENS,
    AttentionConfig,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    QuantizationConfig,
    SchedulerConfig,
    engine_arg_names,
)
from folovllm.core.kv_cache_utils import KVCacheConfig, cdiv, make_kv_cache_config
from folovllm.hf_config import ModelArchitecture
from folovllm.vllm_args import NONE_MEANS_DEFAULT
from tests.core_helpers import tiny_arch

pytestmark = pytest.mark.m0

PARTS = (ModelConfig, CacheConfig, SchedulerConfig, AttentionConfig, QuantizationConfig, EngineConfig)
# vLLM's names for what vLLM has, with its defaults.
VLLM_DEFAULTS: dict[str, Any] = {
    "served_model_name": None,
    "tokenizer": None,
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "load_format": "auto",
    "generation_config": "auto",
    "dtype": "auto",
    "max_model_len": None,
    "max_num_seqs": None,
    "max_num_batched_tokens": None,
    "seed": 0,
    "max_logprobs": 20,
    "download_dir": None,
    "gpu_memory_utilization": 0.9,
    "scheduling_policy": "fcfs",
    "long_prefill_token_threshold": 0,
    "enforce_eager": False,
}
# One accepted value for every argument that no unbuilt rung switches, other than its default.
OTHER_VALUES: dict[str, Any] = {
    "model": "somewhere/else",
    "served_model_name": ["mine", "yours"],
    "tokenizer": "another/model",
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "hf_overrides": {"max_position_embeddings": 64},
    "generation_config": "vllm",
    "override_generation_config": {"temperature": 0.5},
    "dtype": "float16",
    "max_model_len": 2,
    "seed": -7,
    "max_logprobs": -1,
    "download_dir": "cache",
    "block_size": 1,
    "gpu_memory_utilization": 1,
    "kv_cache_memory": 1,
    "num_kv_blocks": 2,
    "prefix_index": "trie",
    "partial_block_hits": True,
    "prefix_caching_seed": 7,
    "free_uncached_first": False,
    "gptq_kernel": "dequant",
    "gptq_runtime": "memory",
    "batching": "static",
    "scheduling_policy": "priority",
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "reserve_full_sequence": False,
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "data_parallel_size": 2,
    "data_parallel_backend": "ray",
    "data_parallel_heartbeat_timeout": 5.0,
    "ray_address": "auto",
    "device": "cuda",
    "cpu_threads": 2,
    "cpu_isa": "portable",
    "enforce_eager": True,
    "disable_log_stats": False,
    "trace": "steps.jsonl",
    "parts": {"core.scheduler": "mine.py:Scheduler"},
}


def flat(config: EngineConfig) -> dict[str, Any]:
    """Every engine argument and its value."""
    return {name: getattr(getattr(config, part) if part else config, name) for name, part in engine_arg_names().items()}


def arch_of(**changes: Any) -> ModelArchitecture:
    return dataclasses.replace(tiny_arch(max_position_embeddings=512), **changes)


# SmolLM2-135M's shape of KV: 23,040 bytes per token in bfloat16.
SMOL = arch_of(num_hidden_layers=30, num_key_value_heads=3, head_dim=64, dtype="bfloat16", max_position_embeddings=8192)


# ---- what the user writes


def test_defaults_are_vllms() -> None:
    values = flat(EngineConfig.from_args())
    assert {name: values[name] for name in VLLM_DEFAULTS} == VLLM_DEFAULTS


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_an_argument_arrives_and_changes_nothing_else(name: str) -> None:
    value = OTHER_VALUES[name]
    assert flat(EngineConfig.from_args(**{name: value})) == flat(EngineConfig.from_args()) | {name: value}


def test_every_argument_is_tried() -> None:
    """A new argument needs a line in OTHER_VALUES, unless it belongs to a rung that is still to be built."""
    of_later_rungs = {name for rung in milestones.rungs_above_top() for name in rung.on}
    untried = set(engine_arg_names()) - set(OTHER_VALUES) - of_later_rungs
    # Of the last one the other value asks for a package that may not be installed: tests/m6/test_block_hash.py.
    exceptions = {"long_prefill_token_threshold", "linear_backend", "prefix_caching_hash_algo"}
    exceptions |= {"tokenizer_mode"}  # it has one value
    assert untried <= exceptions | of_built_switches(), untried


def of_built_switches() -> set[str]:
    return {name for rung in milestones.LADDER if rung.built for name in rung.on}


def test_paths_may_be_given_as_paths() -> None:
    config = EngineConfig.from_args(model=Path("folder/model"), download_dir=Path("cache"), trace=Path("t.jsonl"))
    assert (config.model_config.model, config.model_config.download_dir) == ("folder/model", "cache")
    assert config.trace == "t.jsonl"


def test_an_override_wins_over_the_preset() -> None:
    config = EngineConfig.preset("m3", block_size=32, max_num_seqs=5)
    assert (config.cache_config.block_size, config.scheduler_config.max_num_seqs) == (32, 5)
    assert config.scheduler_config.batching == "continuous"
    assert flat(EngineConfig.from_args(preset="m3", block_size=32, max_num_seqs=5)) == flat(config)


def test_an_override_wins_over_without() -> None:
    assert EngineConfig.preset("m3", without="m3").cache_config.block_size == "max_model_len"
    assert EngineConfig.preset("m3", without="m3", block_size=8).cache_config.block_size == 8


def test_an_unknown_part_is_refused_before_a_model_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"unknown part 'core.schduler'; there are core.scheduler"):
        EngineConfig.from_args(parts={"core.schduler": "mine.py:Scheduler"})


@pytest.mark.parametrize("part", ["model_config", "cache_config", "scheduler_config", "attention_config"])
def test_parts_of_the_wrong_type(part: str) -> None:
    with pytest.raises(ValueError, match=f"{part} must be a .*Config, got dict"):
        EngineConfig(**{part: {}})


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_every_part_is_frozen(cls: type) -> None:
    part = cls()
    for field in dataclasses.fields(part):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field.name, getattr(part, field.name))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.integers(), max_size=2),
    st.sampled_from([object(), int, lambda: 0, ..., {1, 2}, 10**400, -(10**400), "16", "auto", "m3", "True"]),
)


@given(name=st.sampled_from([*engine_arg_names(), "preset", "without"]), value=JUNK)
def test_junk_is_refused_by_a_value_error_or_accepted(name: str, value: Any) -> None:
    try:
        config = EngineConfig.from_args(**{name: value})
    except ValueError as error:
        assert str(error)
    else:
        if value is None and name in NONE_MEANS_DEFAULT:
            assert flat(config) == flat(EngineConfig.from_args())
        elif name not in ("preset", "without"):
            assert flat(config)[name] == value


@given(part=st.sampled_from(PARTS), data=st.data())
def test_junk_in_a_part_is_refused_by_a_value_error(part: type, data: st.DataObject) -> None:
    """The same below `from_args`, where a rung that is not built refuses nothing."""
    name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(part) if f.name != "architecture"]))
    try:
        part(**{name: data.draw(JUNK)})
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("name", engine_arg_names())
def test_a_slip_of_the_keyboard_finds_the_nearest_name(name: str) -> None:
    for i in range(len(name)):
        slip = name[:i] + name[i + 1 :]  # one letter is missing
        with pytest.raises(ValueError, match=f"unknown engine argument '{slip}'; did you mean '{name}'"):
            EngineConfig.from_args(**{slip: 1})


# ---- resolve


def chunked(**scheduler: Any) -> EngineConfig:
    """Built from its parts: whether the rung is built does not matter to resolve."""
    return EngineConfig(scheduler_config=SchedulerConfig(enable_chunked_prefill=True, **scheduler))


def test_resolve_fills_everything_in() -> None:
    config = EngineConfig.from_args(preset="m3").resolve(arch_of(), "cpu")
    assert (config.max_model_len, config.block_size, config.max_num_seqs) == (512, 16, 64)
    assert config.max_num_batched_tokens == DEFAULT_MAX_NUM_BATCHED_TOKENS
    assert (config.device, config.model_config.dtype) == ("cpu", "float32")
    assert config.model_config.arch == arch_of()


def test_resolve_changes_no_config_that_exists() -> None:
    config = EngineConfig.from_args(preset="m3")
    before = copy.deepcopy(config)
    resolved = config.resolve(arch_of(), "cpu")
    assert config == before and resolved != config
    assert resolved.resolve(arch_of(), "cpu") == resolved


def test_resolve_keeps_what_the_user_asked_for() -> None:
    asked = {
        "max_model_len": 100,
        "block_size": 8,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 100,
        "dtype": "float16",
    }
    config = EngineConfig.from_args(preset="m3", **asked)
    values = flat(config.resolve(arch_of(), "cuda"))
    assert {name: values[name] for name in asked} == asked
    changed = {name for name, value in flat(config).items() if values[name] != value}
    assert changed == {"device"}


@pytest.mark.parametrize(("device", "expected"), [("cpu", 64), ("cuda", 256)])
def test_the_device_decides_how_many_requests(device: str, expected: int) -> None:
    assert EngineConfig.from_args(preset="m2").resolve(arch_of(), device).max_num_seqs == expected
    assert EngineConfig.from_args(preset="m1").resolve(arch_of(), device).max_num_seqs == 1


@pytest.mark.parametrize(
    ("asked", "of_the_model", "fast_bf16", "expected"),
    [
        ("auto", "bfloat16", True, "bfloat16"),
        ("auto", "bfloat16", False, "float32"),
        ("auto", "float32", True, "float32"),
        ("auto", "float32", False, "float32"),
        ("auto", "float16", True, "float16"),
        ("bfloat16", "float32", False, "bfloat16"),  # asked for is asked for
        ("float16", "bfloat16", True, "float16"),
    ],
)
def test_dtype(asked: str, of_the_model: str, fast_bf16: bool, expected: str) -> None:
    config = EngineConfig.from_args(dtype=asked).resolve(arch_of(dtype=of_the_model), "cpu", fast_bf16)
    assert config.model_config.dtype == expected


@pytest.mark.parametrize("max_model_len", [2, 100, 512])
def test_the_contiguous_cache_has_one_page_per_request(max_model_len: int) -> None:
    config = EngineConfig.from_args(preset="m2", max_model_len=max_model_len).resolve(arch_of(), "cpu")
    assert config.block_size == config.max_model_len == max_model_len


@pytest.mark.parametrize(("length", "expected"), [(512, 2048), (2048, 2048), (8192, 8192)])
def test_without_chunked_prefill_the_budget_holds_the_longest_prompt(length: int, expected: int) -> None:
    arch = arch_of(max_position_embeddings=length)
    assert EngineConfig.preset("m3").resolve(arch, "cpu").max_num_batched_tokens == expected
    assert chunked().resolve(arch, "cpu").max_num_batched_tokens == DEFAULT_MAX_NUM_BATCHED_TOKENS


def test_a_small_budget_needs_chunked_prefill() -> None:
    assert chunked(max_num_batched_tokens=1).resolve(arch_of(), "cpu").max_num_batched_tokens == 1
    assert EngineConfig.preset("m3", max_num_batched_tokens=512).resolve(arch_of(), "cpu").max_num_batched_tokens == 512
    with pytest.raises(ValueError, match=r"max_num_batched_tokens=511 is less than max_model_len=512.*raise it"):
        EngineConfig.preset("m3", max_num_batched_tokens=511).resolve(arch_of(), "cpu")


def test_long_prefill_token_threshold_needs_chunked_prefill() -> None:
    assert chunked(long_prefill_token_threshold=4).scheduler_config.long_prefill_token_threshold == 4
    with pytest.raises(ValueError, match="needs chunked prefill"):
        SchedulerConfig(long_prefill_token_threshold=4)


# ---- how many blocks come out


def kv_of(available: int, arch: ModelArchitecture = SMOL, **args: Any) -> KVCacheConfig:
    config = EngineConfig.from_args(preset="m3", **args).resolve(arch, "cpu")
    return make_kv_cache_config(config, available)


def test_kv_bytes_of_the_default_model() -> None:
    kv = kv_of(available=2**40, max_model_len=2048, kv_cache_memory=129 * 16 * 23_040)
    assert (kv.num_blocks, kv.num_usable_blocks, kv.bytes_per_block) == (129, 128, 16 * 23_040)


def test_the_null_block_is_reported_apart() -> None:
    kv = kv_of(available=0, max_model_len=64, num_kv_blocks=11)
    assert (kv.num_usable_blocks, kv.null_block_bytes, kv.usable_bytes) == (10, 368_640, 3_686_400)
    assert str(kv) == "10 blocks of 16 tokens, 3.5 MiB (+ the null block, 0.4 MiB)"


def test_num_kv_blocks_wins_over_bytes_and_bytes_over_what_is_free() -> None:
    one = 16 * 23_040
    assert kv_of(available=50 * one, max_model_len=64).num_blocks == 50
    assert kv_of(available=50 * one, max_model_len=64, kv_cache_memory=20 * one + one - 1).num_blocks == 20
    assert kv_of(available=50 * one, max_model_len=64, kv_cache_memory=20 * one, num_kv_blocks=7).num_blocks == 7


def test_no_more_is_taken_than_could_ever_be_used() -> None:
    kv = kv_of(available=2**50, max_model_len=100, max_num_seqs=3)
    assert kv.num_usable_blocks == 3 * 7  # 100 tokens take 7 blocks of 16


def test_the_contiguous_cache_takes_whole_requests() -> None:
    args = {"without": "m3", "max_model_len": 2048, "max_num_seqs": 4}
    page = 2048 * 23_040
    kv = kv_of(available=2**40, **args)
    assert (kv.block_size, kv.bytes_per_block, kv.num_usable_blocks) == (2048, page, 4)
    assert kv_of(available=3 * page + 1, **args).num_usable_blocks == 2


def test_dtype_decides_the_bytes() -> None:
    half, full = (kv_of(2**30, max_model_len=64, dtype=dtype).bytes_per_block for dtype in ("float16", "float32"))
    assert full == 2 * half == 2 * 16 * 23_040


def test_a_cache_too_small_for_one_request_is_refused_with_the_numbers() -> None:
    numbers = (
        r"one request of max_model_len=2048 needs 128 blocks of 16 tokens plus the null block \(45\.4 MiB\), but there "
        r"are 100 \(35\.2 MiB\)\. Raise kv_cache_memory.*or set max_model_len to at most 1584"
    )
    with pytest.raises(ValueError, match=numbers):
        kv_of(available=100 * 16 * 23_040, max_model_len=2048)
    assert kv_of(available=100 * 16 * 23_040, max_model_len=1584).num_usable_blocks == 99  # the advice is right
    with pytest.raises(ValueError, match="too small"):
        kv_of(available=100 * 16 * 23_040, max_model_len=1585)
    with pytest.raises(ValueError, match=r"Raise kv_cache_memory, num_kv_blocks or gpu_memory_utilization\.$"):
        kv_of(available=10, max_model_len=2048)  # no length would do


@pytest.mark.parametrize("wish", [{"num_kv_blocks": 128}, {"kv_cache_memory": 129 * 16 * 23_040 - 1}])
def test_the_null_block_holds_no_request(wish: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs 128 blocks of 16 tokens plus the null block"):
        kv_of(available=2**40, max_model_len=2048, **wish)


@given(
    available=st.integers(-(10**6), 10**8),
    block_size=st.integers(1, 64),
    max_model_len=st.integers(64, 512),
    max_num_seqs=st.integers(1, 40),
)
def test_every_cache_holds_one_request_and_fits(
    available: int, block_size: int, max_model_len: int, max_num_seqs: int
) -> None:
    arch = arch_of(num_hidden_layers=3, num_key_value_heads=2, head_dim=24)
    needed = cdiv(max_model_len, block_size)
    per_block = block_size * arch.kv_bytes_per_token(4)
    args = {"block_size": block_size, "max_model_len": max_model_len, "max_num_seqs": max_num_seqs}
    if available < (needed + 1) * per_block:
        with pytest.raises(ValueError, match=f"needs {needed} blocks of {block_size} tokens"):
            kv_of(available, arch, **args)
        return
    kv = kv_of(available, arch, **args)
    assert kv.bytes_per_block == per_block
    assert needed <= kv.num_usable_blocks <= needed * max_num_seqs
    assert kv.usable_bytes + kv.null_block_bytes <= available
