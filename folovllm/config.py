"""EngineConfig: every engine argument, typed, validated and frozen.

Milestone: M0. vLLM counterpart: vllm/config (VllmConfig and its parts) and vllm/engine/arg_utils.py.

Data flows one way: a user's arguments -> `EngineConfig.from_args` (checked on their own) -> `resolve` (a new config in
which everything that depends on the model and the device is filled in). Nothing is changed after construction; what is
discovered at run time, such as how many blocks fit, travels as its own object.

Row 0: plain data, no torch.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from folovllm import milestones
from folovllm.checks import (
    check_auto_or_bool,
    check_bool,
    check_choice,
    check_int,
    check_needs,
    check_number,
    check_optional_int,
    check_type,
)
from folovllm.generation_config import check_override
from folovllm.hf_config import ModelArchitecture
from folovllm.hf_overrides import check_overrides
from folovllm.parallel import ParallelConfig
from folovllm.parts import check_parts, variants
from folovllm.vllm_args import without_vllms_own

DEFAULT_MODEL = "smollm2-135m"
MAX_MODEL_LEN_BLOCK = "max_model_len"  # block_size of the contiguous cache: one page holds a whole request
DTYPES = ("auto", "float32", "bfloat16", "float16")
VLLM_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other names of these
DEVICES = ("auto", "cpu", "cuda")
ATTENTION_BACKENDS = (  # only their names; attention/selector.py knows where they are and what they can run
    "auto",
    "torch_naive",
    "torch_sdpa",
    "torch_flash",
    "cpu_paged",
    "triton_paged",
    "flash_attn",
)
CPU_ISAS = ("native", "avx512", "avx2", "portable")  # csrc/levels.py knows which of them a machine has
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GPTQ_NAMES = ("gptq", "gptq_marlin")  # vLLM's values of `quantization` for a GPTQ checkpoint
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
DEFAULT_MAX_NUM_SEQS = {"cpu": 64, "cuda": 256}
# Buffers and block tables are allocated for these counts at start: a slip of the keyboard must not take all memory.
LARGEST_NUM_SEQS = 2**16
MAX_CPU_THREADS = 1024
LARGEST_NUM_BATCHED_TOKENS = 2**24


@dataclass(frozen=True)
class ModelConfig:
    """Which model and tokenizer, in which precision, how long."""

    model: str = DEFAULT_MODEL  # an alias, a folder or a HuggingFace id
    served_model_name: str | list[str] | None = None  # what to call the model instead; the first name is shown
    tokenizer: str | None = None  # an alias, a folder or a HuggingFace id; None: the model's own
    tokenizer_mode: str = "auto"  # only "auto": tokenizers are read from tokenizer.json
    skip_tokenizer_init: bool = False  # prompts are token ids and outputs have no text
    load_format: str = "auto"  # "dummy": random weights, so that only config.json is needed
    hf_overrides: Mapping[str, Any] | None = None  # replaces values of config.json (folovllm.hf_overrides)
    generation_config: str = "auto"  # sampling defaults: the model's, "vllm" for vLLM's, or those of another folder
    override_generation_config: Mapping[str, Any] | None = None  # e.g. {"temperature": 0.7}
    dtype: str = "auto"  # "float32", "bfloat16", "float16"; "auto": the checkpoint's, fp32 if bf16 is slow here
    max_model_len: int | None = None  # tokens, prompt and output together; None: what the model was trained for
    seed: int = 0  # of requests that have no seed of their own
    max_logprobs: int = 20  # the most logprobs that a request may ask for; -1: the whole vocabulary
    download_dir: str | None = None  # where models are kept; None: the user's cache folder
    architecture: ModelArchitecture | None = None  # filled by resolve

    def __post_init__(self) -> None:
        check_type("model", self.model, str)
        if not self.model:
            raise ValueError("model must not be empty: give an alias ('smollm2-135m'), a folder or a HuggingFace id")
        dtype = str(self.dtype).removeprefix("torch.")  # torch.float16 is as good as "float16"
        if dtype in (*DTYPES, *VLLM_DTYPES):
            object.__setattr__(self, "dtype", VLLM_DTYPES.get(dtype, dtype))
        check_choice("dtype", self.dtype, DTYPES)
        self._check_tokenizer()
        self._check_names()
        check_choice("load_format", self.load_format, ("auto", "safetensors", "dummy"))
        check_overrides({} if self.hf_overrides is None else self.hf_overrides)
        check_override({} if self.override_generation_config is None else self.override_generation_config)
        check_type("generation_config", self.generation_config, str)
        check_optional_int("max_model_len", self.max_model_len, low=2)
        check_int("seed", self.seed, low=-(2**63), high=2**63 - 1)
        check_int("max_logprobs", self.max_logprobs, low=-1, hint="-1 means the whole vocabulary")
        if self.download_dir is not None:
            check_type("download_dir", self.download_dir, str)

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None:
            check_type("tokenizer", self.tokenizer, str)
        check_bool("skip_tokenizer_init", self.skip_tokenizer_init)
        if self.tokenizer_mode != "auto":
            raise ValueError(
                f"tokenizer_mode must be 'auto', got {self.tokenizer_mode!r}: tokenizers are read from tokenizer.json "
                "(the fast kind) only; transformers makes one of an older tokenizer: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )

    def _check_names(self) -> None:
        names = self.served_model_name
        listed = [names] if isinstance(names, str) else [] if names is None else names
        if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) and name for name in listed):
            raise ValueError(f"served_model_name must be a name or a list of names, got {names!r}")

    @property
    def shown_name(self) -> str:
        """What to call the model: the first `served_model_name`, or `model` if there is none."""
        names = self.served_model_name or self.model
        return names if isinstance(names, str) else names[0]

    @property
    def arch(self) -> ModelArchitecture:
        assert self.architecture is not None, "resolve() first"
        return self.architecture


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache: how it is cut into blocks and how large it is."""

    block_size: int | str = MAX_MODEL_LEN_BLOCK  # tokens per block; "max_model_len": one block per request (M1, M2)
    gpu_memory_utilization: float = 0.9  # on CUDA: the share of the GPU's memory that the engine may take
    kv_cache_memory: int | None = None  # bytes of each rank; None: on a CPU half of the free memory, at most 4 GiB
    num_kv_blocks: int | None = None  # instead of a size in bytes; one of them is the null block
    enable_prefix_caching: bool = False  # share the full blocks of equal prompt prefixes (M6)
    prefix_index: str = "hash"  # or "trie": a tree of blocks, with the same hits
    partial_block_hits: bool = False  # copy the tokens of a block that only begins like ours, instead of computing them
    prefix_caching_hash_algo: str = "sha256"  # or "xxhash": faster, and needs the package xxhash
    prefix_caching_seed: int = 0  # of the hash chain's root; vLLM draws a root per process
    free_uncached_first: bool = True  # freed blocks that no prefix hit can find are reused first

    def __post_init__(self) -> None:
        if self.block_size != MAX_MODEL_LEN_BLOCK:
            if isinstance(self.block_size, str):
                raise ValueError(
                    f"block_size must be a number of tokens, such as 16, or 'max_model_len', got {self.block_size!r}"
                )
            check_int("block_size", self.block_size, low=1, hint="tokens, or 'max_model_len'")
        self._check_prefix_caching()
        check_bool("free_uncached_first", self.free_uncached_first)
        check_optional_int("kv_cache_memory", self.kv_cache_memory, low=1, hint="bytes, such as 4 * 1024**3")
        check_optional_int("num_kv_blocks", self.num_kv_blocks, low=2, hint="one of them is the null block")
        check_number("gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, low_open=True)

    def _check_prefix_caching(self) -> None:
        check_bool("enable_prefix_caching", self.enable_prefix_caching)
        check_choice("prefix_index", self.prefix_index, variants("core.prefix_index"))
        check_bool("partial_block_hits", self.partial_block_hits)
        check_choice("prefix_caching_hash_algo", self.prefix_caching_hash_algo, ("sha256", "xxhash"))
        check_int("prefix_caching_seed", self.prefix_caching_seed, low=0)
        if self.partial_block_hits and not self.enable_prefix_caching:
            raise ValueError(
                "partial_block_hits needs prefix caching: set enable_prefix_caching=True or leave it False"
            )
        if self.prefix_caching_hash_algo == "xxhash" and importlib.util.find_spec("xxhash") is None:
            raise ValueError(
                "prefix_caching_hash_algo='xxhash' needs the package xxhash: pip install xxhash, or use 'sha256'"
            )


@dataclass(frozen=True)
class SchedulerConfig:
    """Which requests run in a step, and how many tokens of each."""

    batching: str = "continuous"  # "static": admit only when nothing runs
    scheduling_policy: str = "fcfs"  # order of the waiting queue; vLLM's SchedulerConfig.policy
    max_num_seqs: int | None = None  # requests that run at once; None: 64 on a CPU, 256 on CUDA
    max_num_batched_tokens: int | None = None  # budget of a step; None: 2048, or more without chunks
    enable_chunked_prefill: bool = False  # split long prompts over steps (M5)
    long_prefill_token_threshold: int = 0  # the most tokens of one prompt in a step; 0: no limit; needs chunked prefill
    reserve_full_sequence: bool = True  # admit a request only if its whole prompt finds blocks now

    def __post_init__(self) -> None:
        check_choice("batching", self.batching, ("static", "continuous"))
        check_choice("scheduling_policy", self.scheduling_policy, variants("core.request_queue"))
        check_optional_int("max_num_seqs", self.max_num_seqs, low=1, high=LARGEST_NUM_SEQS)
        check_optional_int(
            "max_num_batched_tokens", self.max_num_batched_tokens, low=1, high=LARGEST_NUM_BATCHED_TOKENS
        )
        check_bool("enable_chunked_prefill", self.enable_chunked_prefill)
        check_int("long_prefill_token_threshold", self.long_prefill_token_threshold, low=0)
        check_bool("reserve_full_sequence", self.reserve_full_sequence)
        if self.long_prefill_token_threshold and not self.enable_chunked_prefill:
            raise ValueError(
                "long_prefill_token_threshold needs chunked prefill: set enable_chunked_prefill=True or leave it 0"
            )


@dataclass(frozen=True)
class AttentionConfig:
    """Which attention backend."""

    attention_backend: str = "torch_naive"  # "auto": the fastest that this machine and model allow

    def __post_init__(self) -> None:
        check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)


