"""The sampler on a GPU: the tokens of a CPU in fp32, and no wait but the one for the results (R4.58).

Milestone: M4. Skipped where there is no GPU. The noise is the same on both but for the last bit of a logarithm, and
softmax but for the order of a sum, so a row may differ if two tokens are equally likely up to 1e-6: 1 in 100 is allowed
to, and none does if nothing is wrong.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from folovllm.outputs import TokenLogprobs
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.sampler import LOGPROBS_MODES, LogprobsMode, Sampler, SamplerBackend, SamplerOutput
from folovllm.sampling_params import SamplingParams
from tests.gpu_waits import only_to_host_waits
from tests.m4.test_sampler_shortlist import make_logits

pytestmark = [
    pytest.mark.m4,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

KINDS = ["normal", "flat", "peaked", "ties", "bf16", "masked", "two values"]
NUM_ROWS, VOCAB_SIZE = 280, 49_152
BATCHES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0.0}],
    "temperature": [{"temperature": 0.8}],
    "top_k": [{"top_k": 50}],
    "top_p": [{"top_p": 0.9}],
    "min_p": [{"min_p": 0.05}],
    "mixed": [
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "logprobs": 3},
        {},
        {"temperature": 0.0, "logprobs": 0},
        {"top_k": 1000, "repetition_penalty": 1.2, "presence_penalty": 0.3},
        {"logit_bias": {7: 3.0, 11: -2.0}, "allowed_token_ids": list(range(5000))},
        {"min_tokens": 5, "logprobs": 20},
    ],
}


@pytest.fixture
def no_other_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with only_to_host_waits(monkeypatch):
        yield


def logits_of(num_rows: int, vocab_size: int) -> torch.Tensor:
    """Rows of every kind, one after another, on the host. `[num_rows, vocab_size]` float32"""
    return torch.cat([make_logits(KINDS[i % len(KINDS)], 1, vocab_size, i) for i in range(num_rows)])


def rows_of(name: str, num_rows: int) -> list[SamplingRow]:
    batch = BATCHES[name]
    params = [SamplingParams(**batch[i % len(batch)]) for i in range(num_rows)]
    return [SamplingRow(p, [3, 4], [5, 5], 2, seed, [[6], [5, 8]]) for seed, p in enumerate(params)]


def sample(sampler: Sampler, logits: torch.Tensor, rows: list[SamplingRow]) -> SamplerOutput:
    return sampler(logits, SamplingMetadata.build(rows, logits.shape[-1], logits.device))


def make_sampler(backend: SamplerBackend, mode: LogprobsMode = "raw_logprobs") -> Sampler:
    sampler = Sampler(mode)
    sampler.use_backend(backend)
    return sampler


def agree(ours: TokenLogprobs | None, theirs: TokenLogprobs | None) -> bool:
    """The values, not the ids: among the most likely, those that differ by rounding may be in either order."""
    if ours is None or theirs is None:
        return ours is theirs
    return ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("backend", ["torch", "shortlist"])
@pytest.mark.parametrize("name", BATCHES)
def test_ids_and_logprobs_are_those_of_a_cpu(name: str, backend: SamplerBackend) -> None:
    logits, rows = logits_of(NUM_ROWS, VOCAB_SIZE), rows_of(name, NUM_ROWS)
    expected = sample(make_sampler(backend), logits, rows)
    got = sample(make_sampler(backend), logits.cuda(), rows)
    differ = [i for i in range(NUM_ROWS) if got.sampled_token_ids[i] != expected.sampled_token_ids[i]]
    assert len(differ) <= (0 if name == "greedy" else NUM_ROWS // 100), differ
    for i, pair in enumerate(zip(got.logprobs, expected.logprobs, strict=True)):
        assert i in differ or agree(*pair), i


@pytest.mark.parametrize("backend", ["torch", "shortlist"])
def test_what_a_row_gets_does_not_depend_on_the_others(backend: SamplerBackend) -> None:
    """Up to the order in which a kernel sums a row, which the shape of a batch may change."""
    logits, rows = logits_of(NUM_ROWS, VOCAB_SIZE).cuda(), rows_of("mixed", NUM_ROWS)
    together = sample(make_sampler(backend), logits, rows).sampled_token_ids
    alone = [sample(make_sampler(backend), logits[i : i + 1], rows[i : i + 1]).sampled_token_ids[0] for i in range(60)]
    assert sum(a != b for a, b in zip(alone, together[:60], strict=True)) <= 1


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
@pytest.mark.parametrize("backend", ["torch", "shortlist"])
@pytest.mark.parametrize("name", BATCHES)
def test_nothing_but_to_host_waits(
    name: str, backend: SamplerBackend, mode: LogprobsMode, no_other_waits: None
) -> None:
    """Flat rows, too: what is drawn again waits no further."""
    torch.cuda.set_sync_debug_mode("default")
    logits, rows = logits_of(28, 4096).cuda(), rows_of(name, 28)
    sample(make_sampler(backend, mode), logits, rows)  # what is made at the first use may wait
    torch.cuda.set_sync_debug_mode("error")
    output = sample(make_sampler(backend, mode), logits, rows)
    assert min(output.sampled_token_ids) >= 0


def test_a_wait_is_an_error_here(no_other_waits: None) -> None:
    """Or the test above would show nothing."""
    torch.cuda.set_sync_debug_mode("default")
    values = torch.ones(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        values.nonzero()
