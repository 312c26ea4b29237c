"""The lattice: whatever the switches, the same greedy tokens as `generate_naive` (R3.21, R3.22).

Milestone: M3; M4 added `attention_backend`, M5 `enable_chunked_prefill`, M6 `enable_prefix_caching` and what goes with
it, M7 `quantization`, M9 `parallel` (each later rung adds its switch here). A pairwise covering array always runs, and
some crowded corners; the full product of the switches that schedule is `slow`, with kernels, models, layouts and the
kinds of cache taking turns in it.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.config import KernelConfig
from folovllm.milestones import LADDER
from folovllm.parts import variants
from tests.m4.levels import TESTED
from tests.m7.quant_helpers import make_quantizable, quantize
from tests.pairwise import Case, pairwise, product
from tests.parity_helpers import MIN_GAP, GapNaiveModel, Job, draw_prompt, make_engine, make_job, run_jobs

pytestmark = pytest.mark.m3

MAX_MODEL_LEN = 64
# (prompt length, output tokens, priority). One fills the context to its end, one is a single token, several sit at and
# around the edges of blocks of 5 and 16.
SHAPES = [(1, 40, 0), (16, 20, 2), (5, 30, 1), (17, 24, 0), (40, 24, 3), (2, 12, 1), (31, 9, 2), (33, 1, 0)]
FAMILY = {17, 31, 33, 40}  # prompts of these lengths begin alike: 16 tokens in all of them, 30 in three
COMMON = draw_prompt(30, seed=99)
LATE = 3  # so many arrive while the others run

CHUNKING: dict[str, dict[str, Any]] = {  # off: whole prompts; "all": a budget that never splits one
    "off": {"enable_chunked_prefill": False},
    "budget 1": {"max_num_batched_tokens": 1, "enable_chunked_prefill": True},
    "budget 7": {"max_num_batched_tokens": 7, "enable_chunked_prefill": True},
    "budget 16": {"max_num_batched_tokens": 16, "enable_chunked_prefill": True},
    "budget 64": {"max_num_batched_tokens": 64, "enable_chunked_prefill": True},
    "all": {"enable_chunked_prefill": True},
    "threshold 3": {"long_prefill_token_threshold": 3, "enable_chunked_prefill": True},
}
CACHING: dict[str, dict[str, Any]] = {
    "off": {"enable_prefix_caching": False},
    "hash": {"enable_prefix_caching": True, "prefix_index": "hash"},
    "trie": {"enable_prefix_caching": True, "prefix_index": "trie"},
    "hash, partial": {"enable_prefix_caching": True, "prefix_index": "hash", "partial_block_hits": True},
    "trie, partial": {"enable_prefix_caching": True, "prefix_index": "trie", "partial_block_hits": True},
}
# A plain model, or a GPTQ checkpoint of its architecture; with linear_backend "auto" that runs in 4 bits in C++.
QUANTIZATION: dict[str, dict[str, Any]] = {
    "plain": {"quantization": "auto"},
    "auto": {"quantization": "auto"},
    "dequantize": {"quantization": "dequantize"},
}
WORDS_OF_3_BITS = {"head_dim": 32, "intermediate_size": 128}  # units of 32 on 2 ranks, too
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # by model: family, sizes, config
    "llama": ("Llama", {}, {"group_size": 32}),
    "llama_rope": ("Llama", {}, {"desc_act": True}),
    "qwen2": ("Qwen2", WORDS_OF_3_BITS, {"bits": 3, "sym": False, "group_size": -1}),
    "qwen3": ("Qwen3", {}, {"sym": False, "checkpoint_format": "gptq_v2"}),
}
PARALLEL = {"one": (1, 1), "tp": (2, 1), "pp": (1, 2), "tp x pp": (2, 2)}  # parts, stages; the ranks are threads
SEVEN_HEADS = ("llama", "qwen2")  # which 2 ranks cannot divide: there the model runs that the GPTQ one is made of
POOLS = {"evicting": 2, "tiny": 1}  # requests of max_model_len that fit, and not a block more
MODELS = ["llama", "llama_rope", "qwen2", "qwen3"]
SWITCHES: dict[str, list[Any]] = {
    "batching": ["static", "continuous"],
    "max_num_seqs": [1, 3, 8],
    "block_size": [1, 5, 16, "max_model_len"],
    "num_kv_blocks": ["ample", *POOLS],
    "scheduling_policy": list(variants("core.request_queue")),
    "free_uncached_first": [True, False],
    "reserve_full_sequence": [True, False],
    "linear_backend": ["onednn", "auto", "torch"],
    "attention_backend": ["torch_naive", "auto", "torch_sdpa", "torch_flash"],  # auto: C++ where there is a compiler
    "fused_ops": [False, "auto"],
    "fused_mlp": [False, "auto"],
    "decoder_stack": [False, "auto"],
    "sampler_backend": ["torch", "auto", "shortlist"],
    "huge_pages": [False, True],
    "touch_kv_pages": [False, True],
    "keep_freed_memory": [False, True],
    "cpu_isa": TESTED,
    "enable_chunked_prefill": list(CHUNKING),
    "enable_prefix_caching": list(CACHING),
    "quantization": list(QUANTIZATION),
    "parallel": list(PARALLEL),
}
RUNS = {"passes": [1, 2], "model": MODELS}  # the second pass meets a warm cache
ARRAY = pairwise(SWITCHES | RUNS)
# In the full product not every kernel meets every schedule, as it cannot know who made its batch: they are drawn.
KERNELS = ("attention_backend", *(field.name for field in dataclasses.fields(KernelConfig)))
DRAWN = {name: SWITCHES[name] for name in (*KERNELS, "quantization", "parallel")} | RUNS
CACHES = [name for name in CACHING if name != "off"]

MakeTiny = Callable[[str], Path]
FolderOf = Callable[[Case], Path]
JobsOf = Callable[[Path], list[Job]]


def engine_args(case: Case) -> dict[str, Any]:
    args = {name: value for name, value in case.items() if name in SWITCHES and name != "parallel"}
    args |= {"max_model_len": MAX_MODEL_LEN} | parallel_args(case)
    args |= {"num_kv_blocks": num_kv_blocks(case)}
    args |= QUANTIZATION[case["quantization"]]
    return args | CHUNKING[case["enable_chunked_prefill"]] | CACHING[case["enable_prefix_caching"]]


def parallel_args(case: Case) -> dict[str, int]:
    return dict(zip(("tensor_parallel_size", "pipeline_parallel_size"), PARALLEL[case["parallel"]], strict=True))


def num_kv_blocks(case: Case) -> int | None:
    if case["num_kv_blocks"] == "ample":
        return None
    block_size = MAX_MODEL_LEN if case["block_size"] == "max_model_len" else case["block_size"]
    return POOLS[case["num_kv_blocks"]] * math.ceil(MAX_MODEL_LEN / block_size) + 1  # and the null block


def must_preempt(case: Case) -> bool:
    """Several run side by side in a pool that is too small for them, and grow. A contiguous page never has to grow, and
    a budget of one token gives it all to the first request: nobody joins it."""
    grows = case["block_size"] != "max_model_len" and case["max_num_seqs"] > 1
    return grows and case["num_kv_blocks"] == "tiny" and case["enable_chunked_prefill"] != "budget 1"


def must_hit(case: Case) -> bool:
    """Everything is there in the second pass, if there was room. A page of max_model_len never gets full, and only full
    blocks are published: of 64 tokens the last has no K/V."""
    cached = case["enable_prefix_caching"] != "off" and case["passes"] == 2
    return cached and case["num_kv_blocks"] == "ample" and case["block_size"] != "max_model_len"


@pytest.fixture(scope="module")
def folder_of(tiny_model_dir: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """The folder that a case loads; GPTQ checkpoints are made once."""
    made: dict[str, Path] = {}

    def get(case: Case) -> Path:
        model, is_plain = case["model"], case["quantization"] == "plain"
        must_divide = model in SEVEN_HEADS and case["parallel"] in ("tp", "tp x pp")
        if is_plain and not must_divide:
            return tiny_model_dir(model)
        if model not in made:
            (family, sizes, config), folder = CHECKPOINTS[model], tmp_path_factory.mktemp(model)
            made[model] = quantize(make_quantizable(family, folder / "plain", **sizes), folder / "gptq", **config)
        return made[model].parent / "plain" if is_plain else made[model]

    return get


@pytest.fixture(scope="module")
def jobs_of() -> JobsOf:
    """Jobs of a model with the oracle's tokens, made once. The oracle computes with dequantised weights."""
    made: dict[Path, list[Job]] = {}

    def get(folder: Path) -> list[Job]:
        if folder not in made:
            model = GapNaiveModel(folder)
            made[folder] = [
                make_job(model, length, n, seed, prio, COMMON[: length - 1] if length in FAMILY else ())
                for seed, (length, n, prio) in enumerate(SHAPES)
            ]
        return made[folder]

    return get


