"""Worker: one device, its model and its memory.

Milestone: M1, M9 (one of several ranks). vLLM counterpart: vllm/v1/worker/gpu_worker.py and
vllm/v1/worker/cpu_worker.py. Left out: sleep mode.
"""

import dataclasses
from pathlib import Path

import torch

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.selector import get_attn_backend
from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import CPU_KV_CACHE_CEILING, GIB, KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.communicator import ONE_RANK, ParallelGroups
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.cpu.huge_pages import keep_freed_memory
from folovllm.model_executor.layers.quantization.kernels import KernelOptions
from folovllm.model_executor.model_loader import load_model, packed_quantization, random_model
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.outputs import ModelRunnerOutput
from folovllm.parallel import ModelShard
from folovllm.parts import load_part
from folovllm.utils import available_memory_bytes
from folovllm.worker.model_runner import ForwardHandle, ModelRunner
from folovllm.worker.profile_run import profile_run

# The rest of the free memory is for activations, the user's other programs and the file cache.
CPU_FREE_MEMORY_SHARE = 0.5


class Worker:
    """Loads the part of the model that the rank of `groups` computes, and runs steps on it. `config` is resolved.

    Nothing is sent between the ranks until the first step (on CUDA: until `available_kv_cache_bytes`, which runs one).
    """

    def __init__(self, config: EngineConfig, model_path: Path, groups: ParallelGroups = ONE_RANK) -> None:
        self.config, self.groups, kernels = config, groups, config.kernel_config
        self.device = rank_device(config, groups.shard)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # Triton launches its kernels on the current device
        self.keeps_freed_memory = kernels.keep_freed_memory and self.device.type == "cpu" and keep_freed_memory()
        arch = groups.shard.attention_arch(config.model_config.arch)
        dtype: torch.dtype = getattr(torch, config.model_config.dtype)
        model = self._load_model(model_path, dtype)
        spec = AttentionSpec.from_arch(arch, dtype, self.device, config.block_size, kernels.cpu_isa)
        backend = get_attn_backend(config.attention_config.attention_backend, spec, config.parts)
        sampler = load_part("sample.sampler", config.parts)()
        self.replacements = accelerate(model, backend, kernels, sampler)
        self.model_runner = ModelRunner(config, model, backend, self.device, sampler, groups)

    def _load_model(self, model_path: Path, dtype: torch.dtype) -> LlamaForCausalLM:
        config, kernels = self.config, self.config.kernel_config
        arch, length = config.model_config.arch, config.max_model_len
        if config.model_config.load_format == "dummy":
            return self._random_model(dtype)
        return load_model(
            model_path,
            arch,
            dtype,
            self.device,
            linear_backend=kernels.linear_backend,
            huge_pages=kernels.huge_pages,
            cpu_isa=kernels.cpu_isa,
            max_model_len=length,
            parts=config.parts,
            groups=self.groups,
            **dataclasses.asdict(config.quantization_config),
        )

    def _random_model(self, dtype: torch.dtype) -> LlamaForCausalLM:
        config, kernels, quant = self.config, self.config.kernel_config, self.config.quantization_config
        arch, packing = config.model_config.arch, load_part("quantize.packing", config.parts)
        options = KernelOptions(
            dtype, self.device.type, quant.gptq_runtime, kernels.huge_pages, packing, kernels.cpu_isa
        )
        return random_model(
            arch,
            dtype,
            self.device,
            config.model_config.seed,
            packed_quantization(arch, options, quant.quantization, quant.gptq_kernel, kernels.linear_backend),
            max_model_len=config.max_model_len,
            groups=self.groups,
        )

    def available_kv_cache_bytes(self) -> int:
        """What the KV cache of this rank may take: on a CPU half of the free memory, at most 4 GiB, divided among the
        ranks of all engines; on a GPU its share.
        """
        free = self._free_memory()
        if self.device.type == "cpu":
            num_ranks = self.ranks_that_share_memory * self.config.parallel_config.num_local_engines
            return min(int(free * CPU_FREE_MEMORY_SHARE), CPU_KV_CACHE_CEILING) // num_ranks
        torch.cuda.reset_peak_memory_stats(self.device)
        temporary = profile_run(self.model_runner)
        peak = torch.cuda.max_memory_allocated(self.device) - temporary  # weights and activations
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)  # other programs, CUDA's own
        return int(total * self.config.cache_config.gpu_memory_utilization) - peak - others

    @property
    def ranks_that_share_memory(self) -> int:
        return self.config.parallel_config.world_size if self.device.type == "cpu" else 1

    def _free_memory(self) -> int:
        if self.device.type == "cpu":
            return available_memory_bytes()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        wanted, free = kv_cache_config.total_bytes * self.ranks_that_share_memory, self._free_memory()
        if wanted > free:
            raise ValueError(
                f"a KV cache of {wanted / GIB:.1f} GiB does not fit into the {free / GIB:.1f} GiB of free memory: "
                f"lower kv_cache_memory or num_kv_blocks"
            )
        self.model_runner.initialize_kv_cache(kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> ForwardHandle:
        return self.model_runner.execute(scheduler_output)

    def sample(self, handle: ForwardHandle) -> ModelRunnerOutput:
        return self.model_runner.sample(handle)


def rank_device(config: EngineConfig, shard: ModelShard) -> torch.device:
    """The device of a rank: the CPU, or a GPU of its own. Raises ValueError if there are too few GPUs."""
    parallel = config.parallel_config
    num_ranks = parallel.world_size * parallel.num_local_engines
    if config.device == "cpu" or num_ranks == 1:
        return torch.device(config.device)
    if parallel.executor_backend == "ray":
        return torch.device(config.device, 0)  # Ray shows an actor no GPU but its own
    num_gpus = torch.cuda.device_count()
    if num_ranks > num_gpus:
        raise ValueError(
            f"tensor_parallel_size={parallel.tensor_parallel_size} x pipeline_parallel_size="
            f"{parallel.pipeline_parallel_size} x data_parallel_size={parallel.num_local_engines} need {num_ranks} "
            f"GPUs, and there are {num_gpus}: lower them, or use Ray with several machines"
        )
    return torch.device(config.device, parallel.first_device + shard.rank)
