"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v.

Milestone: M1. vLLM counterpart: vllm/model_executor/models/qwen2.py. The bias is data (`ModelArchitecture.qkv_bias`),
so no code differs; the class exists because the registry and its readers look for the name.
"""

from folovllm.model_executor.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2 and Qwen2.5."""
