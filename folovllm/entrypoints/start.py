"""What `LLM`, `AsyncLLM` and the server do first: from a model's name to its files, defaults and tokenizer.

Milestone: M8. vLLM counterpart: `EngineArgs.create_engine_config` in vllm/engine/arg_utils.py.

Imports no torch: the server's front end starts here, and its engine is another process.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.config import DEFAULT_MODEL, EngineConfig
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.tokenizer import Tokenizer
from folovllm.generation_config import default_sampling_params
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.hub import find_model, find_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine, and what its files say. `config` is checked, and not resolved yet."""

    config: EngineConfig
    path: Path
    arch: ModelArchitecture
    sampling_defaults: dict[str, Any]  # those of generation_config.json and override_generation_config

    def load_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or the one that the config names, or None with skip_tokenizer_init."""
        options = self.config.model_config
        if options.skip_tokenizer_init:
            return None
        if options.tokenizer is None:
            return Tokenizer.from_folder(self.path)
        return Tokenizer.from_folder(find_tokenizer(options.tokenizer, options.download_dir))


def find_model_files(config: EngineConfig) -> ModelFiles:
    """Finds the model of `config`, and pulls it if it is not here. Raises the errors of `folovllm.hub`."""
    options = config.model_config
    path = find_model(
        options.model,
        options.download_dir,
        pull=True,
        tokenizer=options.tokenizer is None and not options.skip_tokenizer_init,
        weights=options.load_format != "dummy",
    )
    arch = load_hf_config(path, options.hf_overrides, options.generation_config)
    defaults = default_sampling_params(path, options.generation_config, options.override_generation_config)
    return ModelFiles(config, path, arch, defaults)


def announce_defaults(sampling_defaults: dict[str, Any]) -> None:
    """Logs which sampling parameters the model's own files change."""
    logger.warning(
        "sampling defaults from the model's generation_config.json: %s (generation_config='vllm' ignores it)",
        sampling_defaults,
    )


async def start_async_llm(
    model: str = DEFAULT_MODEL,
    preset: str | None = None,
    without: Iterable[str] = (),
    *,
    in_process: bool = True,
    **engine_args: Any,
) -> AsyncLLM:
    """An AsyncLLM for a model by name, with the arguments and the errors of `LLM`.

    The engine is a process of its own, or with `in_process=False` a thread. As with every spawned process, a script
    that calls this needs `if __name__ == "__main__":` around what it does.
    """
    config = EngineConfig.from_args(preset=preset, without=without, model=model, **engine_args)
    size = config.parallel_config.data_parallel_size
    if size > 1 and not in_process:
        raise ValueError(
            f"data_parallel_size={size} engines cannot be threads of one process: leave "
            "--disable-frontend-multiprocessing (in_process=False) out"
        )
    files = find_model_files(config)
    if files.sampling_defaults:
        announce_defaults(files.sampling_defaults)
    return await AsyncLLM.start(
        files.config,
        files.path,
        files.load_tokenizer,
        in_process=in_process,
        sampling_defaults=files.sampling_defaults,
    )
