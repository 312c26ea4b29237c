"""Calibration and evaluation text, and perplexity against HuggingFace (milestone M7)."""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from folovllm.quantize.perplexity import engine_scorer, measure_perplexity, score_windows, target_logprobs
from folovllm.quantize.text import builtin_text, calibration_windows, read_text, text_digest
from scripts import eval_ppl
from scripts.eval_ppl import main as eval_main
from tests.m7.quant_helpers import make_quantizable, quantize, random_windows

pytestmark = pytest.mark.m7


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quantizable("Llama", tmp_path_factory.mktemp("plain") / "model")


# --- Text -------------------------------------------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def test_nothing_that_calibrates_is_evaluated() -> None:
    halves = [paragraphs(builtin_text(split)) for split in ("calibration", "evaluation")]
    assert not set(halves[0]) & set(halves[1])
    assert all(len(half) == len(set(half)) for half in halves)
    assert all(sum(map(len, half)) > 100_000 for half in halves)


def test_the_halves_together_are_the_whole() -> None:
    from pydoc_data.topics import topics

    everything = {part for text in topics.values() for part in paragraphs(text)}
    assert set(paragraphs(builtin_text("calibration"))) | set(paragraphs(builtin_text("evaluation"))) == everything


def test_text_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Größe", encoding="utf-8")
    assert read_text(str(path), "evaluation") == "Größe"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot read the text .*give a UTF-8 file, or 'builtin'"):
        read_text(str(path), "evaluation")
    with pytest.raises(ValueError, match="split must be one of calibration, evaluation; got 'test'"):
        builtin_text("test")
    assert text_digest("a") != text_digest("b")


def test_datasets_is_asked_only_for_a_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        @staticmethod
        def load_dataset(path: str, config: str | None, split: str) -> dict[str, list[str]]:
            if path == "missing":
                raise RuntimeError("no such dataset")
            return {"text": [path, str(config)], "page": [split]}

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert read_text("hf:wikitext", "evaluation") == "wikitext\n\nNone"
    assert read_text("hf:wikitext:raw:test:page", "evaluation") == "test"
    with pytest.raises(ValueError, match=r"cannot get the dataset 'missing' \(RuntimeError: no such dataset\)"):
        read_text("hf:missing", "evaluation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the datasets package: pip install datasets"):
        read_text("hf:wikitext", "evaluation")


def test_windows_are_spread_and_do_not_overlap() -> None:
    windows = calibration_windows(list(range(1000)), 4, 100)
    assert [window[0] for window in windows] == [0, 200, 500, 700]
    assert all(window == list(range(window[0], window[0] + 100)) for window in windows)
    assert len(calibration_windows(list(range(1000)), 64, 100)) == 10
    with pytest.raises(ValueError, match="has 1000 tokens, fewer than one sequence of 2000"):
        calibration_windows(list(range(1000)), 1, 2000)


# --- Perplexity -------------------------------------------------------------------------------------------------------


def test_windows_as_drawn() -> None:
    assert score_windows(8, 4, 2) == [(0, 4, 1), (2, 6, 4), (4, 8, 6)]


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 10, 31])
@pytest.mark.parametrize("window,stride", [(4, 2), (5, 1), (8, 7), (64, 32)])
def test_every_token_is_scored_once(num_tokens: int, window: int, stride: int) -> None:
    windows = score_windows(num_tokens, window, stride)
    scored = [i for _, end, first in windows for i in range(first, end)]
    assert scored == list(range(1, num_tokens))
    assert all(start < first and end - start <= window for start, end, first in windows)
    assert all(start == 0 or first - start >= window - stride for start, _, first in windows)  # context it was promised


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_a_stride_that_leaves_no_context_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride must be at least 1 and less than the window of 8"):
        score_windows(20, 8, stride)


def test_perplexity_of_guessing() -> None:
    """One of ten with equal probability: perplexity 10."""

    def score(token_ids: Sequence[int], first: int) -> torch.Tensor:
        return torch.full((len(token_ids) - first,), -math.log(10))

    result = measure_perplexity(score, list(range(50)), 16, 8)
    assert result.perplexity == pytest.approx(10) and (result.num_tokens, result.window, result.stride) == (49, 16, 8)
    with pytest.raises(ValueError, match="fewer than two tokens"):
        measure_perplexity(score, [1], 16, 8)


