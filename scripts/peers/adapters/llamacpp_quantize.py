"""A GGUF file in another type, made by llama.cpp: `python llamacpp_quantize.py FROM.gguf TO.gguf BF16`.

Milestone: M4. Stand-alone: runs in an environment with llama-cpp-python.
"""

import ctypes
import os
import sys

import llama_cpp


def main(source: str, target: str, gguf_type: str) -> int:
    prefix = "LLAMA_FTYPE_ALL_" if gguf_type == "F32" else "LLAMA_FTYPE_MOSTLY_"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, prefix + gguf_type)
    params.nthread = os.cpu_count() or 1
    params.allow_requantize = True
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
