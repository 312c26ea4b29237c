"""Parts: the classes of the engine that a learner can replace with their own.

Milestone: M3 (grows with later ones). vLLM counterpart: none (its plugins register models and platforms).

The engine builds each part through `load_part`, once, at construction, so that a replacement costs nothing per step.
    LLM("smollm2-135m", parts={"core.scheduler": "work/my_scheduler.py:Scheduler"})

Row 0: plain data, no torch. `load_part` is the project's only dynamic import.
"""

import importlib
import inspect
import os
import sys
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Part:
    """A replaceable class: the place of the default class, and the methods that a replacement must have."""

    name: str
    default: str  # "module:Class"
    methods: tuple[str, ...]


_QUEUE = ("add_request", "prepend_request", "peek_request", "pop_request", "remove_requests", "__len__", "__iter__")
_PREFIX_INDEX = ("hash_new_blocks", "match", "match_partial", "insert", "remove", "check_integrity")
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part(
            "core.scheduler",
            "folovllm.core.sched.scheduler:Scheduler",
            ("add_request", "schedule", "update_from_output", "finish_requests", "has_requests",
             "commit_step", "fail_step", "requests_under_way", "recover",
             "reset_prefix_cache", "has_unfinished_requests", "make_stats", "check_integrity"),
        ),
        Part(
            "core.request_queue.fcfs",
            "folovllm.core.sched.request_queue:FCFSRequestQueue",
            _QUEUE,
        ),
        Part(
            "core.request_queue.priority",
            "folovllm.core.sched.request_queue:PriorityRequestQueue",
            _QUEUE,
        ),
        Part(
            "core.kv_cache_manager",
            "folovllm.core.kv_cache_manager:KVCacheManager",
            ("add_request", "get_computed_blocks", "record_admission", "allocate_slots", "take_block_copies", "free",
             "preempt", "end_step", "reset_prefix_cache", "get_block_ids", "check_integrity"),
        ),
        Part(
            "core.block_pool",
            "folovllm.core.block_pool:BlockPool",
            ("get_new_blocks", "touch", "free_blocks", "unpublish", "reset_prefix_cache", "get_num_free_blocks",
             "check_integrity"),
        ),
        Part(
            "core.prefix_index.hash",
            "folovllm.core.prefix_index:HashPrefixIndex",
            _PREFIX_INDEX,
        ),
        Part(
            "core.prefix_index.trie",
            "folovllm.core.prefix_trie:TriePrefixIndex",
            _PREFIX_INDEX,
        ),
        Part(
            "core.kv_cache_budget",
            "folovllm.core.kv_cache_utils:KVCacheBudget",
            ("bytes_per_token", "num_blocks"),
        ),
        Part(
            "core.request",
            "folovllm.request:Request",
            ("set_status", "append_output_token_id", "attach_block_hasher", "rewind", "sort_key", "__lt__"),
        ),
        Part(
            "engine.text_stream",
            "folovllm.engine.detokenizer:TextStream",
            ("step", "flush"),
        ),
        Part(
            "engine.output_collector",
            "folovllm.engine.output_collector:RequestOutputCollector",
            ("put", "get", "get_nowait"),
        ),
        Part(
            "engine.request_stream",
            "folovllm.engine.request_stream:RequestStream",
            ("__aiter__", "__anext__", "aclose", "__aenter__", "__aexit__"),
        ),
        Part(
            "worker.block_table",
            "folovllm.worker.block_table:BlockTable",
            ("add_row", "append_row", "move_row", "slot_mapping"),
        ),
        Part(
            "attention.backend",
            "folovllm.attention.backends.torch_naive:TorchNaiveBackend",
            ("kv_cache_shape", "write", "copy_blocks", "forward"),
        ),
        Part(
            "sample.sampler",
            "folovllm.sample.sampler:Sampler",
            ("__call__",),
        ),
        Part(
            "quantize.grid",
            "folovllm.quantize.grid:Grid",
            ("find", "levels", "values"),
        ),
        Part(
            "quantize.packing",
            "folovllm.model_executor.layers.quantization.packing:Packing",
            ("pack_rows", "unpack_rows", "pack_zeros", "unpack_zeros"),
        ),
        Part(
            "quantize.gptq",
            "folovllm.quantize.gptq:GPTQ",
            ("quantize",),
        ),
        Part(
            "serve.event_stream",
            "folovllm.entrypoints.openai.sse:EventStream",
            ("encode", "feed"),
        ),
        Part(
            "serve.router",
            "folovllm.engine.router:PrefixRouter",
            ("route", "started", "finished", "forget"),
        ),
    )
}  # fmt: skip


