"""The offline quantiser: GPTQ from the paper, layer by layer, with little memory (milestone M7).

vLLM counterpart: none; vLLM runs checkpoints that other tools (GPTQModel, llm-compressor) have made.
"""
