"""Finds the first token at which two rungs answer differently in bf16, and writes down the two logits that decided it.

Milestone: M4. vLLM counterpart: none (its tests compare log-probabilities of two engines for the same reason). Each of
the requests a and c of folovllm/learn/three_requests.py is answered alone, greedily, by m1 and by m4, in bf16 and in
fp32. Up to the first difference both bf16 engines have seen the same tokens, so their logits there can be compared. The
script also multiplies each engine's last hidden state with the output embedding in fp64: these are the logits before
the engine rounded them to bf16. docs/learn/04 shows the table, and tests/m4/test_first_difference.py holds it to the
model.

    python scripts/dev/first_difference.py [--json milestones/m4/results/first_difference.json]
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from folovllm import LLM, SamplingParams
from folovllm.benchmarks.machine import command_line, machine_header
from folovllm.benchmarks.report import write_json
from folovllm.learn.three_requests import EXAMPLES

OUT = Path(__file__).parents[2] / "milestones/m4/results/first_difference.json"
ARMS = (("m1", "float32"), ("m4", "float32"), ("m1", "bfloat16"), ("m4", "bfloat16"))
FP32, TEXTBOOK, KERNELS = ARMS[0], ARMS[2], ARMS[3]
NAMES = "ac"
MAX_TOKENS = 32
Arm = tuple[str, str]  # preset, dtype


class Answer(NamedTuple):
    """What one engine answered, and for each output token the logits that it was chosen from."""

    token_ids: list[int]
    logits: torch.Tensor  # [num_output_tokens, vocab_size], as the engine computed them
    before_rounding: torch.Tensor  # [num_output_tokens, vocab_size] fp64, from the hidden state of the last layer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=OUT, help="where the result goes")
    args = parser.parse_args()
    header = machine_header()
    answers, decode = answer_all()
    differences = [describe(name, {arm: answers[arm][name] for arm in ARMS}, decode) for name in NAMES]
    result = {
        "command": command_line("scripts/dev/first_difference.py", sys.argv[1:]),
        "unit": "logits",
        "digits": 5,
        "machine": header,
        "threads": torch.get_num_threads(),
        "differences": [difference for difference, _ in differences],
        "results": [row for _, rows in differences for row in rows],
    }
    write_json(result, args.json)
    print(json.dumps(result["results"], indent=1))
    return 0


def answer_all() -> tuple[dict[Arm, dict[str, Answer]], Callable[[int], str]]:
    """The answers of each arm to each request, and a function from token id to text."""
    answers: dict[Arm, dict[str, Answer]] = {}
    for preset, dtype in ARMS:
        llm = LLM(preset=preset, dtype=dtype, max_model_len=256)
        answers[preset, dtype] = {name: answer(llm, list(EXAMPLES[name].prompt_token_ids)) for name in NAMES}
    tokenizer = llm.llm_engine.tokenizer
    assert tokenizer is not None
    return answers, lambda token_id: tokenizer.decode([token_id])


def answer(llm: LLM, prompt_token_ids: list[int]) -> Answer:
    """One request, alone and greedy. The model's `compute_logits` is wrapped while it runs."""
    model: Any = llm.llm_engine.engine_core.executor.worker.model_runner.model  # type: ignore[attr-defined]
    compute_logits, seen = model.compute_logits, []
    head = model.model.embed_tokens.weight.detach().double()  # [vocab_size, hidden_size]: the model ties its weights

    def recording(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute_logits(hidden)  # [1, vocab_size]
        seen.append((logits[0].clone(), head @ hidden[0].double()))
        return logits

    model.compute_logits = recording
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": prompt_token_ids}], params, use_tqdm=False)[0].outputs[0]
    model.compute_logits = compute_logits
    logits, before_rounding = (torch.stack(rows) for rows in zip(*seen, strict=True))  # each [num_tokens, vocab_size]
    return Answer(output.token_ids, logits, before_rounding)


def describe(
    name: str, answers: dict[Arm, Answer], decode: Callable[[int], str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first difference of one request: its facts, and a row of the table for each arm."""
    index = first_difference(answers[TEXTBOOK].token_ids, answers[KERNELS].token_ids)
    before = answers[TEXTBOOK].token_ids[:index]
    same = [arm for arm in ARMS if answers[arm].token_ids[:index] == before]
    assert same == list(ARMS), f"request {name}: only {same} have seen the same tokens before the difference"
    assert answers[FP32].token_ids == answers[ARMS[1]].token_ids, f"request {name}: m1 and m4 differ in fp32"
    two = [answers[FP32].token_ids[index], *(answers[arm].token_ids[index] for arm in (TEXTBOOK, KERNELS))]
    candidates = list(dict.fromkeys(two))
    assert len(candidates) == 2, f"request {name}: fp32 chooses a third token"
    facts = {
        "request": name,
        "text": EXAMPLES[name].text,
        "prompt_token_ids": list(EXAMPLES[name].prompt_token_ids),
        "same_token_ids": before,
        "same_text": "".join(decode(token_id) for token_id in before),
        "index": index,
        "candidates": candidates,
        "bf16_step": bf16_step(float(answers[FP32].logits[index, candidates[0]])),
        "texts": {f"{preset} {dtype}": decoded(answers[preset, dtype], decode) for preset, dtype in ARMS},
    }
    return facts, [row(name, arm, answers[arm], index, candidates, decode) for arm in ARMS]


def first_difference(left: list[int], right: list[int]) -> int:
    """The index of the first token that differs. E.g. [5, 6, 7] and [5, 8, 7] -> 1."""
    differing = [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    assert differing, "the answers are equal: choose another request"
    return differing[0]


def bf16_step(value: float) -> float:
    """The distance between two neighbouring bf16 numbers near `value`. E.g. 37.7 -> 0.25."""
    return 2.0 ** (math.floor(math.log2(abs(value))) - 7)  # 8 bits of mantissa, of which the first is not stored


def decoded(answer: Answer, decode: Callable[[int], str]) -> str:
    return "".join(decode(token_id) for token_id in answer.token_ids)


def row(
    name: str, arm: Arm, answer: Answer, index: int, candidates: list[int], decode: Callable[[int], str]
) -> dict[str, Any]:
    """One row of the table, e.g. of request "a" and engine "m1 bf16". The columns are named after the two tokens."""
    before = [float(answer.before_rounding[index, token_id]) for token_id in candidates]
    logits = [float(answer.logits[index, token_id]) for token_id in candidates]
    words = [repr(decode(token_id)) for token_id in candidates]
    return {
        "request": name,
        "engine": f"{arm[0]} {'fp32' if arm[1] == 'float32' else 'bf16'}",
        **{f"exact {word}": round(value, 4) for word, value in zip(words, before, strict=True)},
        **{f"logit {word}": round(value, 4) for word, value in zip(words, logits, strict=True)},
        "gap": round(logits[0] - logits[1], 4),
        "chooses": repr(decode(answer.token_ids[index])),
    }


if __name__ == "__main__":
    sys.exit(main())
