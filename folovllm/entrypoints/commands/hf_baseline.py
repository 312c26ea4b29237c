"""HuggingFace transformers as the yardstick: its greedy tokens, the time they took, and how close a decision was.

Milestone: M1. vLLM counterpart: `HfRunner` in vllm's tests/conftest.py. Used by `folovllm demo`, the tests, and the
benchmark, which adds padded batches (folovllm/benchmarks/hf_arm.py). Left out: sampling.

transformers takes seconds to import, so the functions that need it import it.
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from folovllm.engine.tokenizer import Tokenizer
from folovllm.hf_config import load_hf_config


class HfGreedy(NamedTuple):
    """Result of `hf_greedy`; both lists are in the order of the prompts."""

    token_ids: list[list[int]]  # generated ones; ends with EOS where the model said it
    seconds: list[float]  # per prompt, prefill included, loading and warm-up not


@lru_cache(maxsize=1)
def load_hf(model_dir: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """The HuggingFace model of a folder, ready for greedy search; the model of the last call is kept."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=getattr(torch, dtype))
    # A model's own generation config may ask for a repetition penalty or the like: greedy search has none of that.
    model.generation_config = transformers.GenerationConfig()
    return model.to(device).eval()


def hf_greedy(
    model_dir: str | Path,
    prompts: Sequence[list[int]],
    max_new_tokens: Sequence[int],
    dtype: str = "float32",
    *,
    ignore_eos: bool = False,
    device: str = "cpu",
    warm_up: bool = True,
    on_done: Callable[[int], None] | None = None,
) -> HfGreedy:
    """HuggingFace `generate` on each prompt (token ids), one after another, greedy.

    It stops at the EOS ids at which our engine stops, or never before max_new_tokens with `ignore_eos`. `warm_up`
    generates two tokens first, untimed. `on_done(index)` is called after each prompt.
    """
    folder = Path(model_dir)
    model = load_hf(folder, dtype, device)
    eos = [] if ignore_eos else _stop_ids(folder)
    if warm_up and prompts:
        _greedy(model, prompts[0], 2, [])
    result = HfGreedy([], [])
    for index, (prompt, count) in enumerate(zip(prompts, max_new_tokens, strict=True)):
        start = time.perf_counter()
        result.token_ids.append(_greedy(model, prompt, count, eos))
        result.seconds.append(time.perf_counter() - start)
        if on_done is not None:
            on_done(index)
    return result


@torch.inference_mode()
def hf_top_two_gap(model_dir: str | Path, token_ids: list[int], dtype: str = "float32", device: str = "cpu") -> float:
    """How far the two largest logits after `token_ids` are apart: near 0, either token is a right greedy choice."""
    model = load_hf(Path(model_dir), dtype, device)
    inputs = torch.tensor([token_ids], device=model.device)  # [1, num_tokens]
    logits = model(inputs, attention_mask=torch.ones_like(inputs)).logits[0, -1]  # [vocab_size]
    first, second = logits.float().topk(2).values.tolist()
    return float(first - second)


def _stop_ids(folder: Path) -> list[int]:
    """The ids that end a text: the tokenizer's EOS and those of the configs."""
    tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").is_file() else None
    own = [tokenizer.eos_token_id] if tokenizer is not None and tokenizer.eos_token_id is not None else []
    return list(dict.fromkeys([*own, *load_hf_config(folder).eos_token_ids]))


def _greedy(model: Any, prompt: list[int], count: int, eos: list[int]) -> list[int]:
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0
    )
    inputs = torch.tensor([prompt], device=model.device)  # [1, num_prompt_tokens]
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return [int(token) for token in output[0, len(prompt) :]]
