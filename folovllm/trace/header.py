"""make_header: the first line of a trace, with what a reader needs to judge the steps.

Milestone: M2. vLLM counterpart: none.

Row 1: no torch. Names no folder, user or host.
"""

import functools
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from folovllm import milestones
from folovllm.config import EngineConfig, engine_arg_names
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.trace.record import VERSION

# A trace may be shared, so what only this machine understands stays out of it.
_PRIVATE_ARGS = ("trace", "download_dir")


def make_header(config: EngineConfig, kv_cache_config: KVCacheConfig) -> dict[str, Any]:
    """The first line: all that a reader needs to judge the steps. Names no folder, user or host."""
    flat = {name: getattr(getattr(config, part) if part else config, name) for name, part in engine_arg_names().items()}
    arch = config.model_config.arch
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {
        "type": "header",
        "v": VERSION,
        "folovllm": _version(),
        "config": {name: _without_folders(value) for name, value in flat.items() if name not in _PRIVATE_ARGS},
        "switches": {name: flat[name] for rung in milestones.LADDER for name in rung.on},
        "model": {"architecture": arch.architecture, **{name: getattr(arch, name) for name in shape}},
        "kv": {
            "block_size": kv_cache_config.block_size,
            "usable_blocks": kv_cache_config.num_usable_blocks,
            "bytes_per_block": kv_cache_config.bytes_per_block,
        },
        "machine": {
            "system": platform.system(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }


def _without_folders(value: Any) -> Any:
    """The value, in which a path on this machine is cut to its last part. E.g. "/home/me/mine.py:A" -> "mine.py:A"."""
    if isinstance(value, str):
        return Path(value).name if value.startswith("~") or os.path.isabs(value) else value
    if isinstance(value, Mapping):
        return {name: _without_folders(one) for name, one in value.items()}
    return [_without_folders(one) for one in value] if isinstance(value, list | tuple) else value


@functools.cache  # a look at every package that is installed takes 20 ms
def _version() -> str | None:
    """The installed version; None when the code runs from a folder, without installation."""
    try:
        return metadata.version("folovllm")
    except metadata.PackageNotFoundError:
        return None
