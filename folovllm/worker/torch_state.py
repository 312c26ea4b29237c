"""neutral_torch: the caller's settings of torch do not reach the engine, and the engine does not change them.

Milestone: M1. vLLM counterpart: none; its worker is a process of its own, with its own settings.

Left out on purpose: deterministic algorithms and the matmul precision. The caller sets them for everything in the
process, and the engine follows them. The same holds for the number of threads, unless the engine argument cpu_threads
gives the engine a number of its own.
"""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def neutral_torch(device_type: str, cpu_threads: int | None = None) -> Iterator[None]:
    """Runs the body without autocast, with float32 and the CPU as defaults, and restores what was set before.

    With `cpu_threads` the body also runs with that number of threads. Usually nothing has to be set, and the cost is a
    check for each setting.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if cpu_threads not in (None, torch.get_num_threads()):
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(cpu_threads)
        yield
