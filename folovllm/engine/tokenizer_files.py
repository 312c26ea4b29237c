"""The files beside tokenizer.json: special tokens, added tokens with their flags, chat templates.

Milestone: M1. vLLM counterpart: vllm/transformers_utils/tokenizer.py, which leaves all of this to transformers. The
rules here are those of transformers 5 (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`); its
`add_bos_token` and `add_eos_token` are left out because transformers ignores them too where there is a tokenizer.json.

    tokenizer_config.json      bos_token, eos_token, ...; added_tokens_decoder: {id: token with flags}
    special_tokens_map.json    the same names; read only if there is no added_tokens_decoder
    added_tokens.json          {token: id}; likewise
    config.json                model_type, which decides whether a `tokenizer_class` counts
    chat_template.jinja, additional_chat_templates/NAME.jinja, chat_template.json
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

logger = logging.getLogger(__name__)

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class SpecialTokens:
    """What the files say about special and added tokens, with all flags."""

    named: dict[str, AddedToken] = field(default_factory=dict)  # templates and the engine ask for these by name
    extra: list[AddedToken] = field(default_factory=list)  # special, but without a name
    by_id: dict[int, AddedToken] = field(default_factory=dict)  # declared with an id, special or not

    @property
    def texts(self) -> dict[str, str]:
        """E.g. {"eos_token": "<|im_end|>"}."""
        return {name: token.content for name, token in self.named.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    return value if isinstance(value, dict) else {}


def read_special_tokens(folder: Path | None, config: dict[str, Any]) -> SpecialTokens:
    """Reads the files beside tokenizer.json. `folder` None means that there is only the config."""
    if folder is None or "added_tokens_decoder" in config:
        by_id = {int(i): _token(value) for i, value in (config.get("added_tokens_decoder") or {}).items()}
        return SpecialTokens(_named(config), _extra(config), by_id)
    more = read_json(folder / "special_tokens_map.json")  # this file and the next are those of older models
    more = {key: value for key, value in more.items() if not _is_own_name(key, config.get(key))}
    tokens = SpecialTokens(_named({**config, **more}), _extra({**config, **more}))
    more.pop("additional_special_tokens", None)  # transformers reads these too late to make an added token special
    special = {*tokens.texts.values(), *(token.content for token in _extra({**config, **more}))}
    for content, token_id in read_json(folder / "added_tokens.json").items():
        is_special = content in special
        tokens.by_id[token_id] = AddedToken(content, special=is_special, normalized=not is_special)
    return tokens


def _named(config: dict[str, Any]) -> dict[str, AddedToken]:
    """bos_token and the like, and a model's own names, e.g. "image_token" or a dict as `extra_special_tokens`."""
    values = {name: config[name] for name in NAMES if config.get(name) is not None}
    values |= {key: v for key, v in config.items() if key.endswith("_token") and _is_token(v)}
    for key in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(config.get(key), dict):
            values |= config[key]
    return {name: _token(value) for name, value in values.items() if _is_token(value)}


def _is_own_name(key: str, value: Any) -> bool:
    """A name that only this model has: the config's value holds, whatever special_tokens_map.json says."""
    return key.endswith("_token") and key not in NAMES and isinstance(value, str)


def _extra(config: dict[str, Any]) -> list[AddedToken]:
    values = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return [_token(value) for value in values if _is_token(value)] if isinstance(values, list) else []


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _token(value: Any) -> AddedToken:
    """A token as files write it, either its text or {"content": text, "rstrip": true, ...}."""
    if not _is_token(value):
        raise ValueError(f"tokenizer_config.json: an added token must have a 'content', got {value!r}")
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    return AddedToken(value["content"], **{flag: value[flag] for flag in FLAGS if flag in value})


def add_tokens(backend: tokenizers.Tokenizer, tokens: SpecialTokens, declared: bool) -> None:
    """Make the backend's added tokens those of the files, flags included.

    `declared`: tokenizer_config.json has an `added_tokens_decoder`, whose flags replace those of tokenizer.json;
    without one the flags of tokenizer.json hold. A token that is new to the vocabulary gets the next free id.
    """
    present = backend.get_added_tokens_decoder()
    wanted = tokens.by_id if declared else {**tokens.by_id, **present}
    listed = [token for _, token in sorted(wanted.items())]
    names = {token.content for token in (*present.values(), *listed)}
    unlisted = {repr(token): token for token in (*tokens.named.values(), *tokens.extra) if token.content not in names}
    special = set(tokens.texts.values())
    for token in (*listed, *unlisted.values()):
        token.special = token.special or token.content in special
    backend.add_tokens([token for token in (*listed, *unlisted.values()) if token.content])
    for token_id, token in wanted.items():
        if (given := backend.token_to_id(token.content)) != token_id:
            logger.warning("token %r has id %s, not the %d that the files name", token.content, given, token_id)


def follow_llama_class(backend: tokenizers.Tokenizer, config: dict[str, Any], folder: Path) -> None:
    """Replaces the pipeline of older sentencepiece files (Llama 2, TinyLlama) as transformers 5 does.

    Those files put a space before the text after *every* special token. The class `LlamaTokenizer` of transformers 5
    does so only at the start of the text, unless the config says `legacy`. Other classes and model types keep what
    the file says, and so do byte-level files, which only bear the name of the class.

    E.g. "</s>hi" -> "</s>", "hi" instead of "</s>", " hi".
    """
    named = str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    model_type = read_json(folder / "config.json").get("model_type") or "llama"
    byte_level = "ByteLevel" in f"{backend.pre_tokenizer!r}{backend.decoder!r}"
    if not named or model_type != "llama" or byte_level or not isinstance(backend.model, models.BPE):
        return
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)


def find_chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> jinja text. The files of transformers 5 come first, then tokenizer_config.json, then a processor's file.

    A single template is named "default". A list or a dict of templates has names of its own, such as "tool_use".
    """
    file = folder / "chat_template.jinja"
    more = {path.stem: _read_text(path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if file.is_file():
        return {"default": _read_text(file), **more}
    given = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    return {**_templates(given), **more}


def _templates(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):  # [{"name": "tool_use", "template": "..."}, ...]
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    value = value or {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for item in value.items() for text in item):
        raise ValueError("tokenizer_config.json: chat_template must be a text, or a list of named templates")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): download it again") from None
