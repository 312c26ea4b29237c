"""A HuggingFace folder as a GGUF file without a tokenizer: `python folder_to_gguf.py FOLDER FILE.gguf`.

Milestone: M4. It runs in our environment, and in a process of its own because it loads torch. llama.cpp's own
counterpart is convert_hf_to_gguf.py. It is meant for the benchmark's random weights, so a folder's tokenizer is left
out, and so is every family of models of which llama.cpp expects the rows of a matrix in another order (Llama, Mistral).
"""

import sys
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from folovllm.hf_config import ModelArchitecture, load_hf_config

FAMILIES = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def main(source: str, target: str) -> int:
    folder = Path(source)
    arch = load_hf_config(folder)
    family = FAMILIES.get(arch.model_type)
    if family is None or arch.rope.rope_type != "default":
        sys.exit(
            f"a model of type {arch.model_type} with {arch.rope.rope_type} RoPE cannot be turned into GGUF here; "
            f"{', '.join(FAMILIES)} with default RoPE can"
        )
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[family])
    describe(writer, arch)
    names = gguf.get_tensor_name_map(family, arch.num_hidden_layers)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                known = names.get_name(name, try_suffixes=(".weight", ".bias"))
                assert known is not None, f"no GGUF name for {name}"
                add_tensor(writer, known, tensors.get_tensor(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


def describe(writer: gguf.GGUFWriter, arch: ModelArchitecture) -> None:
    """The shape of the model under GGUF's names."""
    writer.add_context_length(arch.max_position_embeddings)
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(arch.num_hidden_layers)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.num_attention_heads)
    writer.add_head_count_kv(arch.num_key_value_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    writer.add_layer_norm_rms_eps(arch.rms_norm_eps)
    writer.add_rope_freq_base(arch.rope.theta)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(arch.vocab_size)


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Matrices stay bf16; vectors become fp32, as llama.cpp expects them."""
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
    else:
        data = tensor.bfloat16().contiguous().view(torch.uint8).numpy()  # [rows, 2 * columns], bytes
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