def run_case(case: Case, folder_of: FolderOf, jobs_of: JobsOf) -> int:
    """Run a case, compare every token; how many preemptions there were."""
    folder = folder_of(case)
    engine, jobs = make_engine(folder, **engine_args(case)), jobs_of(folder)
    for number in range(case["passes"]):
        assert run_jobs(engine, jobs, late=LATE) == [job.tokens for job in jobs], f"pass {number} differs with {case}"
    stats = engine.stats()
    assert stats.num_preemptions > 0 or not must_preempt(case), f"the pool was meant to run dry with {case}"
    assert stats.prefix_cache_hits > 0 or not must_hit(case), f"the second pass was meant to hit with {case}"
    assert stats.prefix_cache_hits == 0 or case["enable_prefix_caching"] != "off"
    return stats.num_preemptions


@pytest.mark.parametrize("case", ARRAY, ids=lambda case: "-".join(map(str, case.values())))
def test_pairwise(case: Case, folder_of: FolderOf, jobs_of: JobsOf) -> None:
    run_case(case, folder_of, jobs_of)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("chunking", ["off", "budget 7", "budget 16", "threshold 3"])
def test_corners(chunking: str, cache: str, folder_of: FolderOf, jobs_of: JobsOf) -> None:
    """Everything that can get into another's way at once: chunks, hits, copies, preemptions in mid-prompt."""
    crowd = {"max_num_seqs": 8, "num_kv_blocks": "tiny", "reserve_full_sequence": False, "passes": 2, "model": "llama"}
    case = ARRAY[-1] | crowd | {"enable_chunked_prefill": chunking, "enable_prefix_caching": cache}
    case |= {name: SWITCHES[name][1] for name in KERNELS} | {"batching": "continuous"}  # all on
    for block_size, policy, quantization, parallel in ((1, "fcfs", "plain", "one"), (5, "priority", "auto", "tp x pp")):
        case |= {"block_size": block_size, "scheduling_policy": policy, "quantization": quantization}
        case["parallel"] = parallel
        assert run_case(case, folder_of, jobs_of) > 0


