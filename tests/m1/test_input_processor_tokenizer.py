"""Tokenizer: the folder's files, the text of single tokens, chat templates rendered as transformers renders them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from folovllm.engine.tokenizer import Tokenizer
from tests.m1.tiny_tokenizers import EOS, byte_fallback, byte_level

pytestmark = pytest.mark.m1

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_config(folder: Path, **config: Any) -> Tokenizer:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


# --- files -----------------------------------------------------------------------------------------------------


def test_round_trip(folder: Path) -> None:
    tokenizer = write_config(folder, eos_token=EOS)
    ids = tokenizer.encode("the dog 😀" + EOS)
    assert tokenizer.decode(ids) == "the dog 😀"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the dog 😀" + EOS
    assert tokenizer.vocab_size == 420
    assert tokenizer.eos_token_id == 0
    assert tokenizer.all_special_ids == {0, 1, 2}


def test_special_tokens_of_the_config(folder: Path) -> None:
    """Older files wrap the string. A token that tokenizer.json holds as ordinary becomes special, and one that it does
    not hold gets the next id, as in transformers.
    """
    tokenizer = write_config(folder, eos_token={"content": "z"}, bos_token="<not there>")
    token_id = byte_level().encode("z")[0]
    assert tokenizer.eos_token_id == token_id
    assert tokenizer.all_special_ids == {0, 1, 2, token_id, 420}
    assert tokenizer.decode([token_id, 420]) == ""
    assert tokenizer.vocab_size == 421


def test_without_a_config_there_is_no_eos(folder: Path) -> None:
    assert Tokenizer.from_folder(folder).eos_token_id is None


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level().backend
    config = json.loads(backend.to_str())
    config["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    assert len(Tokenizer.from_folder(tmp_path).encode("zzzz")) == 4


def test_byte_fallback_encodes_with_bos() -> None:
    assert byte_fallback().decode(byte_fallback().encode("the é")) == "the é"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.json", "{}", "no tokenizer.json in .*save_pretrained"),
        ("tokenizer.json", "{not json", "tokenizer.json is not a tokenizer .*download it again"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
    ],
)
def test_bad_folders(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_bad_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        Tokenizer.from_folder(folder)


def test_text_of_single_tokens() -> None:
    tokenizer = byte_fallback()
    ids = {piece: tokenizer.backend.token_to_id(piece) for piece in ("▁the", "the", "你", "<0xE4>", "<s>", "▁")}
    texts = {piece: tokenizer.token_text(token_id) for piece, token_id in ids.items()}
    expected = {"▁the": " the", "the": "the", "你": "你", "<0xE4>": "\ufffd", "<s>": "<s>", "▁": " "}
    assert texts == expected
    assert tokenizer.token_text(10**6) == ""
    assert byte_level().token_text(byte_level().encode(" the")[0]).startswith(" ")


# --- chat ------------------------------------------------------------------------------------------------------


def test_chat_template_from_either_file(folder: Path) -> None:
    tokenizer = write_config(folder, eos_token=EOS, chat_template=CHATML)
    assert tokenizer.apply_chat_template(USER) == f"<|user|>Hi{EOS}<|assistant|>"
    assert tokenizer.apply_chat_template(USER, add_generation_prompt=False) == f"<|user|>Hi{EOS}"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    assert write_config(folder, eos_token=EOS, chat_template=named).chat_template == CHATML
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(folder).apply_chat_template(USER) == "file"
    assert tokenizer.apply_chat_template(USER, chat_template="{{ x }}", x=5) == "5"


def test_text_parts_are_joined() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert byte_level().apply_chat_template(parts, chat_template=CHATML) == f"<|user|>a\nb{EOS}<|assistant|>"


BAD_MESSAGES: list[tuple[Any, str]] = [
    ([], "non-empty list like .*got an empty list"),
    ("Hi", "non-empty list like .*got str"),
    ({"role": "user", "content": "Hi"}, "got dict"),
    (["Hi"], r"messages\[0\] must be a dict with 'role' and 'content', got str"),
    ([USER], r"messages\[0\] must be a dict .*got list"),
    ([*USER, {"content": "x"}], r"messages\[1\] needs a 'role'"),
    ([{"role": 5, "content": "x"}], "needs a 'role' that is a string.*got 5"),
    ([{"role": "user"}], "needs a 'content' that is a string, got None"),
    ([{"role": "user", "content": 5}], "needs a 'content' that is a string, got 5"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "content parts must be"),
    ([{"role": "user", "content": "x", "extra": object()}], "may hold only strings"),
]


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_bad_messages(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        byte_level().apply_chat_template(messages, chat_template=CHATML)


def test_a_model_without_a_template() -> None:
    with pytest.raises(ValueError, match=r"no chat template: use generate\(\).*pass chat_template="):
        byte_level().apply_chat_template(USER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% if %}", "refuses these messages"),
        ("{{ messages[0]['content'] + 5 }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "refuses these messages.*"),  # the sandbox: a template changes nothing
        ("{{ ''.__class__.__mro__ }}", "refuses these messages.*unsafe"),
    ],
)
def test_a_template_that_fails(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        byte_level().apply_chat_template(USER, chat_template=template)


TEMPLATES = {
    "chatml": CHATML,
    "blocks": "{%- for m in messages %}\n  {%- if loop.first %}\n[{% endif %}\n{{ m.content | trim }}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "undefined": "{% if tools is none and documents is none and x is not defined %}yes{% endif %}{{ bos_token }}",
    "date": "{{ strftime_now('%Y') }}",
    "inner scope": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
}
CHAT = [{"role": "system", "content": " Be <brief> & 好 "}, *USER, {"role": "assistant", "content": "Yes\n"}]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_templates_render_as_in_transformers(name: str, add_generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = byte_level().apply_chat_template(CHAT, add_generation_prompt, chat_template=TEMPLATES[name])
    options = {"add_generation_prompt": add_generation_prompt, "eos_token": EOS}
    theirs, _ = render_jinja_template([CHAT], chat_template=TEMPLATES[name], **options)
    assert ours == theirs[0]


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Where.
    """
    return city


def test_rare_features_go_to_transformers(folder: Path) -> None:
    tokenizer = write_config(folder, eos_token=EOS, tokenizer_class="PreTrainedTokenizerFast")
    open_ended = [*USER, {"role": "assistant", "content": "I am"}]
    options: dict[str, Any] = {"chat_template": CHATML, "add_generation_prompt": False}
    text = tokenizer.apply_chat_template(open_ended, continue_final_message=True, **options)
    assert text == f"<|user|>Hi{EOS}<|assistant|>I am"
    text = tokenizer.apply_chat_template(USER, tools=[weather], chat_template="{{ tools[0].function.name }}")
    assert text == "weather"


def test_transformers_is_not_imported_for_the_usual_chat(folder: Path) -> None:
    """It would cost seconds before the first token."""
    write_config(folder, eos_token=EOS, chat_template=CHATML)
    code = (
        "import sys; from folovllm.engine.tokenizer import Tokenizer;"
        f"t = Tokenizer.from_folder({str(folder)!r}); t.decode(t.encode(t.apply_chat_template({USER!r})));"
        "print([m for m in ('transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.weights
def test_the_default_models_tokenizer_equals_transformers(model_dir: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_folder(model_dir), AutoTokenizer.from_pretrained(model_dir)
    for text in ("Hello world", "  12345 你好 😀\n\n", "<|im_start|>user\nhi<|im_end|>"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.all_special_ids >= set(theirs.all_special_ids)
    for chat in (USER, CHAT):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(chat) == expected
