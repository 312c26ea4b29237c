"""Keywords that `LLM`'s methods do not take: what is meant instead.

Milestone: M1. vLLM counterpart: the signatures of vllm/entrypoints/llm.py (`LLM.generate`, `LLM.chat`).
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from folovllm.engine.chat.options import unknown_keyword

# Keywords of vLLM's `generate` and `chat`, of several versions, that have no counterpart here.
VLLM_ONLY = {
    "guided_options_request": "structured output is not supported; leave it out",
    "lora_request": "LoRA adapters are not supported; merge the adapter into the weights and load that folder",
    "mm_processor_kwargs": "only text models are supported; leave it out",
    "prompt_adapter_request": "prompt adapters are not supported; leave it out",
    "prompt_token_ids": "give the ids as the prompt: {'prompt_token_ids': [...]}",
    "tokenization_kwargs": "encode the prompt with get_tokenizer().encode and give {'prompt_token_ids': [...]}",
}
Method = TypeVar("Method", bound=Callable[..., Any])


def drop_vllm_keywords(given: dict[str, Any]) -> dict[str, Any]:
    """`given` without the keywords that only vLLM has. TypeError if one of them asks for something."""
    for name, hint in VLLM_ONLY.items():
        if given.get(name) is not None:
            raise TypeError(f"{name} is a keyword of vLLM's that FoloVLLM does not have: {hint}")
    return {name: value for name, value in given.items() if name not in VLLM_ONLY}


def check_keywords(method: Method) -> Method:
    """Decorator. A keyword that `method` does not take is a TypeError that suggests the nearest one.

    E.g. generate("Hi", sampling_param=p): "unknown keyword 'sampling_param'; did you mean 'sampling_params'?"
    """
    names = [name for name in inspect.signature(method).parameters if name != "self"]

    @functools.wraps(method)
    def checked(*args: Any, **keywords: Any) -> Any:
        keywords = drop_vllm_keywords(keywords)
        if unknown := [name for name in keywords if name not in names]:
            raise TypeError(unknown_keyword(unknown[0], names))
        return method(*args, **keywords)

    return cast(Method, checked)
