"""Checks of m7/pack_int4."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from folovllm.gptq_config import GPTQConfig
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import tiny_model
from folovllm.model_executor.layers.quantization.packing import Packing
from folovllm.model_executor.layers.quantization.quantized_linear import unpack_linear
from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint

LEVELS = [6, 2, 3, 6, 1, 4, 2, 15]


def prediction() -> str:
    word = Packing(4).pack_rows(torch.tensor([5, 1, 7, 2, 0, 4, 3, 6])[:, None]).item()
    return f"{unsigned(word):08X}\nThe first level lies in the lowest four bits, which are the last hexadecimal digit."


def unsigned(word: float) -> int:
    return int(word) % 2**32


def word(digits: str) -> int:
    """An int32 from hexadecimal digits. E.g. "FFFFFFFF" -> -1."""
    number = int(digits, 16)
    return number - 2**32 if number >= 2**31 else number


def hexadecimal(words: torch.Tensor) -> list[str]:
    return [f"{unsigned(w):08X}" for w in words.flatten().tolist()]


@check("unit", spec="R7.13", hint=1)
def the_first_value_is_lowest(mine: Mine) -> None:
    """Eight levels of 4 bits are one word, the first in the lowest nibble."""
    packed = mine.cls(4).pack_rows(torch.tensor(LEVELS)[:, None])
    assert packed.dtype == torch.int32 and list(packed.shape) == [1, 1], (
        f"8 levels of one column were packed into {packed.dtype} {list(packed.shape)}, expected int32 [1, 1]"
    )
    assert hexadecimal(packed) == ["F2416326"], f"{LEVELS} became {hexadecimal(packed)[0]}, expected F2416326"
    back = mine.cls(4).unpack_rows(packed)
    assert back.dtype == torch.uint8, f"unpacked levels have the dtype {back.dtype}, expected uint8"
    assert back.flatten().tolist() == LEVELS, f"F2416326 was unpacked to {back.flatten().tolist()}, expected {LEVELS}"


@check("unit", spec="R7.13", hint=3)
def the_sign_bit_is_a_bit(mine: Mine) -> None:
    """A word whose last value has its top bit set is a negative int32, and its values are what they were."""
    for values, digits in (([15] * 8, "FFFFFFFF"), ([0] * 7 + [8], "80000000"), ([15] + [0] * 6 + [15], "F000000F")):
        packed = mine.cls(4).pack_rows(torch.tensor(values)[:, None])
        assert hexadecimal(packed) == [digits], f"{values} became {hexadecimal(packed)[0]}, expected {digits}"
        back = mine.cls(4).unpack_rows(torch.tensor([[word(digits)]], dtype=torch.int32)).flatten().tolist()
        assert back == values, f"{digits} was unpacked to {back}, expected {values}: >> keeps the sign"


@check("unit", spec="R7.13", hint=2)
def columns_are_packed_side_by_side(mine: Mine) -> None:
    """A column is an output. 16 inputs of 2 outputs are 2 words for each."""
    levels = torch.arange(32).view(2, 16).t() % 16  # [16, 2]: both columns count 0 .. 15
    packed = mine.cls(4).pack_rows(levels)
    wanted = [["76543210", "76543210"], ["FEDCBA98", "FEDCBA98"]]
    found = [hexadecimal(row) for row in packed]
    assert found == wanted, f"two columns 0 .. 15 became {found}, expected {wanted}: rows of words, a column per output"


@check("unit", spec="R7.14", hint=3)
def zero_points_of_v1_lack_one(mine: Mine) -> None:
    """A symmetric 4-bit file is full of sevens in v1, and of eights in v2; both mean 8."""
    for offset, digits in ((1, "77777777"), (0, "88888888")):
        packing, zeros = mine.cls(4, offset), torch.full((2, 8), 8, dtype=torch.int32)
        packed = packing.pack_zeros(zeros)
        assert hexadecimal(packed) == [digits] * 2 and list(packed.shape) == [2, 1], (
            f"zeros of 8 with zero_offset {offset} became {hexadecimal(packed)}, {list(packed.shape)}; expected 2 rows "
            f"of {digits}"
        )
        assert packed.is_contiguous(), "the packed zeros are not contiguous, and safetensors will not write them"
        back = packing.unpack_zeros(packed)
        assert torch.equal(back.int(), zeros), (
            f"{digits} with zero_offset {offset} was read as {back.tolist()}, expected {zeros.tolist()}: one off in "
            "the zero is one scale off in every weight"
        )
        assert back.dtype == torch.int32, f"unpacked zero points have the dtype {back.dtype}, expected int32"


@check("unit", spec="R7.14", hint=3)
def zero_points_lie_along_the_outputs(mine: Mine) -> None:
    """The eight zero points of a word belong to eight outputs of one group."""
    zeros = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9] * 8], dtype=torch.int32)
    packed = mine.cls(4).pack_zeros(zeros)
    assert [hexadecimal(row) for row in packed] == [["87654321"], ["99999999"]], (
        f"zeros 1 .. 8 of one group and nines of another became {hexadecimal(packed)}, expected 87654321 and 99999999"
    )


@check("unit", spec="R7.14", hint=3)
def a_zero_of_zero_borrowed(mine: Mine) -> None:
    """GPTQModel subtracts the ones of v1 from whole words; adding them to whole words gives every zero back."""
    zeros = torch.tensor([[0, 3, 0, 0, 7, 15, 0, 1], [0] * 8], dtype=torch.int32)
    whole = Packing(4).pack_zeros(zeros).long() - 0x11111111  # as the tool does it
    stored = ((whole + 2**31) % 2**32 - 2**31).to(torch.int32)
    back = mine.cls(4, 1).unpack_zeros(stored)
    assert torch.equal(back, zeros), (
        f"the v1 words {hexadecimal(stored)} were read as {back.tolist()}, expected {zeros.tolist()}: a 0 borrows from "
        "its neighbour, and gets it back only if the ones are added to the whole word"
    )


@check("unit", spec="R7.14", hint=2)
def a_layer_of_a_real_checkpoint(mine: Mine) -> None:
    """The four tensors of a v1 layer with 8 inputs and 8 outputs, typed from the documented layout."""
    tensors = {
        # Input 0 is the last digit. Output 0 has the levels 0 .. 7, output 1 has 8 .. 15, the others have one each.
        "qweight": [["76543210", "FEDCBA98", "00000000", "11111111", "77777777", "88888888", "99999999", "FFFFFFFF"]],
        # Output 0 is the last digit, and every zero is stored minus one: the zeros are 8, 8, 1, 1, 8, 8, 8, 16 - 1.
        "qzeros": [["E7770077"]],
    }
    loaded: dict[str, Any] = {name: torch.tensor([[word(w) for w in row] for row in rows], dtype=torch.int32)
                              for name, rows in tensors.items()}  # fmt: skip
    loaded["scales"] = torch.tensor([[0.5, 1.0, 2.0, 0.25, 1.0, 1.0, 1.0, 1.0]]).half()
    loaded["g_idx"] = torch.zeros(8, dtype=torch.int32)
    weight = unpack_linear(loaded, GPTQConfig(4, sym=False), mine.cls).dequantize()  # [8 outputs, 8 inputs]
    by_hand = {
        0: [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5],  # 0.5 * (level - 8)
        1: [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],  # 1.0 * (level - 8)
        2: [-2.0] * 8,  # 2.0 * (0 - 1)
        3: [0.0] * 8,  # 0.25 * (1 - 1)
        5: [0.0] * 8,  # 8 - 8
        7: [0.0] * 8,  # 15 - 15
    }
    for output, wanted in by_hand.items():
        assert weight[output].tolist() == wanted, (
            f"output {output} has the weights {weight[output].tolist()}, expected {wanted}: scale * (level - zero)"
        )


@check("property", spec="R7.13", hint=2)
def everything_comes_back(mine: Mine) -> None:
    """Levels and zero points of 2, 4 and 8 bits, of any size, survive packing."""
    for seed in range(60):
        generator, bits, offset = torch.Generator().manual_seed(seed), (4, 2, 8)[seed % 3], seed // 3 % 2
        packing, rows, columns = mine.cls(bits, offset), 32 // bits * (1 + seed % 5), 1 + seed // 4
        levels = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
        packed, case = packing.pack_rows(levels), f"{bits} bits, uint8 levels [{rows}, {columns}]"
        wanted = Packing(bits).pack_rows(levels)
        kind = f"{packed.dtype} {list(packed.shape)}"
        assert kind == f"torch.int32 {list(wanted.shape)}", (
            f"{case}: the words are {kind}, expected torch.int32 {list(wanted.shape)}"
        )
        assert torch.equal(packed, wanted), (
            f"{case}: the first column {levels[:, 0].tolist()} became {hexadecimal(packed[:, 0])}, expected "
            f"{hexadecimal(wanted[:, 0])}: a shift of a uint8 loses all bits above its eight"
        )
        back = packing.unpack_rows(packed)
        assert torch.equal(back, levels), (
            f"{case}: the first column was {levels[:, 0].tolist()}, and {back[:, 0].tolist()} came back"
        )
        zeros = torch.randint(offset, 2**bits + offset, (columns, rows), generator=generator, dtype=torch.int32)
        if offset:
            zeros = zeros.clamp(max=2**bits - 1)  # no tool writes a zero of 16
        read = packing.unpack_zeros(packing.pack_zeros(zeros))
        assert torch.equal(read, zeros), (
            f"{bits} bits, zero_offset {offset}: the zero points were {zeros[0].tolist()}, and {read[0].tolist()} came "
            "back"
        )


@check("engine", spec="R7.15", hint=3)
def the_same_checkpoint_and_tokens(mine: Mine) -> None:
    """The quantiser writes the same checkpoint with your packing, and the engine generates the same tokens from it."""
    settings = GPTQConfig(4, 32, sym=False)
    with tempfile.TemporaryDirectory(prefix="folovllm-learn-") as folder:
        theirs, own = Path(folder, "theirs"), Path(folder, "own")
        for out, parts in ((theirs, {}), (own, dict(mine.parts))):
            quantize_checkpoint(Path(tiny_model()), out, QuantizeSettings(settings, "rtn", parts=parts), progress=False)
        for file in sorted(theirs.glob("*.safetensors")):
            own_tensors = load_file(own / file.name)
            different = [name for name, t in load_file(file).items() if not torch.equal(own_tensors[name], t)]
            assert not different, f"{different[0]} of the checkpoint is not what the engine's own packing writes"
        wanted, found = tokens(theirs, {}), tokens(theirs, mine.parts)
        assert found == wanted, (
            f"from the engine's own 4-bit checkpoint your packing generates {found}, and its own {wanted}: levels or "
            "zeros are read wrongly when a model is loaded"
        )


def tokens(folder: Path, parts: Any) -> list[int]:
    from folovllm.entrypoints.llm import LLM
    from folovllm.sampling_params import SamplingParams

    llm = LLM(str(folder), preset="m7", without=["m4"], dtype="float32", device="cpu", max_model_len=64,
              num_kv_blocks=40, gptq_kernel="dequant", skip_tokenizer_init=True, parts=dict(parts))  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": [11, 7, 23, 5]}], params, use_tqdm=False)[0].outputs[0].token_ids
