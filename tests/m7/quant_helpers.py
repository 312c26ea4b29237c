"""Tiny models that can be quantised (sizes in multiples of 32), random layers, and a packer too simple to be wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.layers.quantization.quantized_linear import QuantizedLinear
from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint
from tests.tiny_models import BOS, EOS, PAD, VOCAB_SIZE, build_tokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": False},  # biases on q, k and v
    "Qwen3": {"tie_word_embeddings": True},  # norms on q and k
}

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def make_quantizable(family: str, folder: Path, **changes: Any) -> Path:
    """A random fp32 model: inputs of 64 and 96, q, k and v of 64, 32 and 32 outputs, unless told otherwise."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        for name, param in model.named_parameters():
            if name.endswith(".bias"):
                param.data.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def random_windows(count: int = 6, length: int = 48, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (count, length), generator=generator).tolist()


def quantize(source: Path, out: Path, windows: Sequence[Sequence[int]] | None = None, **config: Any) -> Path:
    """The GPTQ checkpoint of `source`: 4 bits in groups of 32 unless told."""
    settings = QuantizeSettings(GPTQConfig(**{"bits": 4, "group_size": 32, **config}))
    quantize_checkpoint(source, out, settings, random_windows() if windows is None else windows, progress=False)
    return out


def random_layer(config: GPTQConfig, input_size: int, output_size: int, seed: int = 0) -> QuantizedLinear:
    """Any levels and zeros that the format can hold; with act-order, groups in no order."""
    generator = torch.Generator().manual_seed(seed)
    groups = config.num_groups(input_size)
    lowest = config.zero_offset
    g_idx = torch.arange(input_size) // config.group_length(input_size)
    if config.desc_act:
        g_idx = g_idx[torch.randperm(input_size, generator=generator)]
    return QuantizedLinear(
        torch.randint(0, config.max_level + 1, (output_size, input_size), generator=generator, dtype=torch.uint8),
        (torch.rand(groups, output_size, generator=generator) + 0.1).half().float(),
        torch.randint(lowest, config.max_level + 1, (groups, output_size), generator=generator).int(),
        g_idx.int(),
    )


def pack_by_hand(column: list[int], bits: int) -> list[int]:
    """One column as one long number, first value lowest, cut into signed 32-bit words."""
    number = sum(value << (bits * i) for i, value in enumerate(column))
    raw = number.to_bytes(len(column) * bits // 8, "little")
    return [int.from_bytes(raw[i : i + 4], "little", signed=True) for i in range(0, len(raw), 4)]
