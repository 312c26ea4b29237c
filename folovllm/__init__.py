"""FoloVLLM: vLLM rebuilt so that people can learn it, and a real engine while they do.

Names are imported on first use, so that `import folovllm` costs nothing and the core stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from folovllm.config import EngineConfig
    from folovllm.engine.async_llm import AsyncLLM
    from folovllm.engine.llm_engine import LLMEngine
    from folovllm.entrypoints.llm import LLM
    from folovllm.entrypoints.start import start_async_llm
    from folovllm.outputs import CompletionOutput, RequestOutput
    from folovllm.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"

_HOME = {
    "AsyncLLM": "folovllm.engine.async_llm",
    "LLM": "folovllm.entrypoints.llm",
    "start_async_llm": "folovllm.entrypoints.start",
    "LLMEngine": "folovllm.engine.llm_engine",
    "EngineConfig": "folovllm.config",
    "SamplingParams": "folovllm.sampling_params",
    "RequestOutputKind": "folovllm.sampling_params",
    "RequestOutput": "folovllm.outputs",
    "CompletionOutput": "folovllm.outputs",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "LLMEngine",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "__version__",
    "start_async_llm",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'folovllm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