@pytest.mark.slow
@pytest.mark.parametrize("block_size", SWITCHES["block_size"])
@pytest.mark.parametrize("batching", SWITCHES["batching"])
def test_full_product(batching: str, block_size: int | str, folder_of: FolderOf, jobs_of: JobsOf) -> None:
    fixed = {"enable_prefix_caching": ["off", "on"], "batching": [batching], "block_size": [block_size]}
    scheduling = {name: values for name, values in SWITCHES.items() if name not in DRAWN}
    cases = product(scheduling | fixed)
    preemptions, rng = 0, random.Random(f"{batching} {block_size}")
    for case in cases:
        case |= {name: rng.choice(values) for name, values in DRAWN.items()}
        case["enable_prefix_caching"] = rng.choice(CACHES) if case["enable_prefix_caching"] == "on" else "off"
        preemptions += run_case(case, folder_of, jobs_of)
    print(f"{batching}, block_size {block_size}: {len(cases)} combinations, {preemptions} preemptions")


@pytest.mark.parametrize("parallel", ["one", "tp"])
@pytest.mark.parametrize("quantization", ["plain", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_no_tie_decides(name: str, quantization: str, parallel: str, folder_of: FolderOf, jobs_of: JobsOf) -> None:
    jobs = jobs_of(folder_of({"model": name, "quantization": quantization, "parallel": parallel}))
    print(f"{name}: smallest gap of the top two logits {min(job.min_gap for job in jobs):.4f}")
    assert all(job.min_gap > MIN_GAP for job in jobs)
    assert [len(job.tokens) for job in jobs] == [num_tokens for _, num_tokens, _ in SHAPES]


def test_the_lattice_knows_every_switch_of_the_ladder() -> None:
    built = {name for rung in LADDER if rung.built for name in rung.on}
    assert built <= set(SWITCHES), "a rung was built whose switch the lattice does not turn yet"


def test_the_array_covers_every_pair() -> None:
    switches = SWITCHES | RUNS
    for (a, a_values), (b, b_values) in itertools.combinations(switches.items(), 2):
        seen = {(case[a], case[b]) for case in ARRAY}
        assert seen == set(itertools.product(a_values, b_values)), f"{a} x {b}"
    assert len(ARRAY) < 50 < math.prod(map(len, SWITCHES.values()))
    assert any(map(must_preempt, ARRAY)) and any(map(must_hit, ARRAY))


def test_the_array_is_the_same_every_time() -> None:
    assert pairwise(SWITCHES | RUNS) == ARRAY
    assert len(pairwise({"a": [0, 1], "b": [0, 1], "c": [0, 1]})) == 4  # the optimum of the textbook example
