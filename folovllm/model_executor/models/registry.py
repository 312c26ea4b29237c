"""Architecture name in config.json -> model class.

Milestone: M0. vLLM counterpart: vllm/model_executor/models/registry.py. Left out: inspecting a model in a subprocess,
out-of-tree plugins (a learner's class enters through `register_model`).

Lazy: an entry is a function, so only the file of the model that runs is imported.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from folovllm.model_executor.models.llama import LlamaForCausalLM

ModelClass = type["LlamaForCausalLM"]


def _llama() -> ModelClass:
    from folovllm.model_executor.models.llama import LlamaForCausalLM

    return LlamaForCausalLM


def _mistral() -> ModelClass:
    from folovllm.model_executor.models.llama import MistralForCausalLM

    return MistralForCausalLM


def _qwen2() -> ModelClass:
    from folovllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    return Qwen2ForCausalLM


def _qwen3() -> ModelClass:
    from folovllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    return Qwen3ForCausalLM


_MODELS: dict[str, Callable[[], ModelClass]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


def get_model_class(architecture: str) -> ModelClass:
    """The class that runs `architecture`; ValueError names those there are."""
    if architecture not in _MODELS:
        raise ValueError(f"expected one of the architectures {', '.join(_MODELS)}; found {architecture!r}")
    return _MODELS[architecture]()


def register_model(architecture: str, model_class: ModelClass) -> None:
    """Makes `model_class` the class that runs `architecture`, in place of the engine's own.

    `parse_hf_config` refuses names that are not among its SUPPORTED_ARCHITECTURES before the registry is asked, since
    it cannot know what their keys mean. A new name has to be added there, too.
    """
    _MODELS[architecture] = lambda: model_class
