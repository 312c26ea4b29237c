"""Log-probabilities of one request, from the sampler's lists to the dicts that users get.

Milestone: M1. vLLM counterpart: vllm/v1/engine/logprobs.py.
Left out: joining characters that span tokens in `decoded_token` (each token is decoded by itself).
"""

from folovllm.engine.tokenizer import Tokenizer
from folovllm.outputs import Logprob, LogprobsOnePosition, TokenLogprobs
from folovllm.sampling_params import SamplingParams


class LogprobsProcessor:
    """Collects sample and prompt logprobs. `tokenizer` None leaves `decoded_token` None."""

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams) -> None:
        self._tokenizer = tokenizer if params.detokenize else None
        self.logprobs: list[LogprobsOnePosition] | None = None if params.logprobs is None else []
        self.cumulative_logprob: float | None = None if params.logprobs is None else 0.0
        self.prompt_logprobs: list[LogprobsOnePosition | None] | None = None

    def add_sample(self, positions: list[TokenLogprobs] | None) -> None:
        if self.logprobs is None or self.cumulative_logprob is None:
            return
        for position in positions or ():
            self.logprobs.append(to_dict(position, self._tokenizer))
            self.cumulative_logprob += position.logprobs[0]

    def set_prompt(self, positions: list[TokenLogprobs] | None) -> None:
        """`positions[i]` belongs to prompt token i + 1: nothing precedes the first token, so its entry is None."""
        if positions is not None:
            self.prompt_logprobs = [None, *(to_dict(position, self._tokenizer) for position in positions)]


def to_dict(position: TokenLogprobs, tokenizer: Tokenizer | None) -> LogprobsOnePosition:
    """The token itself first, then the top k in order; k entries if the token is among them, else k + 1.

    E.g. ids [9, 4, 9], rank 2 -> {9: rank 2, 4: rank 1}.
    """
    entries = zip(position.token_ids, position.logprobs, range(len(position.token_ids)), strict=True)
    result: LogprobsOnePosition = {}
    for token_id, logprob, order in entries:
        # A top-k entry's rank is its place, which overwrites the token's own rank (that counts ties); a dict keeps the
        # token's place at the front.
        text = None if tokenizer is None else tokenizer.token_text(token_id)
        result[token_id] = Logprob(logprob, order or position.rank, text)
    return result
