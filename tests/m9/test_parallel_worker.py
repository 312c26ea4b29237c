"""A worker that is one of several ranks: its device, its share of the memory, what is replaced in its model."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.selector import load_backend
from folovllm.config import EngineConfig, KernelConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.csrc.build import load_ops
from folovllm.distributed.communicator import ParallelGroups
from folovllm.distributed.process_groups import make_process_groups
from folovllm.distributed.thread_communicator import thread_groups
from folovllm.engine.llm_engine import LLMEngine
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.model_loader import load_model
from folovllm.parallel import ParallelConfig
from folovllm.sample.sampler import Sampler
from folovllm.worker import worker as worker_module
from folovllm.worker.model_runner import ModelRunner
from folovllm.worker.profile_run import largest_step
from folovllm.worker.worker import Worker, rank_device
from tests.fake_gpu import OneDevice
from tests.m4.test_device_neutral import META, REPLACED
from tests.m7.quant_helpers import make_quantizable, quantize
from tests.m9.parallel_models import make_parallel
from tests.m9.thread_ranks import ThreadRanksExecutor
from tests.parity_helpers import GapNaiveModel, make_config, make_engine, make_job, run_jobs
from tests.tiny_models import VOCAB_SIZE

pytestmark = pytest.mark.m9

TWO_BY_TWO = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
FAST = {"linear_backend": "auto", "fused_ops": "auto", "fused_mlp": "auto", "attention_backend": "auto"}

needs_ops = pytest.mark.skipif(load_ops() is None, reason="no C++ kernels here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parallel("qwen3", tmp_path_factory.mktemp("qwen3"))


def ranks_of(engine: LLMEngine) -> list[Worker]:
    executor = engine.engine_core.executor
    assert isinstance(executor, ThreadRanksExecutor)
    return executor.workers


# --- devices --------------------------------------------------------------------------------------------------------


def devices(num_gpus: int, monkeypatch: pytest.MonkeyPatch, folder: Path, **args: Any) -> list[str]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    config = make_config(folder, **args)
    object.__setattr__(config, "device", "cuda")  # resolve() asks no GPU, but make_config resolves for a CPU
    parallel = config.parallel_config
    return [str(rank_device(config, parallel.shard(rank))) for rank in range(parallel.world_size)]


def test_each_rank_has_a_gpu_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices(4, monkeypatch, folder, **TWO_BY_TWO) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert devices(1, monkeypatch, folder) == ["cuda"]
    ray = {"distributed_executor_backend": "ray"}
    assert devices(1, monkeypatch, folder, **TWO_BY_TWO, **ray) == ["cuda:0"] * 4  # an actor sees one GPU


def test_too_few_gpus_are_refused_with_the_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"=2 x pipeline_parallel_size=2.* need 4 GPUs, and there are 3"):
        devices(3, monkeypatch, folder, **TWO_BY_TWO)


def test_a_step_of_every_rank_stays_on_its_device(folder: Path) -> None:
    """On the device "meta", which stands for a GPU: embedding, all-reduces, both stages, the gathered logits."""
    config = make_config(folder, max_model_len=64, block_size=16, num_kv_blocks=20, **TWO_BY_TWO)
    step = largest_step([20, 1, 33], [2, 1, 3])

    def run(groups: ParallelGroups) -> torch.Tensor | None:
        arch = config.model_config.arch
        model = load_model(folder, arch, torch.bfloat16, META, groups=groups)
        own = groups.shard.attention_arch(arch)
        spec = AttentionSpec.from_arch(own, torch.bfloat16, META, 16)
        backend = load_backend("torch_sdpa")(spec)
        accelerate(model, backend, KernelConfig(**dict.fromkeys(REPLACED, "auto")))
        runner = ModelRunner(config, model, backend, META, Sampler(), groups)
        runner.initialize_kv_cache(KVCacheConfig(20, 16, bytes_per_block=0))
        assert runner.kv_caches.shape[0] == own.num_hidden_layers
        with OneDevice():
            handle = runner.execute(step)
            return model.compute_logits(handle.hidden_states) if groups.shard.is_last_stage else None

    all_groups = thread_groups(config.parallel_config)
    default_dtype = torch.get_default_dtype()
    try:
        with ThreadPoolExecutor(4) as threads:
            logits = list(threads.map(run, all_groups))
    finally:
        torch.set_default_dtype(default_dtype)  # four threads have built models at once
    assert logits[:2] == [None, None]
    assert all(t is not None and t.device == META and t.shape == (3, VOCAB_SIZE) for t in logits[2:])


# --- memory ---------------------------------------------------------------------------------------------------------


def test_ranks_on_one_cpu_share_its_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "available_memory_bytes", lambda: 8 * 2**20)
    for args, share in (({}, 1), ({"tensor_parallel_size": 2}, 2), (TWO_BY_TWO, 4)):
        config = make_config(folder, **args)
        workers = [Worker(config, folder, groups) for groups in thread_groups(config.parallel_config)]
        assert [w.available_kv_cache_bytes() for w in workers] == [4 * 2**20 // share] * share
        kv_cache_config = KVCacheConfig(9, 16, bytes_per_block=2**20 // share)  # 9 MiB in all ranks together
        with pytest.raises(ValueError, match=r"does not fit into the 0\.0 GiB of free memory"):
            workers[0].initialize_kv_cache(kv_cache_config)


def test_a_cache_of_many_ranks_has_as_many_blocks_as_one_ranks(folder: Path) -> None:
    """2 parts halve the KV heads and 2 stages halve the layers (2 of 3): with the same bytes there are more blocks."""
    memory = {"kv_cache_memory": 2**18, "block_size": 16, "max_model_len": 256}
    blocks = [make_engine(folder, **memory, **args).engine_core.kv_cache_config for args in ({}, TWO_BY_TWO)]
    assert blocks[0].bytes_per_block == 3 * blocks[1].bytes_per_block
    assert blocks[1].num_blocks == 2**18 // blocks[1].bytes_per_block


# --- what is replaced -----------------------------------------------------------------------------------------------


@needs_ops
def test_tensor_parallelism_has_no_decoder_stack(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"decoder_stack=True is impossible here: tensor parallelism.*'auto' or False"):
        make_engine(folder, decoder_stack=True, tensor_parallel_size=2, **FAST)
    (replaced, *_) = [w.replacements for w in ranks_of(make_engine(folder, **FAST, **TWO_BY_TWO, decoder_stack="auto"))]
    reasons = {item.switch: item.after for item in replaced}
    assert reasons["decoder_stack"] is None and reasons["fused_ops"] is not None and reasons["fused_mlp"] is not None
    assert reasons["linear_backend"] == "CppLinearMethod"


@needs_ops
def test_each_stage_has_a_decoder_stack_of_its_own_layers(folder: Path) -> None:
    workers = ranks_of(make_engine(folder, decoder_stack=True, pipeline_parallel_size=2, **FAST))
    models: list[Any] = [worker.model_runner.model for worker in workers]
    assert [len(model.model.layers) for model in models] == [2, 1]
    assert all(model.model.decoder_stack is not None for model in models)


@needs_ops
def test_a_middle_stage_of_packed_weights_is_as_fast_as_the_others(tmp_path: Path) -> None:
    """It has no embedding, and its linear layers hold integers: its dtype shows in its norms."""
    plain = make_quantizable("Llama", tmp_path / "plain", num_hidden_layers=3)
    checkpoint = quantize(plain, tmp_path / "gptq")
    args = {"quantization": "auto", "gptq_kernel": "dequant", "linear_backend": "torch", "fused_ops": True}
    engine = make_engine(checkpoint, dtype="bfloat16", pipeline_parallel_size=3, **args)
    for worker in ranks_of(engine):
        assert all(item.after is not None for item in worker.replacements if item.switch == "fused_ops")


# --- torch.distributed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_on_process_groups_of_gloo(dtype: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts of two stages, whose tensors travel through sockets. The ranks are threads nevertheless."""

    def gloo_groups(config: ParallelConfig, deadline: float) -> list[ParallelGroups]:
        store = dist.HashStore()
        cpu = torch.device("cpu")
        connect: Callable[[int], ParallelGroups] = lambda rank: make_process_groups(  # noqa: E731
            config, rank, cpu, store, timeout=deadline
        )
        with ThreadPoolExecutor(config.world_size) as threads:
            return list(threads.map(connect, range(config.world_size)))

    model = GapNaiveModel(folder)
    jobs = [make_job(model, length, 8, seed) for seed, length in enumerate([1, 17, 30])]
    expected = run_jobs(make_engine(folder, dtype=dtype, **TWO_BY_TWO), jobs)
    monkeypatch.setattr("tests.m9.thread_ranks.thread_groups", gloo_groups)
    config: EngineConfig = make_config(folder, dtype=dtype, **TWO_BY_TWO)
    engine = LLMEngine(config, ThreadRanksExecutor(config, folder), tokenizer=None)
    assert type(ranks_of(engine)[0].groups.tp).__name__ == "TorchCommunicator"
    got = run_jobs(engine, jobs, late=1)
    assert got == [job.tokens for job in jobs] if dtype == "float32" else [len(t) for t in got] == [8, 8, 8]
    assert dtype == "float32" or sum(a == b for a, b in zip(got, expected, strict=True)) >= 1
