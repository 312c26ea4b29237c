"""Two tiny tokenizers made on the spot: byte-level (as in SmolLM2, Llama 3, Qwen) and byte-fallback (Mistral)."""

from functools import lru_cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from folovllm.engine.tokenizer import Tokenizer

EOS = "<|end|>"
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then the dog sleeps in the sun",
    "你好世界,你好,世界你好 😀😀😃 naïve café São Paulo ελληνικά русский текст",
    "  spaces   and\nnew lines\tand tabs, the end. Paris is the capital of France.",
]


@lru_cache
def byte_level() -> Tokenizer:
    """Ids 0..2 are special; its merges also join bytes across characters, as real vocabularies do."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[EOS, "<|user|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend, {"eos_token": EOS})


@lru_cache
def byte_fallback() -> Tokenizer:
    """Llama 2's scheme: "▁" is a space, `<0xE4>` pieces for what has no token, decoding strips the first space."""
    words = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!", "th", "the", "▁the", "你"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[("t", "h"), ("th", "e"), ("▁", "the")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def byte_ids(data: bytes) -> list[int]:
    """One token per byte, of the byte-level tokenizer."""
    return [_byte_table()[byte] for byte in data]


@lru_cache
def _byte_table() -> list[int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters 256, 257, ... in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
    return [byte_level().backend.token_to_id(character) for character in characters]