def test_target_logprobs() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 10, 3, 3, 7])
    expected = logits.log_softmax(-1)[torch.arange(5), targets]
    torch.testing.assert_close(target_logprobs(logits, targets), expected)


def test_perplexity_equals_huggingface(plain: Path, tmp_path: Path) -> None:
    """The script, both engines, on a plain and on a GPTQ checkpoint (HuggingFace runs its twin)."""
    folder = quantize(plain, tmp_path / "gptq")
    text, result = tmp_path / "text.txt", tmp_path / "ppl.json"
    text.write_text("The quick brown fox jumps over the lazy dog; then it rests. " * 4)
    eval_main([str(plain), str(folder), "--engines", "folovllm,hf", "--text", str(text), "--window", "64", "--stride",
               "32", "--threads", "1", "--json", str(result)])  # fmt: skip
    report = json.loads(result.read_text())
    ours, hf, ours_gptq, hf_gptq = (row["perplexity"] for row in report["rows"])
    assert ours == pytest.approx(hf, rel=1e-4) and ours_gptq == pytest.approx(hf_gptq, rel=1e-4)
    assert abs(ours - ours_gptq) > 1e-3 * ours
    assert report["text"]["sha256"] == text_digest(text.read_text())
    table = report["results"]
    assert [row["rise"] for row in table[:2]] == ["-", "-"] and table[2]["rise"] == f"{ours_gptq - ours:+.3f}"
    assert [(row["method"], row["bits"], row["groups"]) for row in table[1:3]] == [
        ("-", "-", "-"),
        ("GPTQ", "4", "32 sym"),
    ]
    assert str(tmp_path) not in result.read_text()


def test_known_perplexities_are_kept(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --resume the same question is not asked again; another window, text or checkpoint is another question."""
    folder, text, result = quantize(plain, tmp_path / "gptq"), tmp_path / "text.txt", tmp_path / "ppl.json"
    text.write_text("The quick brown fox jumps over the lazy dog; then it rests. " * 4)
    arguments = ["--text", str(text), "--window", "64", "--stride", "32", "--threads", "1", "--json", str(result)]
    eval_main([str(plain), str(folder), *arguments])
    first, asked = json.loads(result.read_text())["rows"], []
    real = eval_ppl.evaluate
    monkeypatch.setattr(eval_ppl, "evaluate", lambda row, *rest: asked.append(row["model"]) or real(row, *rest))
    eval_main([str(plain), str(folder), *arguments, "--resume"])
    assert asked == [] and json.loads(result.read_text())["rows"] == first
    shutil.rmtree(folder)
    quantize(plain, folder, random_windows(seed=1))
    eval_main([str(folder), str(plain), *arguments, "--resume"])
    assert asked == [folder.name]
    assert json.loads(result.read_text())["rows"][1] == first[0]
    text.write_text("Another text of some length that is about nothing at all. " * 4)
    eval_main([str(plain), *arguments, "--resume", "--max-tokens", "80"])
    assert asked == [folder.name, plain.name]


def test_who_made_a_checkpoint(plain: Path, tmp_path: Path) -> None:
    folder = quantize(plain, tmp_path / "gptq")
    assert eval_ppl.method_of(folder) == "GPTQ"
    (folder / "quantize_log.json").unlink()
    assert eval_ppl.method_of(folder) == "folovllm"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["meta"]["quantizer"] = ["gptqmodel:7.6.0"]
    (folder / "config.json").write_text(json.dumps(config))
    assert eval_ppl.method_of(folder) == "gptqmodel"


def test_packed_and_dequantised_score_alike(plain: Path, tmp_path: Path) -> None:
    folder = quantize(plain, tmp_path / "gptq", desc_act=True)
    ids = random_windows(1, 70, seed=8)[0]
    scores = [engine_scorer(folder, quantization=q)(ids, 1) for q in ("auto", "dequantize")]
    assert scores[0].shape == (69,) and torch.equal(scores[0], scores[1])