@dataclass(frozen=True)
class KernelConfig:
    """What computes everything but attention. The defaults are plain torch, the code that a reader reads.

    A switch with three values takes "auto" (replace it where this machine and this model allow it), True (replace it,
    and raise a ValueError with the reason if that is impossible) and False. `folovllm info --engine` prints what runs.
    """

    linear_backend: str = "torch"  # "auto": our C++ kernel, else oneDNN's packing; "onednn": the packing alone
    fused_ops: bool | str = False  # RMSNorm with its residual, SiLU-mul and rotary as one C++ pass each
    fused_mlp: bool | str = False  # SiLU-mul inside the gate_up multiplication
    decoder_stack: bool | str = False  # all decoder layers of a step as one C++ call
    sampler_backend: str = "torch"  # "auto": C++, else a shortlist of the largest logits; "shortlist": that alone
    huge_pages: bool = False  # ask for pages of 2 MiB for packed weights and the KV cache (Linux)
    touch_kv_pages: bool = False  # write the first pages of the KV cache at start and not in the first steps
    keep_freed_memory: bool = False  # malloc keeps what tensors free (glibc; from then on for the whole process)
    cpu_isa: str = "native"  # limits the C++ kernels to "avx512", "avx2" or "portable"; "native": all the CPU has

    def __post_init__(self) -> None:
        check_choice("linear_backend", self.linear_backend, ("auto", "onednn", "torch"))
        check_choice("sampler_backend", self.sampler_backend, ("auto", "shortlist", "torch"))
        check_choice("cpu_isa", self.cpu_isa, CPU_ISAS)
        for name in ("fused_ops", "fused_mlp", "decoder_stack"):
            check_auto_or_bool(name, getattr(self, name))
        for name in ("huge_pages", "touch_kv_pages", "keep_freed_memory"):
            check_bool(name, getattr(self, name))
        self._check_demands()

    def _check_demands(self) -> None:
        """Refuses a demand (True) for something whose ingredients are switched off."""
        needs = {"linear_backend='auto'": self.linear_backend == "auto"}
        check_needs("fused_mlp", self.fused_mlp, needs)
        needs |= {"fused_ops='auto'": self.fused_ops is not False, "fused_mlp='auto'": self.fused_mlp is not False}
        check_needs("decoder_stack", self.decoder_stack, needs)


