"""A tiny Llama that has learned a few answers by heart, for notebooks and examples without weights.

Milestone: M1. vLLM counterpart: none. Left out: everything else that a language model knows.

Its vocabulary has a token for each given piece of text and one for each byte. The three requests of the pages therefore
have as many tokens as for SmolLM2, and any other text can be encoded, too. It has two layers and is trained in about a
second. The engine loads its folder like that of any other model. (`learn.defaults.tiny_model` has random weights and no
tokenizer, and needs no training.)

    folder = write_tiny_model(Path(scratch), [(("The", " sky", " is"), (" blue", "."))])
    LLM(str(folder), dtype="float32").generate("The sky is", params)      # " blue."

Imports torch and transformers inside the functions only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Pieces = Sequence[str]  # the tokens of a text
TRAINING_STEPS, LEARNING_RATE = 60, 3e-3
END = "<|endoftext|>"
MAX_LENGTH = 512  # tokens; the rotary embedding goes no further
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": True,
}


def write_tiny_model(folder: Path, lessons: Sequence[tuple[Pieces, Pieces]]) -> Path:
    """Trains the model on prompts with their answers and writes it to `folder`, with its tokenizer. Returns that."""
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    tokenizer = _make_tokenizer(lessons)
    _train(tokenizer, lessons).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if shows_progress:
        logging.enable_progress_bar()
    return folder


def _make_tokenizer(lessons: Sequence[tuple[Pieces, Pieces]]) -> Any:
    """Byte-level BPE that is trained on the pieces until each of them is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,  # more than there is to merge
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    pieces = dict.fromkeys(piece for prompt, answer in lessons for piece in (*prompt, *answer))
    tokenizer.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=MAX_LENGTH
    )


def _train(tokenizer: Any, lessons: Sequence[tuple[Pieces, Pieces]]) -> Any:
    """Returns the model. Only answers are learned, because two prompts may begin alike and go on differently."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    texts = [tokenizer.encode("".join(prompt)) for prompt, _ in lessons]
    answers = [[tokenizer.encode(piece)[0] for piece in answer] for _, answer in lessons]
    length = max(len(text) + len(answer) for text, answer in zip(texts, answers, strict=True))
    input_ids = torch.full((len(texts), length), tokenizer.pad_token_id)  # [num_requests, length]
    labels = torch.full_like(input_ids, -100)  # [num_requests, length]; -100: not learned
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        input_ids[row, : len(text) + len(answer)] = torch.tensor(text + answer)
        labels[row, len(text) : len(text) + len(answer)] = torch.tensor(answer)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, **SHAPE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    for _ in range(TRAINING_STEPS):
        optimizer.zero_grad()
        model(input_ids=input_ids, labels=labels).loss.backward()  # padding is on the right, where no token looks
        optimizer.step()
    return model.eval()
