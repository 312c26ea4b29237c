"""The default model's folder, as `pull` makes it: configuration, tokenizer, weights, a sensible answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from folovllm.hub import ALIASES, find_model, pull, verify_pulled

pytestmark = [pytest.mark.m0, pytest.mark.weights]


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull("smollm2-135m", progress=False)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_folder_holds_what_the_manifest_says(folder: Path) -> None:
    assert find_model("smollm2-135m") == folder
    manifest = verify_pulled(folder)
    assert manifest["source"]["sha256"] == ALIASES["smollm2-135m"].wheel_sha256
    assert {p.name for p in folder.iterdir()} == {*manifest["sha256"], "folovllm_model.json"}


def test_the_config_is_smollm2(folder: Path) -> None:
    from transformers import AutoConfig

    config = read(folder, "config.json")
    assert {k: config[k] for k in ALIASES["smollm2-135m"].config_facts} == dict(ALIASES["smollm2-135m"].config_facts)
    assert config["dtype"] == "bfloat16" and config["rms_norm_eps"] == 1e-5
    assert str(folder.parent) not in json.dumps(config)
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 100000.0
    assert read(folder, "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_the_weights_are_float32_and_complete(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        kinds = {file.get_slice(name).get_dtype() for name in shapes}
    assert kinds == {"F32"} and len(shapes) == 2 + 9 * 30 and "lm_head.weight" not in shapes
    assert shapes["model.embed_tokens.weight"] == [49152, 576]
    assert shapes["model.layers.29.self_attn.k_proj.weight"] == [192, 576]


TEXTS = [
    "In 2024 there were 1234567 items, 7.",
    "  two  spaces\n\ttab and a trailing one ",
    "héllo 世界 🙂 ñ \u200b \x00",
    "<|im_start|>user\nHi<|im_end|>\n<empty_output>",
    "def f(x):\n    return x**2\n\n1. one\n  22",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == ids


def test_digits_are_cut_out_first_and_no_bos_is_added(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("x\n\n1. 42").tokens == ["x", "ĊĊ", "1", ".", "Ġ", "4", "2"]
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>").ids == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 49152


def test_a_chat_prompt_gets_a_sensible_answer(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out) and out[-1] == tokenizer.eos_token_id
