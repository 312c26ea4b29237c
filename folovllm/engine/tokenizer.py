"""Tokenizer: text <-> token ids, and chat messages -> prompt text, without importing transformers.

Milestone: M1. vLLM counterpart: vllm/transformers_utils/tokenizer.py. Left out: slow (sentencepiece, tiktoken)
tokenizers, `clean_up_tokenization_spaces`. The files beside tokenizer.json are read in tokenizer_files.py, chats are
rendered in the folder chat/.

transformers takes seconds to import, `tokenizers` and jinja2 hundredths of a second: everything that the first token
needs runs on those two.
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from folovllm.engine.chat.render import render_chat
from folovllm.engine.tokenizer_files import (
    add_tokens,
    find_chat_templates,
    follow_llama_class,
    read_json,
    read_special_tokens,
)


class Tokenizer:
    """A HuggingFace `tokenizer.json` with its config: encodes, decodes, renders chats."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any] | None = None,
        chat_templates: dict[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        config = config or {}
        self.backend = backend
        self.chat_templates = chat_templates or {}  # e.g. {"default": "{% for ...", "tool_use": "..."}
        backend.no_truncation()  # some tokenizer.json files carry their training pipeline's limits
        backend.no_padding()
        tokens = read_special_tokens(folder, config)
        add_tokens(backend, tokens, declared="added_tokens_decoder" in config)
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        self.special_tokens = tokens.texts  # e.g. {"eos_token": "<|im_end|>"}
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
        config = read_json(folder / "tokenizer_config.json")
        follow_llama_class(backend, config, folder)
        return cls(backend, config, find_chat_templates(folder, config), folder)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's vocabulary may be padded beyond it."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def chat_template(self) -> str | None:
        """The text of the default chat template, or None."""
        return self.chat_templates.get("default")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the `eos_token` that the tokenizer's files name, or None."""
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self.backend.token_to_id(eos)

    @cached_property
    def max_chars_per_token(self) -> int:
        """Characters of the longest token. A text of n tokens is n times as long at most."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            # Unlike `encode`, this one releases the GIL: other threads go on while a long text is encoded.
            (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return list(encoding.ids)
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
        allow_fixed_text: bool = True,
        tokenize: bool = False,
        **keywords: Any,
    ) -> str:
        """Render chat messages as the prompt text the model was trained on. Encode it without special tokens.

        `chat_template` is a name ("tool_use") or jinja text; `keywords` are the other fields of
        `folovllm.engine.chat.options.ChatOptions`, `chat_template_kwargs`, and variables that the template reads
        (`enable_thinking`). `allow_fixed_text=False` refuses a template that reads no message's content. Raises
        ValueError for malformed messages, for a model without a template, for messages that the template refuses and
        for a message that it drops; TypeError for a keyword that is neither an option nor read by the template.
        """
        if tokenize:  # the default of transformers; scripts that want text pass False
            raise ValueError("tokenize=True: pass the text to encode(text, add_special_tokens=False) instead")
        keywords |= {"add_generation_prompt": add_generation_prompt, "chat_template": chat_template}
        return render_chat(self.chat_templates, self.special_tokens, messages, keywords, allow_fixed_text)

    def chat_prompt(
        self,
        messages: list[dict[str, Any]],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        check_text: Callable[[str], None] | None = None,
        **keywords: Any,
    ) -> dict[str, Any]:
        """The prompt for a conversation, as text and token ids; the template brings its own special tokens.

        `keywords` and errors are those of `apply_chat_template`, and a template that reads no content is refused.
        `check_text` sees the text before it is encoded, and raises ValueError to refuse it.
        """
        text = self.apply_chat_template(messages, add_generation_prompt, chat_template, False, **keywords)
        if check_text is not None:
            check_text(text)
        return {"prompt": text, "prompt_token_ids": self.encode(text, add_special_tokens=False)}
