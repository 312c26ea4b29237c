"""generation_config.json: the end-of-text ids and the sampling defaults that a model's authors recommend.

Milestone: M1. vLLM counterpart: ModelConfig.try_get_generation_config and get_diff_sampling_param
(vllm/config/model.py). Left out: `do_sample`, `num_beams` and the other keys that belong to HuggingFace's `generate`.

Row 0: plain data, no torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from folovllm.hf_json import ConfigError, is_int, read_json, refuse
from folovllm.sampling_params import SamplingParams
from folovllm.utils import unknown_name_message

GENERATION_FILE = "generation_config.json"
# HuggingFace's name -> ours. Like vLLM, no other key of the file changes how a token is chosen.
_SAMPLING_KEYS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


def read_generation_config(folder: Path, source: str = "auto") -> dict[str, Any]:
    """The generation_config.json of `folder`, or of the folder `source` unless that is "auto" or "vllm".

    {} if `folder` has no such file; ConfigError if `source` names a folder without it, or if it is no JSON object.
    """
    path = (folder if source in ("auto", "vllm") else Path(source).expanduser()) / GENERATION_FILE
    if path.is_file():
        return read_json(path)
    if source not in ("auto", "vllm"):
        refuse(
            "generation_config to be 'auto', 'vllm' or a folder with a generation_config.json",
            f"no file {path}",
            "correct the folder's name, or leave generation_config='auto'",
        )
    return {}


def default_sampling_params(
    folder: Path, source: str = "auto", override: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The sampling parameters that hold where a user gives none, under the names of SamplingParams.

    E.g. a file with do_sample=true, temperature=0.6 and max_new_tokens=2048 gives temperature=0.6, max_tokens=2048.
    `source` "vllm" ignores the file, so that SamplingParams' own defaults hold. `override` replaces single keys of the
    file. ConfigError names the file if a value in it is out of range.
    """
    override = check_override(override or {})
    values = {} if source == "vllm" else read_generation_config(folder, source)
    path = (folder if source == "auto" else Path(source)) / GENERATION_FILE
    given = {ours: values[key] for key, ours in _SAMPLING_KEYS.items() if values.get(key) is not None}
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise ConfigError(
            f"{path}: {error}; to fix it: correct the file, or pass generation_config='vllm' to ignore it"
        ) from None
    return given | {_SAMPLING_KEYS[key]: value for key, value in override.items() if value is not None}


def check_override(override: Any) -> dict[str, Any]:
    """A copy of the engine argument `override_generation_config`; ValueError unless it holds sampling parameters."""
    if not isinstance(override, Mapping):
        raise ValueError(f"override_generation_config must be a dict like {{'temperature': 0.7}}, got {override!r}")
    for key in override:
        if key not in _SAMPLING_KEYS:
            raise ValueError(unknown_name_message("key of override_generation_config", str(key), list(_SAMPLING_KEYS)))
    try:
        SamplingParams(**{_SAMPLING_KEYS[key]: value for key, value in override.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"override_generation_config: {error}") from None
    return dict(override)


def eos_token_ids(value: Any, file: str) -> list[int]:
    """`eos_token_id` as a list: the files hold a number, a list of numbers or null. ConfigError for anything else.

    A negative number stands for "none" in some configs and is left out.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_int(i) for i in ids):
        refuse(f"a token id, a list of token ids or null as 'eos_token_id' in {file}", repr(value), f"correct {file}")
    return [i for i in ids if i >= 0]
