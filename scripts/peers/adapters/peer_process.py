"""What every adapter does: read the task, load the peer, warm up, measure each mode once, write the result.

Milestone: M4. vLLM counterpart: none. Stand-alone: imports nothing but the standard library.

The task:   {"model", "dtype", "threads", "max_model_len", "kv_cache_gib", "options",
             "warm_up": [request...], "modes": {"single": [request...], "batch": [...], "prompt1000": [...]}}
A request is [prompt token ids, number of tokens to give]. The result:
            {"ok", "error" | "version", "settings", "load", "modes": {mode: {"seconds", "tokens"}}}
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Task = dict[str, Any]
Request = list[Any]  # [list of token ids, int]
Tokens = list[list[int]]  # per request


@dataclass
class Engine:
    """A peer, ready: `generate` answers requests sent at once, in their order."""

    generate: Callable[[list[Request]], Tokens]
    version: str
    settings: dict[str, Any]


def main(import_peer: Callable[[Task], Any], load: Callable[[Any, Task], Engine]) -> int:
    """`import_peer` sets what must be set before the import; what it returns is passed on to `load`."""
    task_file, result_file = map(Path, sys.argv[1:3])
    try:
        result = {"ok": True, **measure(json.loads(task_file.read_text()), import_peer, load)}
    except BaseException as error:
        traceback.print_exc()
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    result_file.write_text(json.dumps(result))
    return 0 if result["ok"] else 1


def measure(task: Task, import_peer: Callable[[Task], Any], load: Callable[[Any, Task], Engine]) -> dict[str, Any]:
    start = time.perf_counter()
    imported = import_peer(task)
    after_import = time.perf_counter()
    engine = load(imported, task)
    times = {"import_seconds": after_import - start, "load_seconds": time.perf_counter() - after_import}
    engine.generate(task["warm_up"][:1])
    engine.generate(task["warm_up"])
    modes = {mode: run_mode(engine, mode, requests) for mode, requests in task["modes"].items()}
    return {"version": engine.version, "settings": engine.settings, "load": times, "modes": modes}


def run_mode(engine: Engine, mode: str, requests: list[Request]) -> dict[str, Any]:
    """A batch all at once, else each when the one before is complete. The clock starts before the first is sent."""
    tokens: Tokens = []
    start = time.perf_counter()
    for group in [requests] if mode == "batch" else [[request] for request in requests]:
        tokens += engine.generate(group)
    return {"seconds": time.perf_counter() - start, "tokens": tokens}