def variants(kind: str) -> tuple[str, ...]:
    """Returns what may follow `kind` in the name of a part: the choices of an engine argument.

    E.g. "core.request_queue" -> ("fcfs", "priority"), which are those of `scheduling_policy`.
    """
    return tuple(name.removeprefix(f"{kind}.") for name in PARTS if name.startswith(f"{kind}."))


def load_part(name: str, parts: Mapping[str, str] | None = None) -> Any:
    """Returns the class of part `name`: the one that `parts` names ("path.py:Class" or "module:Class"), or the default.

    Raises ValueError for an unknown part, a missing file or class, or a class that lacks a method.
    """
    assert name in PARTS, f"our own code asks for a part that does not exist: {name}"
    check_parts(parts)
    spec = (parts or {}).get(name)
    return load_class(PARTS[name].default) if spec is None else _checked(PARTS[name], spec)


def check_parts(parts: Mapping[str, str] | None) -> None:
    """Raises ValueError for the name of a part that does not exist."""
    for name in parts or {}:
        if name not in PARTS:
            raise ValueError(f"unknown part {name!r}; there are {', '.join(PARTS)}")


def _checked(part: Part, spec: str) -> Any:
    cls = load_class(spec)
    if not inspect.isclass(cls):
        raise ValueError(f"part {part.name}: {spec} is not a class")
    missing = [method for method in part.methods if not callable(getattr(cls, method, None))]
    if missing:
        raise ValueError(
            f"part {part.name}: {spec} lacks the method{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            f"write {'them' if len(missing) > 1 else 'it'}, or inherit from {part.default.replace(':', '.')}"
        )
    return cls


def load_class(spec: str) -> Any:
    """Returns the class that "path.py:Class" or "module:Class" names. Raises ValueError if there is none."""
    location, _, class_name = str(spec).rpartition(":")
    if not location or not class_name:
        raise ValueError(f"{spec!r} does not name a class; write 'path.py:Class' or 'module:Class'")
    module = load_file(Path(location)) if location.endswith(".py") else _import(location)
    if not hasattr(module, class_name):
        raise ValueError(f"{location} has no class {class_name!r}")
    return getattr(module, class_name)


def _import(module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"cannot import {module_name!r}: {error}") from None


def load_file(path: Path) -> ModuleType:
    """Runs a Python file afresh and returns it as a module. Raises ValueError with the line if it cannot be run.

    No bytecode is read or written: a file that was saved twice within a second would come back as it was.
    """
    try:
        code = compile(path.read_bytes(), str(path), "exec")
    except FileNotFoundError:
        raise ValueError(f"no file {path}; the path is relative to the current folder, {Path.cwd()}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except SyntaxError as error:
        if "codec can't decode" in str(error):
            raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8") from None
        line = f", line {error.lineno}" if error.lineno else ""
        raise ValueError(f"{path}{line}: {error.msg}") from None
    except ValueError as error:  # a null byte, in some versions of Python
        raise ValueError(f"{path}: {error}") from None
    # A name of its own for each path. dataclasses look the module of a class up by name.
    module = ModuleType(f"folovllm_part_{path.stem}_{zlib.crc32(os.fsencode(path.absolute())):08x}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        raise ValueError(f"{path}, line {lines[-1]}: {type(error).__name__}: {error}") from error
    return module