@dataclass(frozen=True)
class QuantizationConfig:
    """How a quantised checkpoint is run: as it is ("auto"), or turned into plain weights while it is loaded.

    vLLM's "gptq" and "gptq_marlin" are "auto", and the model must be a GPTQ checkpoint.
    """

    quantization: str = "dequantize"  # "auto": run a GPTQ checkpoint on its packed weights (M7)
    gptq_kernel: str = "auto"  # what multiplies with packed weights; "dequant" is the reference
    gptq_runtime: str = "auto"  # cpu_int4: "memory" keeps 4 bits alone, "speed" also bf16 for large batches

    def __post_init__(self) -> None:
        check_choice("quantization", self.quantization, ("auto", "dequantize", *GPTQ_NAMES))
        check_choice("gptq_kernel", self.gptq_kernel, ("auto", "dequant", "cpu_int4", "triton"))
        check_choice("gptq_runtime", self.gptq_runtime, ("auto", "memory", "speed"))
        for name in ("gptq_kernel", "gptq_runtime"):
            if self.quantization == "dequantize" and getattr(self, name) != "auto":
                raise ValueError(f"{name} needs packed weights: set quantization='auto', or leave it 'auto'")


@dataclass(frozen=True)
class EngineConfig:
    """All parts together. Build it with `from_args` or `preset`, never by changing one."""

    model_config: ModelConfig = field(default_factory=ModelConfig)
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    attention_config: AttentionConfig = field(default_factory=AttentionConfig)
    kernel_config: KernelConfig = field(default_factory=KernelConfig)
    quantization_config: QuantizationConfig = field(default_factory=QuantizationConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    device: str = "auto"  # "cpu" or "cuda"; "auto": CUDA if there is one
    cpu_threads: int | None = None  # threads that compute on a CPU; None: torch's number or the CPU quota
    enforce_eager: bool = False  # CUDA graphs are a rung after M7; until then every step is eager
    disable_log_stats: bool = True  # the server logs no throughput, and GET /metrics has no vllm: names
    trace: str | None = None  # write one record per step to this file (folovllm.trace)
    parts: Mapping[str, str] | None = None  # part -> "path.py:Class" (folovllm.parts)

    def __post_init__(self) -> None:
        for name, cls in CONFIG_GROUPS.items():
            check_type(name, getattr(self, name), cls)
        check_choice("device", self.device, DEVICES)
        check_optional_int("cpu_threads", self.cpu_threads, low=1, high=MAX_CPU_THREADS)
        check_bool("enforce_eager", self.enforce_eager)
        check_bool("disable_log_stats", self.disable_log_stats)
        backend = self.attention_config.attention_backend
        paged = {"attention_backend='cpu_paged' or 'auto'": backend in ("auto", "cpu_paged")}
        check_needs("decoder_stack", self.kernel_config.decoder_stack, paged)
        if self.trace is not None:
            check_type("trace", self.trace, str)
        if self.parts is not None:
            _check_parts(self.parts)

    @classmethod
    def from_args(cls, preset: str | None = None, without: Iterable[str] = (), **engine_args: Any) -> "EngineConfig":
        """Config from flat engine arguments, over those of `preset` (default: the top of the built ladder).

        E.g. from_args(model="smollm2-135m", preset="m2", max_num_seqs=8). Raises ValueError for an unknown argument
        (with the nearest known one), an argument that only vLLM has (with what to do instead, see folovllm.vllm_args),
        a value out of range, or a switch of a milestone that is not built yet.
        """
        known = engine_arg_names()
        engine_args = without_vllms_own(engine_args, known)
        flat = milestones.fold(milestones.top_rung().id if preset is None else preset, without) | engine_args
        _refuse_unbuilt_switches(flat)
        groups: dict[str, dict[str, Any]] = {}
        for name, value in flat.items():
            groups.setdefault(known[name], {})[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        own = groups.pop("", {})
        return cls(**{group: CONFIG_GROUPS[group](**args) for group, args in groups.items()}, **own)

    @classmethod
    def preset(cls, rung: str, without: Iterable[str] = (), **engine_args: Any) -> "EngineConfig":
        """ "The engine as of `rung`": the switches of the ladder up to it, without the rungs named in `without`."""
        return cls.from_args(preset=rung, without=without, **engine_args)

    def resolve(self, arch: ModelArchitecture, device: str, fast_bf16: bool = True) -> "EngineConfig":
        """A new config with all that depends on the model and the device filled in, and checked against it.

        `device` is "cpu" or "cuda"; `fast_bf16` tells whether bfloat16 is faster there than float32.
        """
        assert device in DEFAULT_MAX_NUM_SEQS
        max_model_len, quantization = self._resolve_max_model_len(arch), self._resolve_quantization(arch)
        self.parallel_config.check(arch, is_packed=quantization.quantization == "auto")
        return dataclasses.replace(
            self,
            device=device,
            model_config=dataclasses.replace(
                self.model_config,
                architecture=arch,
                dtype=self._resolve_dtype(arch, fast_bf16),
                max_model_len=max_model_len,
            ),
            cache_config=dataclasses.replace(self.cache_config, block_size=self._resolve_block_size(max_model_len)),
            scheduler_config=dataclasses.replace(
                self.scheduler_config,
                max_num_seqs=self.scheduler_config.max_num_seqs or DEFAULT_MAX_NUM_SEQS[device],
                max_num_batched_tokens=self._resolve_token_budget(max_model_len),
            ),
            quantization_config=quantization,
        )

    # What resolve() has filled in, with the type that it then has.
    @property
    def max_model_len(self) -> int:
        assert self.model_config.max_model_len is not None, "resolve() first"
        return self.model_config.max_model_len

    @property
    def block_size(self) -> int:
        assert isinstance(self.cache_config.block_size, int), "resolve() first"
        return self.cache_config.block_size

    @property
    def max_num_seqs(self) -> int:
        assert self.scheduler_config.max_num_seqs is not None, "resolve() first"
        return self.scheduler_config.max_num_seqs

    @property
    def max_num_batched_tokens(self) -> int:
        assert self.scheduler_config.max_num_batched_tokens is not None, "resolve() first"
        return self.scheduler_config.max_num_batched_tokens

    @property
    def max_steps_in_flight(self) -> int:
        """How many steps the engine starts before it needs the answer of the first: one per stage of the pipeline.

        A scheduler or KV cache manager that a learner replaced may rely on one step at a time, so it gets that.
        """
        is_replaced = bool({"core.scheduler", "core.kv_cache_manager"} & (self.parts or {}).keys())
        return 1 if is_replaced else self.parallel_config.pipeline_parallel_size

    def _resolve_max_model_len(self, arch: ModelArchitecture) -> int:
        asked, limit = self.model_config.max_model_len, arch.max_context_len
        if asked is not None and asked > limit:
            stretched = ""
            if limit != arch.max_position_embeddings:
                stretched = (
                    f" (max_position_embeddings={arch.max_position_embeddings}, rope_type={arch.rope.rope_type!r} with "
                    f"factor {arch.rope.factor:g})"
                )
            raise ValueError(
                f"max_model_len={asked} is more than the model's {limit} positions{stretched}; use at most {limit}"
            )
        return asked or limit

    def _resolve_dtype(self, arch: ModelArchitecture, fast_bf16: bool) -> str:
        if self.model_config.dtype != "auto":
            return self.model_config.dtype
        return "float32" if arch.dtype == "bfloat16" and not fast_bf16 else arch.dtype

    def _resolve_quantization(self, arch: ModelArchitecture) -> QuantizationConfig:
        asked = self.quantization_config
        if asked.quantization not in GPTQ_NAMES:
            return asked
        if arch.quantization is None:
            raise ValueError(
                f"quantization={asked.quantization!r}, but the model's weights are not quantised: leave it out"
            )
        return dataclasses.replace(asked, quantization="auto")

    def _resolve_block_size(self, max_model_len: int) -> int:
        block_size = self.cache_config.block_size
        if isinstance(block_size, str):
            return max_model_len
        if block_size > max_model_len:
            raise ValueError(
                f"block_size={block_size} is more than max_model_len={max_model_len}: a block never holds more "
                f"than one request; use at most {max_model_len}"
            )
        return block_size

    def _resolve_token_budget(self, max_model_len: int) -> int:
        budget, chunked = self.scheduler_config.max_num_batched_tokens, self.scheduler_config.enable_chunked_prefill
        if budget is None:
            return DEFAULT_MAX_NUM_BATCHED_TOKENS if chunked else max(DEFAULT_MAX_NUM_BATCHED_TOKENS, max_model_len)
        if not chunked and budget < max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={budget} is less than max_model_len={max_model_len}, and without chunked "
                f"prefill a longer prompt would wait forever: raise it, or lower max_model_len"
            )
        return budget


# The fields of EngineConfig that are config classes of their own.
CONFIG_GROUPS: dict[str, Any] = {
    "model_config": ModelConfig,
    "cache_config": CacheConfig,
    "scheduler_config": SchedulerConfig,
    "attention_config": AttentionConfig,
    "kernel_config": KernelConfig,
    "quantization_config": QuantizationConfig,
    "parallel_config": ParallelConfig,
}

FILLED_IN = ("architecture", "data_parallel_rank")  # by the engine: they are no arguments


def engine_arg_names() -> dict[str, str]:
    """Every flat engine argument -> the group of EngineConfig that it belongs to ("" for EngineConfig itself)."""
    groups = CONFIG_GROUPS.items()
    names = {f.name: group for group, cls in groups for f in dataclasses.fields(cls) if f.name not in FILLED_IN}
    return names | {f.name: "" for f in dataclasses.fields(EngineConfig) if f.name not in CONFIG_GROUPS}


def _refuse_unbuilt_switches(flat: Mapping[str, Any]) -> None:
    for rung in milestones.rungs_above_top():
        for name, off in rung.off.items():
            # Only the rung's own value is refused: attention_backend="torch_sdpa" may well be there before "auto" is.
            if flat[name] == rung.on[name] != off and name not in _switched_by_built_rungs():
                raise milestones.RungNotBuiltError(
                    f"{name}={flat[name]!r} belongs to milestone {rung.id} ({rung.title}), which is not built yet; "
                    f"use {name}={off!r}"
                )


def _switched_by_built_rungs() -> set[str]:
    return {name for rung in milestones.LADDER if rung.built for name in rung.on}


def _check_parts(parts: Any) -> None:
    """Names and types only; `load_part` checks that the file exists and that the class fits."""
    if not isinstance(parts, Mapping):
        raise ValueError(f"parts must be a dict like {{'core.scheduler': 'path.py:Class'}}, got {parts!r}")
    for name, spec in parts.items():
        if not isinstance(spec, str):
            raise ValueError(f"parts[{name!r}] must be a string 'path.py:Class' or 'module:Class', got {spec!r}")
    check_parts(parts)
