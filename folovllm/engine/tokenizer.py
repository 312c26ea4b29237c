"""Tokenizer: text <-> token ids, and chat messages -> prompt text, without importing transformers.

Milestone: M1. vLLM counterpart: vllm/transformers_utils/tokenizer.py and vllm/entrypoints/chat_utils.py.
Left out: slow (sentencepiece, tiktoken) tokenizers, multimodal content, `clean_up_tokenization_spaces`.

transformers takes seconds to import, `tokenizers` and jinja2 hundredths of a second: everything a first token needs
runs on those two. transformers is imported only for the rare chat features listed in `_render_with_transformers`.
"""

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

_NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TRANSFORMERS_ONLY = ("continue_final_message", "return_assistant_tokens_mask")


class Tokenizer:
    """A HuggingFace `tokenizer.json` with its config: encodes, decodes, renders chats."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        chat_template: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.folder = folder
        backend.no_truncation()  # some tokenizer.json files carry their training pipeline's limits
        backend.no_padding()
        self.special_tokens = _named_special_tokens(config or {})  # e.g. {"eos_token": "<|im_end|>"}
        self._mark_special(list(self.special_tokens.values()))
        added = backend.get_added_tokens_decoder()
        self.all_special_ids = frozenset(i for i, token in added.items() if token.special)  # what decode() can skip
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Load from a HuggingFace model folder; ValueError if it has no readable tokenizer.json."""
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"no tokenizer.json in {folder}: copy it from the model's repository, or make it with transformers:"
                f" AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"{file} is not a tokenizer ({error}): download it again") from None
        config = _read_json(folder / "tokenizer_config.json")
        return cls(backend, config, _find_chat_template(folder, config), folder)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's vocabulary may be padded beyond it."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_id(self) -> int | None:
        """Id of tokenizer_config.json's `eos_token`; None if there is none."""
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self.backend.token_to_id(eos)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:  # half of a surrogate pair, as JSON may hold: no character, so no bytes
            raise ValueError(f"the text is not valid Unicode, it has a lone surrogate: {text[:80]!r}") from None

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary become nothing."""
        return str(self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands in the middle of a text: its leading space is kept."""
        if token_id not in self._token_texts:
            # Llama-like decoders strip the first space of what they decode, so ask for "<a><a>" minus "<a>".
            once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
            joined = len(twice) >= 2 * len(once) and twice.startswith(once)
            self._token_texts[token_id] = twice[len(once) :] if joined else once
        return self._token_texts[token_id]

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Render chat messages as the prompt text the model was trained on. Encode it without special tokens.

        `kwargs` reach the template (`tools`, `enable_thinking`, ...). Raises ValueError for malformed messages, for a
        model without a template, and for messages that the template refuses.
        """
        plain = _check_messages(messages)
        template = chat_template or self.chat_template
        if template is None:
            raise ValueError(
                "this model has no chat template: use generate() with a plain prompt, or pass chat_template="
            )
        if not isinstance(kwargs.get("tools") or [], (list, tuple)):
            raise ValueError(f"tools must be a list of functions or of JSON schemas, got {kwargs['tools']!r}")
        if any(kwargs.get(key) for key in _TRANSFORMERS_ONLY) or any(map(callable, kwargs.get("tools") or ())):
            return self._render_with_transformers(plain, add_generation_prompt, template, kwargs)
        variables = {**self.special_tokens, "tools": None, "documents": None, **kwargs}
        return _render(template, messages=plain, add_generation_prompt=add_generation_prompt, **variables)

    def _render_with_transformers(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, template: str, kwargs: dict[str, Any]
    ) -> str:
        """Python functions as tools, and continuing the last message: transformers' own code, seconds to import."""
        assert self.folder is not None, "transformers can load a tokenizer only from a folder"
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self.folder))
        kwargs = {"add_generation_prompt": add_generation_prompt, "chat_template": template, **kwargs}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))

    def _mark_special(self, names: list[str]) -> None:
        """tokenizer_config.json may name special tokens that tokenizer.json holds as ordinary ones."""
        known = [name for name in names if self.backend.token_to_id(name) is not None]  # never grow the vocabulary
        self.backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in known])


def _named_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token and the like; each is a string or, in older files, {"content": string, ...}."""
    values = {name: config.get(name) for name in _NAMED_SPECIALS}
    texts = {name: v.get("content") if isinstance(v, dict) else v for name, v in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _find_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja (transformers 5), else tokenizer_config.json's, which may be a list of named templates."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    return value if isinstance(value, dict) else {}


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain data (a template is code from the internet: it gets no live objects), or ValueError."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(
            "messages must be a non-empty list like [{'role': 'user', 'content': 'Hello'}], "
            f"got {'an empty list' if messages in ([], ()) else type(messages).__name__}"
        )
    checked = [_check_message(index, message) for index, message in enumerate(messages)]
    try:
        return list(json.loads(json.dumps(checked)))
    except TypeError as error:
        raise ValueError(f"messages may hold only strings, numbers, lists and dicts: {error}") from None


def _check_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be a dict with 'role' and 'content', got {type(message).__name__}: {message!r}")
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{where} needs a 'role' that is a string, such as 'user', got {message.get('role')!r}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):  # an assistant may call tools and say nothing
        return message
    if isinstance(content, list):
        return {**message, "content": "\n".join(_text_part(where, part) for part in content)}
    if not isinstance(content, str):
        raise ValueError(f"{where} needs a 'content' that is a string, got {content!r}")
    return message


def _text_part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"{where}: content parts must be {{'type': 'text', 'text': '...'}}, got {part!r}")


def _render(template: str, **variables: Any) -> str:
    try:
        return str(_compile(template).render(**variables))
    except Exception as error:  # a template is somebody's program: it may fail in any way
        raise ValueError(f"the chat template refuses these messages: {error}") from None


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """A sandboxed jinja2 template with the additions HuggingFace's templates count on."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; it renders as its body."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)
