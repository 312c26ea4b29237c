"""first_difference.json, which learn/04 shows: why bf16 answers of m1 and m4 part, held to arithmetic and to the model.

The README said until commit 59b34a9 that an optimisation never changes a token, which is true in fp32 only. The page
now shows the logits of the first token that differs in bf16.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.learn.three_requests import EXAMPLES
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

RESULT: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "milestones/m4/results/first_difference.json").read_text(encoding="utf-8")
)
DIFFERENCES = {difference["request"]: difference for difference in RESULT["differences"]}


def rows_of(request: str) -> dict[str, dict[str, Any]]:
    return {row["engine"]: row for row in RESULT["results"] if row["request"] == request}


def values(row: dict[str, Any], kind: str) -> list[float]:
    """The two numbers of the columns "exact ..." or "logit ...", the fp32 choice first."""
    return [value for name, value in row.items() if name.startswith(f"{kind} ")]


def test_the_distance_between_bf16_numbers() -> None:
    script = load_script("first_difference")
    for value in (37.7, 17.9, 1.0, 255.0):
        rounded = torch.tensor(value).bfloat16()
        following = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
        assert float(following) - float(rounded) == script.bf16_step(value)
    assert script.first_difference([5, 6, 7], [5, 8, 7]) == 1


@pytest.mark.parametrize("request_name", DIFFERENCES)
def test_rounding_to_bf16_explains_the_difference(request_name: str) -> None:
    rows, facts = rows_of(request_name), DIFFERENCES[request_name]
    assert list(rows) == ["m1 fp32", "m4 fp32", "m1 bf16", "m4 bf16"]
    assert rows["m1 fp32"]["chooses"] == rows["m4 fp32"]["chooses"] == rows["m1 bf16"]["chooses"]
    assert rows["m4 bf16"]["chooses"] != rows["m1 bf16"]["chooses"]
    for engine, row in rows.items():
        exact, logits = values(row, "exact"), values(row, "logit")
        assert exact[0] > exact[1], f"{engine}: before rounding, every engine prefers the token of fp32"
        rounded = torch.tensor(exact).bfloat16().tolist() if "bf16" in engine else exact
        assert logits == pytest.approx(rounded, abs=1e-3), engine
    assert values(rows["m4 bf16"], "logit")[0] == values(rows["m4 bf16"], "logit")[1], "a tie"
    assert facts["candidates"][1] < facts["candidates"][0], "which goes to the smaller token id"
    assert 0 < rows["m1 fp32"]["gap"] < facts["bf16_step"]
    assert facts["prompt_token_ids"] == list(EXAMPLES[request_name].prompt_token_ids)


@pytest.mark.weights
@pytest.mark.parametrize("request_name", DIFFERENCES)
def test_the_model_has_these_fp32_logits(model_dir: Path, request_name: str) -> None:
    from folovllm.worker.naive import NaiveModel

    facts = DIFFERENCES[request_name]
    logits = NaiveModel(model_dir, max_model_len=256).logits(facts["prompt_token_ids"] + facts["same_token_ids"])[0]
    assert logits.topk(2).indices.tolist() == facts["candidates"]
    found = logits[facts["candidates"]].tolist()
    assert found == pytest.approx(values(rows_of(request_name)["m1 fp32"], "logit"), abs=1e-3)
