"""The ladder's claim about tokens, on the default model: what is the same on every rung, and what is not (R4.38).

Milestone: M4, the first rung whose kernels round differently. In fp32 all presets give the same greedy tokens, which
are HuggingFace's. In bf16 m1, m2 and m3 run the same operations, so a request that runs alone gets the same tokens from
each, and m2 and m3 also agree in a batch. Nothing is claimed for bf16 beyond that: torch's product of several rows
rounds differently from its product of one row, so m2 and m3 may answer differently in a batch than alone, and kernels
from m4 on differ again.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.csrc.build import load_ops
from folovllm.csrc.levels import NATIVE
from folovllm.milestones import engine_rungs

pytestmark = [pytest.mark.m4, pytest.mark.weights]

# HuggingFace's fp32 tokens of 20 prompts; in these three no decision is near a tie.
FIXTURE: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data/hf_greedy.json").read_text())["prompts"][
    2:5
]
PROMPTS = [{"prompt_token_ids": entry["prompt_token_ids"]} for entry in FIXTURE]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PRESETS = [rung.id for rung in engine_rungs()]
# m1 and m3 are compared with the same fixture in tests/m1/test_parity_real.py, m3 on these three prompts and 17 more.
# The top of the ladder runs below, on each level of the C++ kernels.
ELSEWHERE = ["m1", "m3", PRESETS[-1]]

Tokens = list[list[int]]


def make(folder: Path, preset: str, dtype: str, **args: str) -> LLM:
    return LLM(str(folder), preset=preset, dtype=dtype, max_model_len=256, **args)


def together(llm: LLM, prompts: list[dict[str, Any]]) -> Tokens:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def one_by_one(llm: LLM, prompts: list[dict[str, Any]]) -> Tokens:
    return [together(llm, [prompt])[0] for prompt in prompts]


def must_run_here(preset: str) -> bool:
    """Without C++ kernels there are no levels, and the test below is skipped."""
    return preset == PRESETS[-1] and load_ops(NATIVE) is None


def test_fp32_every_preset_gives_the_same_tokens(model_dir: Path) -> None:
    assert all(entry["min_gap"] > 1e-3 for entry in FIXTURE), "choose prompts without near ties"
    expected = [entry["token_ids"][: GREEDY.max_tokens] for entry in FIXTURE]
    presets = [preset for preset in PRESETS if preset not in ELSEWHERE or must_run_here(preset)]
    answers = {preset: together(make(model_dir, preset, "float32"), PROMPTS) for preset in presets}
    assert [preset for preset in presets if answers[preset] != expected] == []


def test_fp32_every_level_gives_the_same_tokens(model_dir: Path, isa: str) -> None:
    """The whole engine on the C++ kernels of each level: our fp32 linears, the decoder stack, attention, sampling."""
    expected = [entry["token_ids"][: GREEDY.max_tokens] for entry in FIXTURE]
    assert together(make(model_dir, PRESETS[-1], "float32", cpu_isa=isa), PROMPTS) == expected


def test_bf16_the_textbook_rungs_agree(model_dir: Path) -> None:
    """`linear_backend` is named because these rungs are claimed for torch's linears."""
    engines = {preset: make(model_dir, preset, "bfloat16", linear_backend="torch") for preset in ("m1", "m2", "m3")}
    alone = {preset: one_by_one(llm, PROMPTS[::2]) for preset, llm in engines.items()}
    assert alone["m1"] == alone["m2"] == alone["m3"]
    assert together(engines["m2"], PROMPTS) == together(engines["m3"], PROMPTS)
