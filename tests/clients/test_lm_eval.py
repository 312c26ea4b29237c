"""lm-eval's `local-completions` against `folovllm serve`: each log-likelihood and the score are HuggingFace's.

Milestone: M8. lm-eval asks for them with `echo`, `logprobs` and one token more than it needs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, project
from tests.clients.server_process import ServerProcess

pytestmark = pytest.mark.m8

TASKS = Path(__file__).with_name("tasks")
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return [json.loads(line) for line in (TASKS / "everyday.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(questions: list[dict]) -> list[list[tuple[float, bool]]]:
    """HuggingFace's log-likelihood of every choice of every question, and whether it is greedy."""
    pairs = [(f"Question: {q['question']}\nAnswer:", f" {choice}") for q in questions for choice in q["choices"]]
    flat = iter(project("loglikelihoods", model=MODEL, pairs=pairs))
    return [[next(flat) for _choice in question["choices"]] for question in questions]


@pytest.mark.parametrize(
    ("batch_size", "how"), [(8, "num_concurrent=1"), (1, "num_concurrent=8,tokenized_requests=False")]
)
def test_the_score_and_every_loglikelihood_are_those_of_huggingface(
    server: ServerProcess,
    model_folder: Path,
    tmp_path: Path,
    questions: list,
    expected: list,
    batch_size: int,
    how: str,
) -> None:
    """Once with batches of token ids, and once with single texts that are sent at the same time."""
    evaluate(server, model_folder, tmp_path, batch_size, how)
    (results,) = [json.loads(path.read_text()) for path in tmp_path.rglob("results_*.json")]
    (lines,) = [path.read_text().splitlines() for path in tmp_path.rglob("samples_everyday_*.jsonl")]
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    assert len(samples) == len(questions)
    for sample, row in zip(samples, expected, strict=True):
        got = [(float(value), str(greedy) == "True") for ((value, greedy),) in sample["resps"]]
        for (ours, our_greedy), (theirs, their_greedy) in zip(got, row, strict=True):
            assert ours == pytest.approx(theirs, abs=TOLERANCE)
            assert our_greedy == their_greedy
    score = results["results"]["everyday"]
    assert score["acc,none"] == pytest.approx(accuracy(questions, expected, normalized=False))
    assert score["acc_norm,none"] == pytest.approx(accuracy(questions, expected, normalized=True))
    assert 0.25 < score["acc,none"] <= 1, "better than a guess: the questions reach the model"


def evaluate(server: ServerProcess, model_folder: Path, output: Path, batch_size: int, how: str) -> None:
    """Runs lm-eval's command line. It may read nothing from the internet."""
    arguments = f"model={MODEL},tokenizer={model_folder},base_url={server.url}/v1/completions,{how}"
    command = ["--model", "local-completions", "--model_args", f"{arguments},tokenizer_backend=huggingface"]
    command += ["--batch_size", str(batch_size)]
    command += ["--tasks", "everyday", "--include_path", str(TASKS), "--output_path", str(output), "--log_samples"]
    caches = {"HF_HOME": str(output / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", "lm_eval", *command],
        cwd=TASKS,
        env=os.environ | caches,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]


def accuracy(questions: list[dict], expected: list[list[tuple[float, bool]]], normalized: bool) -> float:
    """The share of questions whose right choice is the most likely one (per character, if `normalized`)."""
    right = 0
    for question, row in zip(questions, expected, strict=True):
        lengths = [len(choice) if normalized else 1 for choice in question["choices"]]
        scores = [total / length for (total, _), length in zip(row, lengths, strict=True)]
        right += scores.index(max(scores)) == question["answer"]
    return right / len(questions)
