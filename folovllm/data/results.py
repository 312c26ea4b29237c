"""The folder of results: one file per batch of rows, written as a whole or not at all.

Milestone: M10. vLLM counterpart: none.

    answers/part-3f0c....parquet       one row per completed row of the input
    answers/rejected-91ab....jsonl     the rows that have no usable id, with the reason

The name of a file is a digest of its ids. If Ray runs a batch a second time, because a machine died, the second file
takes the place of the first one. A run that was interrupted goes on where it was: the ids in the folder are skipped.

Imports neither torch nor, at the top, Ray.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from folovllm.data.rows import RowId
from folovllm.distributed.ray_cluster import import_ray

ID = "id"
PARTS, REJECTED = "part-*.parquet", "rejected-*.jsonl"


def result_row(
    identity: RowId,
    text: str | None = None,
    token_ids: Sequence[int] = (),
    num_prompt_tokens: int = 0,
    finish_reason: str = "error",
    error: str | None = None,
) -> dict[str, Any]:
    """A row of the results. With an `error` there is no text."""
    return {
        ID: identity,
        "text": text,
        "token_ids": list(token_ids),
        "num_prompt_tokens": num_prompt_tokens,
        "finish_reason": finish_reason,
        "error": error,
    }


def write_part(folder: Path, rows: Sequence[dict[str, Any]], id_kind: type) -> None:
    """Writes the results of a batch."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            (ID, pa.int64() if id_kind is int else pa.string()),
            ("text", pa.string()),
            ("token_ids", pa.list_(pa.int64())),
            ("num_prompt_tokens", pa.int64()),
            ("finish_reason", pa.string()),
            ("error", pa.string()),
        ]
    )
    table = pa.Table.from_pylist(list(rows), schema=schema)
    name = f"part-{_digest([row[ID] for row in rows])}.parquet"
    temporary = _temporary(folder)
    pq.write_table(table, temporary)
    os.replace(temporary, folder / name)


def write_rejected(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the rows of a batch that have no usable id, each with its "error"."""
    lines = [json.dumps(row, default=repr, sort_keys=True) for row in rows]
    temporary = _temporary(folder)
    temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, folder / f"rejected-{_digest(lines)}.jsonl")


def _temporary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f".{uuid.uuid4().hex}.tmp"


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:32]


def written_ids(folder: Path) -> set[RowId]:
    """The ids that the folder has results for."""
    import pyarrow.parquet as pq

    return {value for path in folder.glob(PARTS) for value in pq.read_table(path, columns=[ID])[ID].to_pylist()}


def read_results(folder: str | Path) -> Any:
    """The results of a folder as a `pyarrow.Table`, in the order of their ids.

    It is read into memory. If it does not fit, `ray.data.read_parquet(folder).sort("id")` does the same on a cluster.
    """
    import_ray("folovllm.data")  # which brings pyarrow
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(Path(folder).glob(PARTS))
    if not paths:
        raise ValueError(f"{folder} has no results yet: complete(..., output={str(folder)!r}) writes them")
    return pa.concat_tables([pq.read_table(path) for path in paths]).sort_by(ID)


def read_rejected(folder: str | Path) -> list[dict[str, Any]]:
    """The rows that were rejected, each with its "error"."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob(REJECTED))]
    return [json.loads(line) for text in texts for line in text.split("\n") if line]
