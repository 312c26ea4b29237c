"""The dequantised twin: a GPTQ checkpoint written as a plain one, which any program can load.

Milestone: M7. vLLM counterpart: none. Proofs of exactness compare with the twin, and HuggingFace's own code can
evaluate our quantised weights on it without GPTQModel.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from folovllm.checkpoint_files import INDEX
from folovllm.hf_config import DTYPES, load_hf_config
from folovllm.model_executor.layers.quantization.quantized_linear import dequantize_weights
from folovllm.model_executor.weight_utils import iterate_weights, safetensors_files
from folovllm.quantize.output import copy_chat_templates

_NOT_COPIED = ("config.json", "quantize_config.json", "quantize_log.json", INDEX)


def write_dequantized(folder: Path, out: Path, dtype: str = "float32") -> Path:
    """Writes the twin of GPTQ checkpoint `folder` to the new folder `out`, in `dtype`, and returns `out`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    quantization = load_hf_config(folder).quantization
    if quantization is None:
        raise ValueError(f"{folder} is not quantised: it is its own twin")
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _NOT_COPIED:
            shutil.copy2(path, out / path.name)
    copy_chat_templates(folder, out)
    plain = dequantize_weights(iterate_weights(safetensors_files(folder)), quantization)
    wanted: torch.dtype = getattr(torch, dtype)
    tensors = {name: tensor.to(wanted).contiguous() for name, tensor in plain}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    (out / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    return out
