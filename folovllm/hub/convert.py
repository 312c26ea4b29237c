"""From a GGUF file to a HuggingFace folder, once, at pull time (milestone M0).

Everything after `pull` (our loader, the HuggingFace baseline, the quantiser) then reads one format: safetensors plus
JSON. transformers parses and dequantises the GGUF; this file writes the result and restores what GGUF lost. vLLM's
counterpart is vllm/model_executor/model_loader/gguf_loader.py, which instead keeps GGUF's blocks quantised at run time.
Left out: any GGUF whose pre-tokenizer is not in `PRE_TOKENIZERS`.

The weights are stored as float32 for a reason. A Q4_1 value is `d * q + m` with fp16 `d`, `m` and a 4-bit `q`. The
product alone needs up to 15 significant bits, but fp16 has 11 and bf16 has 8: on this model, a quarter of a layer's
values change in fp16 and two thirds in bf16. A narrower file would therefore round the model a second time.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from folovllm.hub.aliases import Alias
from folovllm.hub.errors import PullError, problem

# GGUF names the pre-tokenizer instead of storing it, and transformers falls back to GPT-2's rule alone. SmolLM first
# cuts out every digit, so that whitespace before one stays whole:
# E.g., "x\n\n1." -> x, ĊĊ, 1, .  (GPT-2's rule alone: x, Ċ, Ċ, 1, .); numbered lists and indented numbers depend on it.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
}
# The entries of transformers' in-memory config that describe the model. The rest (paths, labels, the GGUF) is dropped.
_MODEL_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def convert_gguf(gguf_path: Path, out: Path, alias: Alias) -> None:
    """Writes `gguf_path` as a HuggingFace folder into the existing folder `out`."""
    with _quiet_transformers():
        _write_tokenizer(gguf_path, out, alias)
        _write_model(gguf_path, out, alias)
    check_config_facts(json.loads((out / "config.json").read_text(encoding="utf-8")), alias)


def check_config_facts(config: dict[str, Any], alias: Alias) -> None:
    """Compares a converted config.json with the known facts about the model. Raises PullError with every difference."""
    wrong = {k: (v, config.get(k)) for k, v in alias.config_facts.items() if config.get(k) != v}
    if wrong:
        expected = ", ".join(f"{k}={want!r}" for k, (want, _) in wrong.items())
        found = ", ".join(f"{k}={have!r}" for k, (_, have) in wrong.items())
        todo = "install the transformers version of constraints.txt and pull again"
        raise PullError(f"the converted config of {alias.name!r} is wrong: " + problem(expected, found, todo))


def _write_model(gguf_path: Path, out: Path, alias: Alias) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        # The two names are one tensor, and HuggingFace folders keep only the embedding.
        tensors.pop("lm_head.weight", None)
    # `save_pretrained` refuses a model that came from GGUF ("quantized, not serializable"), although its weights are
    # plain float32 by now; and it writes its own version's config keys. So the three files are written by hand.
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # save_file makes the file private. A cache folder may be shared, so the file gets the mode of the other files.
    (out / "model.safetensors").chmod((out / "tokenizer.json").stat().st_mode & 0o777)
    _write_json(out / "config.json", _config_dict(model.config.to_dict(), alias))
    _write_json(out / "generation_config.json", {k: alias.config_facts[k] for k in _GENERATION_KEYS})


def _config_dict(config: dict[str, Any], alias: Alias) -> dict[str, Any]:
    """Returns the contents of config.json: what transformers read from the GGUF, without GGUF's own entries, and with
    what GGUF lost.
    """
    kept = {key: config[key] for key in _MODEL_KEYS if key in config}
    # transformers 5 nests it, but transformers 4 and other engines read the top level, so it is written in both places.
    rope_theta = config["rope_parameters"]["rope_theta"]
    return {"architectures": ["LlamaForCausalLM"], **kept, "rope_theta": rope_theta, **alias.config_fixes}


def _write_tokenizer(gguf_path: Path, out: Path, alias: Alias) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    if not tokenizer.chat_template:
        todo = "use another GGUF of this model"
        raise PullError(f"{gguf_path.name}: " + problem("a chat template in its metadata", "none", todo))
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["pre_tokenizer"] = PRE_TOKENIZERS[_pre_tokenizer_name(gguf_path)]
    spec["post_processor"] = None  # transformers made an empty template; the model adds no BOS of its own
    (out / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1), encoding="utf-8")
    (out / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    special = {f"{k}_token": getattr(tokenizer, f"{k}_token") for k in ("bos", "eos", "pad", "unk")}
    # The generic class: transformers 5's GPT2Tokenizer rebuilds its own pre-tokenizer and would lose the digits again.
    _write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **special, **alias.tokenizer_fixes},
    )


def _pre_tokenizer_name(gguf_path: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    name = str(field.contents()) if field is not None else "(none)"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        todo = "add its rule to PRE_TOKENIZERS in folovllm/hub/convert.py"
        raise PullError(f"{gguf_path.name}: " + problem(f"a known pre-tokenizer ({known})", repr(name), todo))
    return name


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars and notices off the screen, because `pull` shows a bar already."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # no setting turns off the bar of its GGUF reader
            yield
    finally:
        logging.set_verbosity(level)
