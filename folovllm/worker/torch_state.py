"""neutral_torch: the caller's settings of torch do not reach the engine, and the engine does not change them.

Milestone: M1. vLLM counterpart: none; its worker is a process of its own, with its own settings.

Left out on purpose: the number of threads, deterministic algorithms and the matmul precision. The caller sets them for
everything in the process, and the engine follows them.
"""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def neutral_torch(device_type: str) -> Iterator[None]:
    """Runs the body without autocast, with float32 and the CPU as defaults, and restores what was set before.

    Usually none of them is set, and the cost is three checks.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        yield
