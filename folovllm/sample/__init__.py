"""From logits to tokens: the metadata of a step, the sampler, and its single steps in `ops`.

Milestone: M1. vLLM counterpart: vllm/v1/sample/. Left out: rejection sampling, which speculative decoding needs.
"""
