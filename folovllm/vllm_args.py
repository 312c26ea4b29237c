"""What FoloVLLM answers to the engine arguments of vLLM that it does not have.

Milestone: M0. vLLM counterpart: EngineArgs (vllm/engine/arg_utils.py at v0.11.0), which names every argument here.

Row 0: plain data, no torch. A script written for vLLM passes many arguments at their defaults, such as
tensor_parallel_size=1. A value that changes nothing here either is accepted without a word; any other value is refused
with what to do instead. None stands for "not given", as in vLLM.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from folovllm.utils import unknown_name_message

# vLLM's defaults of these are None, "the engine decides": so does leaving them out.
NONE_MEANS_DEFAULT = ("seed", "quantization", "block_size", "enable_prefix_caching", "enable_chunked_prefill")


class Answer(NamedTuple):
    """What to do instead of passing the argument, and the values that change nothing."""

    instead: str
    harmless: tuple[Any, ...] = ()


class _Anything(tuple[Any, ...]):
    """Every value is harmless: the argument tunes a mechanism that FoloVLLM does not have."""

    def __contains__(self, value: object) -> bool:
        return True


ANYTHING = _Anything()

_OTHER_PARALLELISM = (
    "use tensor_parallel_size, pipeline_parallel_size or data_parallel_size: there is no other parallelism yet"
)
_NO_NODES = (
    "several machines are joined through Ray: use distributed_executor_backend='ray' or data_parallel_backend='ray', "
    "with ray_address="
)
_ENGINES_ARE_PLACED = (
    "data_parallel_size engines run on this machine, or with data_parallel_backend='ray' where Ray has room: remove it"
)
_NO_MULTIMODAL = "FoloVLLM runs text models only: remove it"
_NO_LORA = "LoRA adapters are not applied: merge the adapter into the weights (peft: merge_and_unload) and load those"
_NO_POOLING = "FoloVLLM generates text and has no embedding or pooling models: remove it"
_NO_STRUCTURE = "structured output is not built yet: put the wanted format into the prompt, or use allowed_token_ids"
_NO_LOGITS_PROCESSORS = "use logit_bias, bad_words or allowed_token_ids of SamplingParams"
_NO_SPECULATION = "speculative decoding is not built yet: remove it"
_NO_REVISION = "download the wanted revision (hf download REPO --revision REV --local-dir DIR) and pass its folder"
_NO_GRAPHS = "every step runs eagerly: remove it"
_NO_REMOTE_CODE = "code from a model's repository is never run: use a model of a supported architecture"
_NO_TRACING = "use trace='steps.jsonl' and folovllm trace: one record per step"
_NO_OFFLOAD = "weights are never offloaded: use a smaller or a quantised model"
_NO_TRANSFER = "a KV cache is never handed to another engine: remove it"
_ONE_SERVER = "one server process serves one engine: remove it"

VLLM_ARGS: dict[str, Answer] = {
    # --- The model and its files
    "hf_config_path": Answer("put the config.json into the model's folder, or change values with hf_overrides"),
    "config_format": Answer("config.json is the one format that is read: remove it", ("auto", "hf")),
    "trust_remote_code": Answer(_NO_REMOTE_CODE, (False, True)),  # True permits what never happens here
    "model_impl": Answer("FoloVLLM has its own implementation of each model: remove it", ("auto", "vllm")),
    "revision": Answer(_NO_REVISION),
    "code_revision": Answer(_NO_REVISION),
    "tokenizer_revision": Answer(_NO_REVISION),
    "hf_token": Answer("log in once with 'hf auth login'"),
    "rope_scaling": Answer("use hf_overrides={'rope_scaling': {...}}", ({},)),
    "rope_theta": Answer("use hf_overrides={'rope_theta': ...}"),
    "disable_sliding_window": Answer("models with an active sliding window are refused: remove it", (False,)),
    "safetensors_load_strategy": Answer("files are memory-mapped, as with 'lazy': remove it", ("lazy",)),
    "model_loader_extra_config": Answer("there is one loader, without options: remove it", ({},)),
    "ignore_patterns": Answer("only safetensors files are ever downloaded: remove it", ANYTHING),
    "use_tqdm_on_load": Answer("loading shows no progress bar: remove it", ANYTHING),
    "pt_load_map_location": Answer("pickled weights are never opened: remove it", ANYTHING),
    "enable_prompt_embeds": Answer("prompts are text or token ids: remove it", (False,)),
    # --- Kinds of models and tasks
    "runner": Answer(_NO_POOLING, ("auto", "generate")),
    "convert": Answer(_NO_POOLING, ("auto", "none")),
    "task": Answer(_NO_POOLING, ("auto", "generate")),
    "pooler_config": Answer(_NO_POOLING),
    "override_pooler_config": Answer(_NO_POOLING),
    "allowed_local_media_path": Answer(_NO_MULTIMODAL, ("",)),
    "allowed_media_domains": Answer(_NO_MULTIMODAL),
    "limit_mm_per_prompt": Answer(_NO_MULTIMODAL, ANYTHING),
    "interleave_mm_strings": Answer(_NO_MULTIMODAL, (False,)),
    "media_io_kwargs": Answer(_NO_MULTIMODAL, ({},)),
    "mm_processor_kwargs": Answer(_NO_MULTIMODAL, ({},)),
    "disable_mm_preprocessor_cache": Answer(_NO_MULTIMODAL, ANYTHING),
    "mm_processor_cache_gb": Answer(_NO_MULTIMODAL, ANYTHING),
    "mm_processor_cache_type": Answer(_NO_MULTIMODAL, ANYTHING),
    "mm_shm_cache_max_object_size_mb": Answer(_NO_MULTIMODAL, ANYTHING),
    "mm_encoder_tp_mode": Answer(_NO_MULTIMODAL, ANYTHING),
    "io_processor_plugin": Answer(_NO_MULTIMODAL),
    "skip_mm_profiling": Answer(_NO_MULTIMODAL, ANYTHING),
    "video_pruning_rate": Answer(_NO_MULTIMODAL, (0, 0.0)),
    "enable_multimodal_encoder_data_parallel": Answer(_NO_MULTIMODAL, ANYTHING),
    "disable_chunked_mm_input": Answer(_NO_MULTIMODAL, ANYTHING),
    "mamba_cache_dtype": Answer("FoloVLLM has no Mamba layers: remove it", ANYTHING),
    "mamba_ssm_cache_dtype": Answer("FoloVLLM has no Mamba layers: remove it", ANYTHING),
    # --- Memory and KV cache
    "kv_cache_dtype": Answer("the KV cache has the model's dtype: use dtype=", ("auto",)),
    "calculate_kv_scales": Answer("the KV cache has the model's dtype, without scales: remove it", (False,)),
    "kv_cache_memory_bytes": Answer("use kv_cache_memory="),
    "num_gpu_blocks_override": Answer("use num_kv_blocks= (it counts the null block, too)"),
    "swap_space": Answer("a preempted request computes its KV cache again, nothing is swapped: remove it", ANYTHING),
    "cpu_offload_gb": Answer(_NO_OFFLOAD, (0, 0.0)),
    "enable_sleep_mode": Answer("delete the LLM to free its memory, and make it again", (False,)),
    "kv_sharing_fast_prefill": Answer("no supported model shares its KV cache between layers: remove it", (False,)),
    "disable_hybrid_kv_cache_manager": Answer("all layers have one kind of KV cache: remove it", ANYTHING),
    # --- Scheduling
    "max_num_partial_prefills": Answer("use long_prefill_token_threshold= to let short prompts pass", (1,)),
    "max_long_partial_prefills": Answer("use long_prefill_token_threshold= to let short prompts pass", (1,)),
    "num_lookahead_slots": Answer(_NO_SPECULATION, (0,)),
    "speculative_config": Answer(_NO_SPECULATION),
    "async_scheduling": Answer("a step is scheduled after the one before it: remove it", (False,)),
    "scheduler_cls": Answer("use parts={'core.scheduler': 'mine.py:Scheduler'}", ("vllm.core.scheduler.Scheduler",)),
    # --- Kernels and compilation
    "cuda_graph_sizes": Answer(_NO_GRAPHS, ([],)),
    "compilation_config": Answer(_NO_GRAPHS, (0, {})),
    "disable_cascade_attn": Answer("there is no cascade attention: remove it", ANYTHING),
    "override_attention_dtype": Answer("attention computes in the model's dtype: use dtype="),
    # --- Several devices and processes
    "decode_context_parallel_size": Answer(_OTHER_PARALLELISM, (1,)),
    "data_parallel_rank": Answer(_ENGINES_ARE_PLACED),
    "data_parallel_start_rank": Answer(_ENGINES_ARE_PLACED, (0,)),
    "data_parallel_size_local": Answer(_ENGINES_ARE_PLACED),
    "data_parallel_address": Answer(_ENGINES_ARE_PLACED),
    "data_parallel_rpc_port": Answer(_ENGINES_ARE_PLACED),
    "data_parallel_hybrid_lb": Answer(_ENGINES_ARE_PLACED, (False,)),
    "enable_expert_parallel": Answer(_OTHER_PARALLELISM, (False,)),
    "enable_dbo": Answer(_OTHER_PARALLELISM, (False,)),
    "dbo_decode_token_threshold": Answer(_OTHER_PARALLELISM, ANYTHING),
    "dbo_prefill_token_threshold": Answer(_OTHER_PARALLELISM, ANYTHING),
    "eplb_config": Answer(_OTHER_PARALLELISM),
    "enable_eplb": Answer(_OTHER_PARALLELISM, (False,)),
    "expert_placement_strategy": Answer(_OTHER_PARALLELISM, ("linear",)),
    "num_redundant_experts": Answer(_OTHER_PARALLELISM, (0,)),
    "eplb_window_size": Answer(_OTHER_PARALLELISM, ANYTHING),
    "eplb_step_interval": Answer(_OTHER_PARALLELISM, ANYTHING),
    "eplb_log_balancedness": Answer(_OTHER_PARALLELISM, ANYTHING),
    "max_parallel_loading_workers": Answer(_OTHER_PARALLELISM, ANYTHING),
    "disable_custom_all_reduce": Answer(_OTHER_PARALLELISM, ANYTHING),
    "ray_workers_use_nsight": Answer(_OTHER_PARALLELISM, (False,)),
    "worker_cls": Answer("use parts= to replace a part of the engine (folovllm.parts lists them)", ("auto",)),
    "worker_extension_cls": Answer("use parts= to replace a part of the engine (folovllm.parts lists them)", ("",)),
    "kv_transfer_config": Answer(_NO_TRANSFER),
    "kv_events_config": Answer(_NO_TRANSFER),
    "_api_process_count": Answer(_ONE_SERVER, (1,)),
    "_api_process_rank": Answer(_ONE_SERVER, (0,)),
    # --- LoRA
    "enable_lora": Answer(_NO_LORA, (False,)),
    "enable_lora_bias": Answer(_NO_LORA, (False,)),
    "max_loras": Answer(_NO_LORA, (1,)),
    "max_lora_rank": Answer(_NO_LORA, (16,)),
    "default_mm_loras": Answer(_NO_LORA),
    "fully_sharded_loras": Answer(_NO_LORA, (False,)),
    "max_cpu_loras": Answer(_NO_LORA),
    "lora_dtype": Answer(_NO_LORA, ("auto",)),
    "lora_extra_vocab_size": Answer(_NO_LORA, (256,)),
    # --- Sampling and output
    "logprobs_mode": Answer("logprobs are those of the raw logits: remove it", ("raw_logprobs",)),
    "logits_processor_pattern": Answer(_NO_LOGITS_PROCESSORS),
    "logits_processors": Answer(_NO_LOGITS_PROCESSORS, ([],)),
    "structured_outputs_config": Answer(_NO_STRUCTURE, ({},)),
    "guided_decoding_backend": Answer(_NO_STRUCTURE, ("auto",)),
    "guided_decoding_disable_fallback": Answer(_NO_STRUCTURE, (False,)),
    "guided_decoding_disable_any_whitespace": Answer(_NO_STRUCTURE, (False,)),
    "guided_decoding_disable_additional_properties": Answer(_NO_STRUCTURE, (False,)),
    "reasoning_parser": Answer("the output is not parsed: split the reasoning off the text yourself", ("",)),
    # --- Observability
    "show_hidden_metrics_for_version": Answer("LLM.stats() shows all there is: remove it"),
    "otlp_traces_endpoint": Answer(_NO_TRACING),
    "collect_detailed_traces": Answer(_NO_TRACING),
    "enable_log_requests": Answer(_NO_TRACING, (False,)),
    "additional_config": Answer("there are no platform plugins: remove it", ({},)),
}

# Arguments of older releases that scripts still pass, and of releases after v0.11.
VLLM_ARGS |= {
    "data_parallel_external_lb": Answer(_ENGINES_ARE_PLACED, (False,)),
    "prefill_context_parallel_size": Answer(_OTHER_PARALLELISM, (1,)),
    "nnodes": Answer(_NO_NODES, (1,)),
    "node_rank": Answer(_NO_NODES, (0,)),
    "master_addr": Answer(_NO_NODES),
    "master_port": Answer(_NO_NODES),
    "disable_async_output_proc": Answer("outputs are processed between two steps: remove it", ANYTHING),
    "max_seq_len_to_capture": Answer(_NO_GRAPHS, ANYTHING),
    "max_context_len_to_capture": Answer(_NO_GRAPHS, ANYTHING),
    "num_scheduler_steps": Answer("every step is scheduled: remove it", (1,)),
    "use_v2_block_manager": Answer("there is one block manager: remove it", ANYTHING),
    "preemption_mode": Answer("a preempted request computes its KV cache again: remove it", ("recompute",)),
    "worker_use_ray": Answer(_OTHER_PARALLELISM, (False,)),
    "disable_log_requests": Answer("requests are not logged: remove it", ANYTHING),
}

# The options of `vllm serve` that have one dash, such as -tp. Keyword arguments have no such forms.
SHORT_FORMS = {
    "O": "compilation_config",
    "asc": "api_server_count",
    "dcp": "decode_context_parallel_size",
    "dp": "data_parallel_size",
    "dpa": "data_parallel_address",
    "dpb": "data_parallel_backend",
    "dpe": "data_parallel_external_lb",
    "dph": "data_parallel_hybrid_lb",
    "dpl": "data_parallel_size_local",
    "dpn": "data_parallel_rank",
    "dpp": "data_parallel_rpc_port",
    "dpr": "data_parallel_start_rank",
    "ep": "enable_expert_parallel",
    "n": "nnodes",
    "pcp": "prefill_context_parallel_size",
    "pp": "pipeline_parallel_size",
    "r": "node_rank",
    "tp": "tensor_parallel_size",
}


def long_form(name: str) -> str:
    """What a name probably means, for suggestions. E.g. "tp" and "tp_size" -> "tensor_parallel_size"."""
    short = name.removesuffix("_size")
    return SHORT_FORMS.get(short, name) if len(short) > 1 else name


def without_vllms_own(engine_args: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """`engine_args` without the arguments that only vLLM has, if their values change nothing.

    ValueError for any other name that is not in `known`: with what to do instead, or with the nearest known name.
    """
    kept = {}
    for name, value in engine_args.items():
        if name in known:
            if value is not None or name not in NONE_MEANS_DEFAULT:
                kept[name] = value
        elif name not in VLLM_ARGS:
            raise ValueError(unknown_name_message("engine argument", name, list(known), long_form(name)))
        elif value is not None and value not in VLLM_ARGS[name].harmless:
            raise ValueError(
                f"{name}={value!r} is an engine argument of vLLM that FoloVLLM does not have; {VLLM_ARGS[name].instead}"
            )
    return kept
