"""GPTQConfig: how the weights of a GPTQ checkpoint are quantised and stored.

Milestone: M7. vLLM counterpart: GPTQConfig of vllm/model_executor/layers/quantization/gptq.py. Left out: `dynamic`
(other settings for some layers, GPTQModel), Marlin's own layout, words of other than 32 bits; all are refused.

Row 0: plain data, no torch. The format is AutoGPTQ's. Its settings are the `quantization_config` of config.json; older
tools wrote them to quantize_config.json alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from folovllm.utils import cdiv

BITS = (2, 3, 4, 8)
# "gptq" (v1) stores every zero point minus one, "gptq_v2" as it is.
CHECKPOINT_FORMATS = ("gptq", "gptq_v2")
WORD_BITS = 32
PER_CHANNEL = -1  # group_size: one group over the whole input
# If a checkpoint lists the layers that were quantised, these must be among them: q, k and v are one layer here.
_ALL_LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class GPTQConfig:
    """A weight is scale * (level - zero), with one scale and one zero per output and group of `group_size` inputs."""

    bits: int
    group_size: int = PER_CHANNEL
    sym: bool = True  # zero is the middle level everywhere
    desc_act: bool = False  # act-order: g_idx says which group an input belongs to; without it, i // group_size does
    checkpoint_format: str = "gptq"
    lm_head: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or self.bits not in BITS:
            _refuse(f"bits of {', '.join(map(str, BITS))}", repr(self.bits), "use a checkpoint with one of these")
        if not _is_int(self.group_size) or (self.group_size != PER_CHANNEL and self.group_size < 1):
            _refuse("a group_size of at least 1, or -1", repr(self.group_size), "correct quantization_config")
        if self.checkpoint_format not in CHECKPOINT_FORMATS:
            todo = "convert it with GPTQModel, or use a checkpoint in one of them"
            _refuse(f"a checkpoint_format of {', '.join(CHECKPOINT_FORMATS)}", repr(self.checkpoint_format), todo)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], tied_head: bool = False) -> "GPTQConfig":
        """From the `quantization_config` of config.json. ValueError for what would load and then answer wrongly."""
        _check_readable(config)
        lm_head = _flag(config, "lm_head", False)
        if lm_head and tied_head:
            _refuse("a plain lm_head, as it is the embedding", "a quantised one", "quantise without lm_head")
        return cls(
            bits=config.get("bits", 0),  # 0 is refused like any other wrong number
            group_size=config.get("group_size", PER_CHANNEL),
            sym=_flag(config, "sym", True),
            desc_act=_flag(config, "desc_act", False),
            checkpoint_format=str(config.get("checkpoint_format") or config.get("format") or "gptq"),
            lm_head=lm_head,
        )

    def to_json(self, damp: float, quantizer: str) -> dict[str, Any]:
        """The `quantization_config` that transformers, GPTQModel and vLLM read."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "checkpoint_format": self.checkpoint_format,
            "lm_head": self.lm_head,
            "pack_dtype": "int32",
            "damp_percent": damp,
            "static_groups": False,
            "true_sequential": True,
            "meta": {"quantizer": [quantizer]},
        }

    @property
    def max_level(self) -> int:
        return 2**self.bits - 1

    @property
    def zero_offset(self) -> int:
        """What a stored zero point lacks: 1 in v1, 0 in v2."""
        return 1 if self.checkpoint_format == "gptq" else 0

    @property
    def pack_unit(self) -> int:
        """The fewest values that fill whole words; sizes are multiples of it. E.g. 8 for 4 bits, 32 for 3."""
        return WORD_BITS // math.gcd(WORD_BITS, self.bits)

    def num_words(self, num_values: int) -> int:
        """32-bit words that hold `num_values` levels. E.g. 3 bits, 32 values -> 3."""
        assert num_values % self.pack_unit == 0
        return num_values * self.bits // WORD_BITS

    def group_length(self, input_size: int) -> int:
        return input_size if self.group_size == PER_CHANNEL else self.group_size

    def num_groups(self, input_size: int) -> int:
        """The last group is shorter where group_size does not divide. E.g. 72 inputs in groups of 32 -> 3."""
        return cdiv(input_size, self.group_length(input_size))


def _check_readable(config: Mapping[str, Any]) -> None:
    if config.get("dynamic"):
        todo = "use a checkpoint that treats all layers alike"
        _refuse("one setting for all layers", "'dynamic' settings in quantization_config", todo)
    if config.get("is_marlin_format"):
        _refuse("AutoGPTQ's layout", "Marlin's", "use the checkpoint it was made from")
    if config.get("pack_dtype", "int32") != "int32":
        _refuse("weights packed into int32", f"pack_dtype {config['pack_dtype']!r}", "pack them again with GPTQModel")
    inside = config.get("modules_in_block_to_quantize")
    if inside:
        names = {
            str(name).rpartition(".")[2] for part in inside for name in ([part] if isinstance(part, str) else part)
        }
        if not names >= _ALL_LINEARS:
            found = f"only {', '.join(sorted(names))} quantised"
            _refuse("every linear layer of a block quantised", found, "use a checkpoint that quantises all of them")


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """`config[key]`, or `default` if it is absent or null. The text "false" would count as true, so text is refused."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        _refuse(f"true or false as {key!r}", repr(value), "correct quantization_config")
    return default if value is None else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(expected: str, found: str, todo: str) -> NoReturn:
    raise ValueError(f"expected {expected}; found {found}; to fix it: {todo}")
