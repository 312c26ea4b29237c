"""What `folovllm demo` finds out: our answers, and how each compares with HuggingFace's.

Milestone: M1. vLLM counterpart: none. Plain data, made by `demo.py` and shown by `demo_board.py`.
"""

from dataclasses import dataclass

TIE = 1e-3  # if HuggingFace's two best logits are this close, either token is right


@dataclass(frozen=True)
class Answers:
    """What our engine did: the tokens, how long all of them took together, and the most that the KV cache held."""

    prompt_token_ids: list[list[int]]
    token_ids: list[list[int]]
    seconds: float
    peak_used_slots: int
    peak_reserved_slots: int


@dataclass(frozen=True)
class Verdict:
    """The comparison of one prompt: equal, or where the first difference is and how sure HuggingFace was there."""

    first_difference: int | None = None
    gap: float = 0.0

    @property
    def is_wrong(self) -> bool:
        return self.first_difference is not None and self.gap > TIE

    def __str__(self) -> str:
        if self.first_difference is None:
            return "yes"
        return f"no (first difference at token {self.first_difference}, HF's top-two gap {self.gap:.2g})"


def first_difference(mine: list[int], other: list[int]) -> int | None:
    """Returns the index of the first token that differs, or None if the lists are equal.

    A list that ends early differs at its end. E.g., [5, 6, 7] and [5, 9] -> 1;  [5, 6] and [5, 6, 7] -> 2
    """
    pairs = zip(mine, other, strict=False)
    shorter = min(len(mine), len(other))
    different = next((index for index, (a, b) in enumerate(pairs) if a != b), shorter)
    return None if different == len(mine) == len(other) else different
