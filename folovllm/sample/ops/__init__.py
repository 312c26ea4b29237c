"""The single steps of the sampler. Each is a pure function on `[rows, vocabulary]` tensors.

Milestone: M1. vLLM counterpart: vllm/v1/sample/ops/. Left out: GPU kernels of our own.
"""
