"""make_header: the first line of a trace, with what a reader needs to judge the steps.

Milestone: M2. vLLM counterpart: none.

Row 1: no torch. Names no folder, user or host.
"""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from folovllm import milestones
from folovllm.config import EngineConfig, engine_arg_names
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.trace.record import VERSION

_PRIVATE_ARGS = ("trace", "download_dir")  # paths on this machine stay out of a trace, which may be shared


def make_header(config: EngineConfig, kv_cache_config: KVCacheConfig) -> dict[str, Any]:
    """The first line: all that a reader needs to judge the steps. Names no folder, user or host."""
    flat = {name: getattr(getattr(config, part) if part else config, name) for name, part in engine_arg_names().items()}
    flat["model"] = Path(flat["model"]).name if os.path.isabs(flat["model"]) else flat["model"]
    arch = config.model_config.arch
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {
        "type": "header",
        "v": VERSION,
        "folovllm": _version(),
        "config": {name: value for name, value in flat.items() if name not in _PRIVATE_ARGS},
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


def _version() -> str | None:
    """The installed version; None when the code runs from a folder, without installation."""
    try:
        return metadata.version("folovllm")
    except metadata.PackageNotFoundError:
        return None
