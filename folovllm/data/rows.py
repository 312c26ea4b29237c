"""Rows of a data set: from what the user wrote to a prompt with its id, or to the reason why it is none.

Milestone: M10. vLLM counterpart: none; ray.data.llm has a stage for each kind of prompt.

A row has an id and a prompt. The prompt is a text, a list of token ids, or a list of messages for the chat template.
Its own sampling parameters, if it has any, go over those of the run:

    {"id": 7, "prompt": "The capital of France is"}
    {"id": "b", "prompt": [{"role": "user", "content": "Hi"}], "sampling_params": {"max_tokens": 64}}

Imports neither torch nor Ray.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.text_files import BOM

RowId = int | str
PARAMS = "sampling_params"


class BadRow(ValueError):
    """A row that cannot be completed; the text says why."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read."""

    prompt: str = "prompt"
    id: str = "id"


def parse_line(line: str) -> dict[str, Any]:
    """The object on a line of a JSONL file. Raises BadRow.

    Ray Data has read the file as Latin-1, so that a byte that is no UTF-8 spoils its own line only.
    """
    try:
        value = json.loads(line.encode("latin-1").decode("utf-8").removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise BadRow(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRow('no JSON object such as {"id": 1, "prompt": "Hello"}')
    return value


def row_id(row: Mapping[str, Any], columns: Columns, kind: type) -> RowId:
    """The id of a row. Raises BadRow if it has none of the `kind`, int or str, that the first row's id has."""
    value = row.get(columns.id)
    if not is_id(value) or not isinstance(value, kind):
        wanted = "a number" if kind is int else "a printable text"
        raise BadRow(f"column {columns.id!r} must hold an id that is {wanted}, as the first row's is; got {value!r}")
    return value


def is_id(value: Any) -> TypeGuard[RowId]:
    """Whether a value can be an id: a whole number of 64 bits, or a text that can be written."""
    if isinstance(value, str):
        return bool(value) and value.isprintable()
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def row_prompt(row: Mapping[str, Any], columns: Columns) -> str | list[Any]:
    """The prompt of a row: text, token ids or messages. Raises BadRow if it is something else, or missing."""
    value = row.get(columns.prompt)
    if not isinstance(value, (str, list)):
        raise BadRow(f"column {columns.prompt!r} must hold text, token ids or messages, got {value!r}")
    return value


def is_conversation(prompt: str | list[Any]) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def row_params(row: Mapping[str, Any], defaults: Mapping[str, Any], identity: RowId, seed: int) -> SamplingParams:
    """The sampling parameters of a row: its own over `defaults`. Raises ValueError for a bad one.

    A row without a seed gets one that depends on its id and on the engine's `seed`. So its answer is the same in any
    order, with any number of engines, and after an interruption.
    """
    own = row.get(PARAMS) or {}
    if not isinstance(own, Mapping):
        raise BadRow(f"column {PARAMS!r} must hold an object such as {{'max_tokens': 64}}, got {own!r}")
    given = {name: value for name, value in own.items() if value is not None}  # Parquet fills missing fields with null
    params = SamplingParams.from_dict({**defaults, **given}).replace(output_kind=RequestOutputKind.FINAL_ONLY)
    if params.n != 1:
        raise BadRow(f"n={params.n}: a row has one answer; write the row several times with ids of its own")
    return params if params.seed is not None else params.replace(seed=seed_of(identity, seed))


def seed_of(identity: RowId, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{type(identity).__name__}:{identity}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
