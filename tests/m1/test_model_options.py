"""Engine arguments about the model and its tokenizer: without a tokenizer, without weights, under another name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from tests.tiny_models import EOS

pytestmark = pytest.mark.m1

LIMITS = {"dtype": "float32", "max_model_len": 64}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7]


@pytest.fixture
def folder(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")


def strip(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    return folder


def tokens(llm: LLM, prompt: Any = PROMPT, params: SamplingParams = GREEDY) -> list[int]:
    return llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids


# --- skip_tokenizer_init ----------------------------------------------------------------------------------------------


@pytest.fixture
def bare(folder: Path) -> Path:
    """A model's folder without any tokenizer file."""
    return strip(folder, "tokenizer*", "special_tokens*", "chat_template*")


def test_without_a_tokenizer_ids_go_in_and_out(bare: Path, tiny_model_dir: Callable[[str], Path]) -> None:
    llm = LLM(str(bare), skip_tokenizer_init=True, **LIMITS)
    with_text = LLM(str(tiny_model_dir("llama")), **LIMITS)
    assert tokens(llm) == tokens(with_text) == tokens(llm, {"prompt_token_ids": PROMPT})
    output = llm.generate([PROMPT], GREEDY.replace(logprobs=2), use_tqdm=False)[0]
    assert output.outputs[0].text == "" and output.prompt is None
    first = output.outputs[0].logprobs[0]
    assert len(first) >= 2 and all(entry.decoded_token is None for entry in first.values())
    assert [i for out in llm.stream(PROMPT, GREEDY) for i in out.outputs[0].token_ids] == tokens(with_text)


def test_the_configs_still_say_where_a_text_ends(bare: Path) -> None:
    """The tokenizer's EOS is unknown, so an id of the configs is a stop id and is reported as one, as in vLLM."""
    llm = LLM(str(bare), skip_tokenizer_init=True, **LIMITS)
    params = SamplingParams(temperature=0.0, max_tokens=6, logit_bias={EOS: 100.0})
    completion = llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
    assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == ([EOS], "stop", EOS)


def test_what_needs_a_tokenizer_says_so(bare: Path) -> None:
    llm = LLM(str(bare), skip_tokenizer_init=True, **LIMITS)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("no tokenizer: pass {'prompt_token_ids'", lambda: llm.generate("hello")),
        ("no tokenizer: pass {'prompt_token_ids'", lambda: llm.generate({"prompt": "hello"})),
        ("stop strings need a tokenizer", lambda: llm.generate([PROMPT], SamplingParams(stop=["x"]))),
        ("bad_words need a tokenizer", lambda: llm.generate([PROMPT], SamplingParams(bad_words=["x"]))),
        ("start it without skip_tokenizer_init=True", lambda: llm.chat([{"role": "user", "content": "hi"}])),
        ("start it without skip_tokenizer_init=True", llm.get_tokenizer),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert len(tokens(llm)) == 8


def test_a_folder_without_a_tokenizer_names_both_ways_out(bare: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer=, or work on token ids with skip_tokenizer_init=True"):
        LLM(str(bare), **LIMITS)


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_folder(bare: Path, tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir("llama"), other)
    strip(other, "config.json", "*.safetensors", "generation_config.json")
    llm = LLM(str(bare), tokenizer=str(other), **LIMITS)
    plain = LLM(str(tiny_model_dir("llama")), **LIMITS)
    assert tokens(llm, "the other thing") == tokens(plain, "the other thing")
    assert llm.get_tokenizer().eos_token_id == EOS
    with pytest.raises(ValueError, match=r"expected tokenizer\.json"):
        LLM(str(bare), tokenizer=str(bare), **LIMITS)
    with pytest.raises(ValueError, match="no model at"):
        LLM(str(bare), tokenizer=str(tmp_path / "nowhere"), **LIMITS)


# --- load_format, hf_overrides, served_model_name ---------------------------------------------------------------------


def test_dummy_weights_need_no_file(folder: Path) -> None:
    strip(folder, "*.safetensors")
    llm = LLM(str(folder), load_format="dummy", **LIMITS)
    first = tokens(llm, "the other thing")
    assert len(first) == 8
    assert tokens(LLM(str(folder), load_format="dummy", **LIMITS), "the other thing") == first, "the same seed"
    with pytest.raises(ValueError, match=r"at least one .safetensors file"):
        LLM(str(folder), **LIMITS)


def test_dummy_weights_need_config_json_alone(bare: Path) -> None:
    strip(bare, "*.safetensors", "generation_config.json")
    assert [path.name for path in bare.iterdir()] == ["config.json"]
    assert len(tokens(LLM(str(bare), load_format="dummy", skip_tokenizer_init=True, **LIMITS))) == 8


def test_dummy_weights_ignore_the_real_ones(folder: Path) -> None:
    assert tokens(LLM(str(folder), load_format="dummy", **LIMITS)) != tokens(LLM(str(folder), **LIMITS))
    assert tokens(LLM(str(folder), load_format="safetensors", **LIMITS)) == tokens(LLM(str(folder), **LIMITS))


def test_overrides_reach_the_model(folder: Path) -> None:
    changed = LLM(str(folder), hf_overrides={"rope_theta": 50.0, "max_position_embeddings": 48}, dtype="float32")
    assert changed.config.max_model_len == 48
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (folder / "config.json").write_text(json.dumps(config))
    assert tokens(changed) == tokens(LLM(str(folder), **LIMITS))


@pytest.mark.parametrize(
    "names,shown", [("mine", "mine"), (["first", "second"], "first"), (None, "the folder"), ([], "the folder")]
)
def test_the_name_that_is_shown(names: Any, shown: str, folder: Path) -> None:
    llm = LLM(str(folder), served_model_name=names, load_format="dummy", **LIMITS)
    assert llm.config.model_config.shown_name == (str(folder) if shown == "the folder" else shown)
