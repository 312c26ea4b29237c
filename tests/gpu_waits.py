"""On a real GPU: every wait of the host is an error, but for the one in `transfers.to_host`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from folovllm import transfers


@contextlib.contextmanager
def only_to_host_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yields a list that gets, for each wait, the number of tensors that came back."""
    download, waits = transfers._download, []

    def may_wait(tensors: Any) -> list[torch.Tensor]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            waits.append(len(tensors))
            return download(tensors)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with monkeypatch.context() as patch:
        patch.setattr(transfers, "_download", may_wait)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
