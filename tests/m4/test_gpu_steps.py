"""Steps of the engine on a GPU: each waits once (R4.57). Skipped where there is no GPU.

Milestone: M4. test_no_hidden_sync.py says the same of a GPU that is not there, whose driver cannot contradict.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from tests.gpu_waits import only_to_host_waits

pytestmark = [
    pytest.mark.m4,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 0.7, "top_k": 20, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.2, "logit_bias": {7: 2.0}},
]


def add_all(llm: LLM, name: str) -> None:
    for i, params in enumerate(PARAMS):
        prompt = {"prompt_token_ids": list(range(3, 13 + 20 * i))}
        sampling = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False, **params)
        llm.llm_engine.add_request(f"{name} {i}", prompt, sampling)


@pytest.mark.parametrize("name", ["triton_paged", "flash_attn", "torch_sdpa", "torch_flash", "torch_naive"])
def test_a_step_waits_once(name: str, tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, then decodes beside them. The first round is for what only the first use of a kernel needs."""
    page = 256 if name == "flash_attn" else 16
    args: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 256, "max_num_batched_tokens": 32, "block_size": page}
    args |= {"enable_prefix_caching": False, "skip_tokenizer_init": True}
    try:
        llm = LLM(str(tiny_model_dir("mistral")), device="cuda", attention_backend=name, **args)
    except ValueError as error:
        pytest.skip(str(error))
    engine = llm.llm_engine
    for round_name in ("first", "second"):
        add_all(llm, round_name)
        while round_name == "first" and engine.has_unfinished_requests():
            engine.step()
    with only_to_host_waits(monkeypatch) as waits:
        num_steps = 0
        while engine.has_unfinished_requests():
            engine.step()
            num_steps += 1
    # A step that ends in mid-prompt has nothing to wait for; a draw that the shortlist cannot decide waits once more.
    assert num_steps / 2 < len(waits) <= num_steps + 2
