"""Linear layers with quantised weights (milestone M7). vLLM counterpart: vllm/model_executor/layers/quantization."""
