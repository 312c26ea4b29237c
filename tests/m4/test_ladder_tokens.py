"""The ladder's claim about tokens, on the default model: what is the same on every rung, and what is not (R4.38).

Milestone: M4, the first rung whose kernels round differently. In fp32 all presets give the same greedy tokens. In bf16
m1, m2 and m3 run the same operations, so a request that runs alone gets the same tokens from each, and m2 and m3 also
agree in a batch. Nothing is claimed for bf16 beyond that: torch's product of several rows rounds differently from its
product of one row, so m2 and m3 may answer differently in a batch than alone, and kernels from m4 on differ again.
"""

from pathlib import Path

import pytest

from folovllm import LLM, SamplingParams
from folovllm.milestones import LADDER
from scripts.make_hf_fixture import PROMPTS

pytestmark = [pytest.mark.m4, pytest.mark.weights]

TEXTS = [prompt for prompt in PROMPTS.values() if isinstance(prompt, str)][2:5]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
PRESETS = [rung.id for rung in LADDER if rung.built and rung.id != "m0"]
TIE = 1e-3  # where the top two logits are closer, another order of sums may decide

Tokens = list[list[int]]


def make(folder: Path, preset: str, dtype: str, **args: str) -> LLM:
    return LLM(str(folder), preset=preset, dtype=dtype, max_model_len=256, **args)


def tokens_and_gap(llm: LLM, texts: list[str]) -> tuple[Tokens, float]:
    """Greedy tokens of each text, all sent together, and how far apart the closest decision's top two were."""
    completions = [output.outputs[0] for output in llm.generate(texts, GREEDY, use_tqdm=False)]
    gaps = []
    for entry in (entry for completion in completions for entry in completion.logprobs or []):
        first, second = sorted((value.logprob for value in entry.values()), reverse=True)[:2]
        gaps.append(first - second)
    return [completion.token_ids for completion in completions], min(gaps)


def one_by_one(llm: LLM, texts: list[str]) -> Tokens:
    return [tokens_and_gap(llm, [text])[0][0] for text in texts]


def test_fp32_every_preset_gives_the_same_tokens(model_dir: Path) -> None:
    answers = {}
    for preset in PRESETS:
        answers[preset], gap = tokens_and_gap(make(model_dir, preset, "float32"), TEXTS)
        assert gap > TIE, "choose a prompt without a near tie"
    assert {preset for preset in PRESETS if answers[preset] != answers["m1"]} == set()


def test_bf16_the_textbook_rungs_agree(model_dir: Path) -> None:
    """`linear_backend` is named because these rungs are claimed for torch's linears."""
    engines = {preset: make(model_dir, preset, "bfloat16", linear_backend="torch") for preset in ("m1", "m2", "m3")}
    alone = {preset: one_by_one(llm, TEXTS[::2]) for preset, llm in engines.items()}
    assert alone["m1"] == alone["m2"] == alone["m3"]
    together = {preset: tokens_and_gap(engines[preset], TEXTS)[0] for preset in ("m2", "m3")}
    assert together["m2"] == together["m3"]
