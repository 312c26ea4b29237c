"""`folovllm demo` and the HuggingFace baseline under it, on tiny models."""

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands import demo, demo_board, hf_baseline
from folovllm.entrypoints.commands.demo import PROMPTS
from folovllm.entrypoints.commands.demo_results import Verdict, first_difference
from folovllm.entrypoints.commands.hf_baseline import hf_greedy, hf_top_two_gap, load_hf

pytestmark = pytest.mark.m1


@pytest.fixture(scope="module")
def folder(tiny_model_dir):
    return tiny_model_dir("llama")


def run(folder, *args):
    return CliRunner().invoke(app, ["demo", "-m", str(folder), "--max-tokens", "12", *args], env={"COLUMNS": "120"})


def test_the_demo_answers_all_prompts_and_finds_them_equal(folder):
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert f"equal to HuggingFace: {len(PROMPTS)} of {len(PROMPTS)} prompts" in result.stdout
    for prompt in PROMPTS:
        assert result.stdout.count(prompt) == 2  # its answer, and its line in the table
    assert "tok/s" in result.stdout and "HuggingFace, one by one" in result.stdout
    assert "\x1b[" not in result.stdout  # not a terminal: no colours, no redrawing


def test_the_kv_bytes_are_those_of_the_longest_moment(folder):
    from folovllm.entrypoints.commands.options import EngineOptions

    llm, _ = demo._load(EngineOptions(model=str(folder), preset="m1"))
    prompts = [demo._prompt(llm, text) for text in PROMPTS]
    board = demo_board.Board(PROMPTS, 384, Console(quiet=True))
    answers = demo.answer(llm, prompts, 12, board)
    # One request at a time. The last token of a request is never put into the cache, and after its last step a request
    # holds nothing: the peak is seen one step before.
    longest = max(len(p) + len(t) for p, t in zip(answers.prompt_token_ids, answers.token_ids, strict=True))
    assert longest - 2 <= answers.peak_used_slots <= longest - 1
    assert answers.peak_reserved_slots == llm.config.block_size == 512
    text = str(demo_board._kv_text(answers, llm.llm_engine.engine_core.kv_cache_config))
    assert f"at most {answers.peak_used_slots * 384:,} bytes used" in text
    assert f"of {5 * 512 * 384:,} bytes allocated" in text


def test_a_wrong_token_is_found_and_fails_the_demo(folder, monkeypatch):
    original = hf_baseline._greedy

    def other(model, prompt, count, eos):
        tokens = original(model, prompt, count, eos)
        return [*tokens[:2], (tokens[2] + 1) % 200, *tokens[3:]] if count > 2 else tokens

    monkeypatch.setattr(hf_baseline, "_greedy", other)
    result = run(folder)
    assert result.exit_code == 1
    assert f"equal to HuggingFace: 0 of {len(PROMPTS)} prompts" in result.stdout
    assert "first difference at token 2" in result.stdout


def test_a_difference_at_a_tie_does_not_fail_it(folder, monkeypatch):
    original = hf_baseline._greedy
    monkeypatch.setattr(hf_baseline, "_greedy", lambda *args: [*original(*args)[:-1], 7])
    monkeypatch.setattr(hf_baseline, "hf_top_two_gap", lambda *args, **kwargs: 5e-4)
    result = run(folder)
    assert result.exit_code == 0 and "at a tie, where either token is right" in result.stdout


def test_a_model_without_chat_template_gets_plain_prompts(folder, tmp_path):
    import shutil

    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    result = run(plain, "--max-model-len", "64")
    assert result.exit_code == 0, result.output


def test_the_terminal_board_draws_every_answer(folder, monkeypatch):
    consoles = []

    def terminal(**kwargs):
        consoles.append(Console(force_terminal=True, record=True, width=100, **kwargs))
        return consoles[-1]

    monkeypatch.setattr(demo_board, "Console", terminal)
    monkeypatch.setattr(demo_board, "REDRAW_SECONDS", 0.0)
    result = run(folder)
    assert result.exit_code == 0, result.output
    assert "\x1b[" in result.stdout and "waiting, K/V of" in result.stdout


@pytest.mark.parametrize(
    "mine, other, index",
    [
        ([], [], None),
        ([5], [5], None),
        ([5, 6, 7], [5, 9], 1),
        ([5, 6], [5, 6, 7], 2),
        ([5, 6, 7], [5, 6], 2),
        ([1], [2], 0),
    ],
)
def test_first_difference(mine, other, index):
    assert first_difference(mine, other) == index


def test_verdicts():
    assert str(Verdict()) == "yes" and not Verdict().is_wrong
    assert Verdict(3, 0.5).is_wrong and not Verdict(3, 9e-4).is_wrong
    assert str(Verdict(3, 0.25)) == "no (first difference at token 3, HF's top-two gap 0.25)"


def test_the_baseline_is_plain_argmax(folder):
    """Against a loop over forward passes, so that a generation config or a cache cannot slip in."""
    model, prompt, tokens = load_hf(folder), [5, 17, 90, 33], []
    for _ in range(10):
        logits = model(torch.tensor([prompt + tokens])).logits[0, -1]
        tokens.append(int(logits.argmax()))
    done = []
    result = hf_greedy(folder, [prompt, prompt], [10, 4], ignore_eos=True, on_done=done.append)
    assert result.token_ids == [tokens, tokens[:4]]
    assert done == [0, 1] and len(result.seconds) == 2 and min(result.seconds) > 0


def test_the_baseline_stops_at_our_eos_ids(folder, tmp_path):
    import json
    import shutil

    prompt = [5, 17, 90, 33]
    free = hf_greedy(folder, [prompt], [10], ignore_eos=True).token_ids[0]
    other = shutil.copytree(folder, tmp_path / "other_eos")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[3]], "repetition_penalty": 1.9}))
    stopped = hf_greedy(other, [prompt], [10]).token_ids[0]
    assert stopped == free[: free.index(free[3]) + 1]
    assert hf_greedy(other, [prompt], [10], ignore_eos=True).token_ids[0] == free


def test_the_top_two_gap(folder):
    logits = load_hf(folder)(torch.tensor([[5, 17, 90]])).logits[0, -1].tolist()
    best, second = sorted(logits, reverse=True)[:2]
    assert hf_top_two_gap(folder, [5, 17, 90]) == pytest.approx(best - second, abs=1e-5)
