"""OpenVINO GenAI as a peer: its continuous batching pipeline, on the GGUF file as it is.

Milestone: M4. Stand-alone: runs in an environment with openvino-genai. Everything that is not set here is OpenVINO's
own choice: on a CPU it also keeps the KV cache in 8 bits and computes in bf16 where the processor can.
"""

from importlib import metadata
from typing import Any

from peer_process import Engine, Request, Task, Tokens, main

MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 32, 512


def import_peer(task: Task) -> Any:
    import numpy
    import openvino
    import openvino_genai

    return numpy, openvino, openvino_genai


def load(imported: Any, task: Task) -> Engine:
    numpy, openvino, genai = imported
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = max(1, round(task["kv_cache_gib"]))  # whole GB
    scheduler.max_num_seqs = MAX_NUM_SEQS
    scheduler.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
    scheduler.enable_prefix_caching = False  # the batch repeats the requests of the single stream
    properties = {"INFERENCE_NUM_THREADS": task["threads"]}
    pipeline = genai.ContinuousBatchingPipeline(task["model"], scheduler, "CPU", properties)

    def generate(requests: list[Request]) -> Tokens:
        prompts = [openvino.Tensor(numpy.array([prompt], dtype=numpy.int64)) for prompt, _ in requests]  # [1, length]
        results = pipeline.generate(prompts, [exactly(genai, count) for _, count in requests])
        return [list(map(int, result.m_generation_ids[0])) for result in results]

    settings = {
        "max_num_seqs": MAX_NUM_SEQS,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "enable_prefix_caching": False,
        **properties,
    }
    return Engine(generate, metadata.version("openvino-genai"), settings)


def exactly(genai: Any, count: int) -> Any:
    """Greedy, `count` tokens, whatever they are."""
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
    return config


if __name__ == "__main__":
    raise SystemExit(main(import_peer, load))
