"""Which requests are sent, and when.

Milestone: M8. vLLM counterparts: `RandomDataset` and `ShareGPTDataset` in vllm/benchmarks/datasets.py, and
`get_request` in vllm/benchmarks/serve.py. No torch. Everything is drawn from a seed: the same command sends the same.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from folovllm.benchmarks.workloads import A_OUTPUT_LEN, A_PROMPT_LEN, LAST_RANDOM_ID, random_ids
from folovllm.engine.tokenizer import Tokenizer

Lengths = tuple[int, int]  # the shortest and the longest, both included


@dataclass(frozen=True)
class ServeRequest:
    """One request to a server. `prompt_len` counts the prompt's tokens where the client knows them."""

    prompt: str | list[int]
    prompt_len: int | None
    output_len: int


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """The second at which each of `count` requests is sent, `rate` per second on average; inf: all at once.

    The gaps between requests follow a gamma distribution with the shape `burstiness`. At 1 that is a Poisson process:
    users who know nothing of each other. Below 1 the requests come in bursts, above 1 evenly. The times are scaled so
    that the last request is sent at count / rate. Otherwise every seed would offer another load.
    """
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(f"arrivals {seed}")  # its own: another rate does not change the prompts
    times = list(accumulate(rng.gammavariate(burstiness, 1.0) for _ in range(count)))
    return [time * count / (rate * times[-1]) for time in times]


def lengths_around(length: int | None, ratio: float, default: Lengths) -> Lengths:
    """E.g. (100, 0.2) -> from 80 to 120 tokens."""
    if length is None:
        return default
    return max(round(length * (1 - ratio)), 1), round(length * (1 + ratio))


def random_prompts(
    count: int,
    seed: int,
    tokenizer: Tokenizer | None,
    *,
    as_text: bool = False,
    prompt_len: Lengths = A_PROMPT_LEN,
    output_len: Lengths = A_OUTPUT_LEN,
) -> list[ServeRequest]:
    """Prompts of random tokens. With the default lengths and seed 0 they are workload A, token by token.

    `as_text`: random words instead, each of which is one token, because ids are not accepted in a chat and by some
    servers. The lengths stay the same, so that the work does.
    """
    vocab_size = tokenizer.vocab_size if tokenizer else LAST_RANDOM_ID + 1
    rng = random.Random(seed)
    requests = []
    for _ in range(count):
        length = rng.randint(*prompt_len)
        ids = random_ids(rng, length, vocab_size)
        wanted = rng.randint(*output_len)
        requests.append(ServeRequest(_words(tokenizer, ids, length) if as_text else ids, length, wanted))
    return requests


def _words(tokenizer: Tokenizer | None, ids: list[int], length: int) -> str:
    """A text of exactly `length` tokens, drawn with the random `ids`."""
    if tokenizer is None:
        raise ValueError("texts of known length need the model's tokenizer: add --tokenizer FOLDER")
    words = words_of(tokenizer)
    if not words:
        raise ValueError("this tokenizer has no words of one token each: use --prompts ids")
    length -= len(tokenizer.encode(""))  # e.g. a BOS token that the server will add, too
    text = "".join(words[token_id % len(words)] for token_id in ids[:length])
    if (found := len(tokenizer.encode(text, add_special_tokens=False))) != length:
        raise ValueError(f"this tokenizer joins words: {length} of them became {found} tokens; use --prompts ids")
    return text


@lru_cache(maxsize=1)
def words_of(tokenizer: Tokenizer) -> list[str]:
    """The words of a vocabulary that stay one token each inside a text, e.g. " house"."""
    texts = map(tokenizer.token_text, range(tokenizer.vocab_size))
    words = [text for text in texts if text.startswith(" ") and text[1:].isalpha() and text.isascii()]
    return [word for word in words if len(tokenizer.encode(word, add_special_tokens=False)) == 1]


def file_prompts(
    path: Path, count: int | None, tokenizer: Tokenizer | None, output_len: int | None
) -> list[ServeRequest]:
    """The first `count` prompts of a file, in its order: one JSON value per line, or one JSON list.

    An item is a text, {"prompt": ..., "output_len": ...}, or a conversation in ShareGPT's form, whose first answer
    gives the number of tokens to ask for. `output_len` overrides the lengths of the file.
    """
    items = list(islice(_items(path), count))
    if not items or len(items) < (count or 0):
        raise ValueError(f"{path} has {len(items)} prompts; ask for fewer with --num-prompts, or use a longer file")
    return [_file_request(item, tokenizer, output_len, f"{path}, item {i}") for i, item in enumerate(items, 1)]


def _items(path: Path) -> Iterator[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        yield from json.loads(text) if text.lstrip().startswith("[") else map(json.loads, text.splitlines())
    except ValueError as error:
        raise ValueError(f"{path} is neither a JSON list nor one JSON value per line: {error}") from None


def _file_request(item: Any, tokenizer: Tokenizer | None, output_len: int | None, where: str) -> ServeRequest:
    item = {"prompt": item} if isinstance(item, str) else item
    if not isinstance(item, dict):
        raise ValueError(f"{where}: expected a text or an object, got {item!r:.60}")
    turns = [turn.get("value") for turn in item.get("conversations", ()) if isinstance(turn, dict)]
    prompt, answer, *_ = [*turns, None, None] if turns else [item.get("prompt"), None]
    wanted = output_len or item.get("output_len")
    if wanted is None and answer and tokenizer is not None:
        wanted = len(tokenizer.encode(answer, add_special_tokens=False))
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f'{where}: no text in "prompt" or in the first of its "conversations"')
    if not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f'{where}: how many tokens to ask for? Add "output_len" to it, or --sharegpt-output-len N')
    return ServeRequest(prompt, len(tokenizer.encode(prompt)) if tokenizer else None, wanted)
