"""AsyncTokenizer: encodes long texts in threads of their own, so that the event loop goes on meanwhile.

Milestone: M8. vLLM counterpart: `AsyncMicrobatchTokenizer` in vllm/utils/__init__.py, which batches texts.

The event loop carries every stream of the server. A text of a megabyte takes a second to encode, and in that second no
stream would move. A short text is encoded on the event loop: that is faster than waking up a thread. It works because
the tokenizer gives up the GIL while it encodes (see `Tokenizer.encode`). Row 3, without torch.
"""

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from folovllm.engine.tokenizer import Tokenizer

T = TypeVar("T")

LONG_TEXT = 4_000  # characters; a shorter text takes about a millisecond
NUM_THREADS = 2


class AsyncTokenizer:
    """`tokenizer` may be None: then every call raises ValueError."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._threads = concurrent.futures.ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="folovllm-text")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        return await self._run(is_long(text), self._get().encode, text, add_special_tokens)

    async def chat_prompt(self, messages: list[dict[str, Any]], *args: Any, **keywords: Any) -> dict[str, Any]:
        """The prompt for a conversation: see `Tokenizer.chat_prompt`."""
        render = functools.partial(self._get().chat_prompt, messages, *args, **keywords)
        return await self._run(len(str(messages)) > LONG_TEXT, render)

    def shutdown(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _get(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("this engine has no tokenizer: start it without skip_tokenizer_init")
        return self._tokenizer

    async def _run(self, in_thread: bool, function: Callable[..., T], *args: Any) -> T:
        if not in_thread:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)


def is_long(text: Any) -> bool:
    return isinstance(text, str) and len(text) > LONG_TEXT
