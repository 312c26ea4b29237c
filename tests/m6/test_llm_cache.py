"""Prefix caching on real tensors: tiny models, every backend of this machine, and what `LLM` shows of it.

The oracle is `generate_naive`'s model, which has no cache at all.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.attention.backend import AttentionBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from tests.m6.cache_helpers import INDEXES
from tests.parity_helpers import GapNaiveModel, Job, make_engine, make_job, run_jobs

pytestmark = pytest.mark.m6

# Prompts of one seed begin alike: 40 tokens twice, 33 of them, 20 of them and on in another way.
SHAPES = [(40, 8), (40, 8), (33, 10), (40, 3), (20, 8)]
CACHED = {"max_model_len": 64, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def jobs(tiny_model_dir: Callable[[str], Path]) -> list[Job]:
    model = GapNaiveModel(tiny_model_dir("llama"))
    return [make_job(model, length, num_tokens, seed=0) for length, num_tokens in SHAPES]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("backend", ["torch_naive", "torch_sdpa", "torch_flash"])
def test_cold_warm_and_copied(
    backend: str, index: str, partial: bool, jobs: list[Job], tiny_model_dir: Callable[[str], Path]
) -> None:
    """The second round finds everything but the last tokens; chunks end inside blocks."""
    engine = make_engine(
        tiny_model_dir("llama"), block_size=5, attention_backend=backend, prefix_index=index,
        partial_block_hits=partial, max_num_batched_tokens=17, enable_chunked_prefill=True, **CACHED,
    )  # fmt: skip
    hits = []
    for _ in range(2):
        assert run_jobs(engine, jobs) == [job.tokens for job in jobs]
        hits.append(engine.stats().prefix_cache_hits)
    assert hits[0] >= 80 and hits[1] - hits[0] >= 35 + 35 + 30 + 35 + 15


@pytest.mark.parametrize("args", [{"num_kv_blocks": 14}, {"block_size": "max_model_len"}], ids=["evicting", "one page"])
def test_a_small_pool_and_a_page_for_all(
    args: dict[str, Any], jobs: list[Job], tiny_model_dir: Callable[[str], Path]
) -> None:
    engine = make_engine(tiny_model_dir("llama"), **(CACHED | {"block_size": 5, "partial_block_hits": True} | args))
    for _ in range(2):
        assert run_jobs(engine, jobs) == [job.tokens for job in jobs]
    assert (engine.stats().prefix_cache_hits > 0) == ("num_kv_blocks" in args), "a page is never full while it counts"


def test_copies_run_before_anything_is_written(
    jobs: list[Job], tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noting(name: str) -> Callable[..., None]:
        real = getattr(TorchNaiveBackend, name)

        def method(self: AttentionBackend, *args: Any) -> None:
            calls.append(name)
            real(self, *args)

        return method

    for name in ("write", "copy_blocks", "prepare"):
        monkeypatch.setattr(TorchNaiveBackend, name, noting(name))
    engine = make_engine(
        tiny_model_dir("llama"), block_size=5, attention_backend="torch_naive", partial_block_hits=True, **CACHED
    )
    run_jobs(engine, jobs[:1])
    calls.clear()
    run_jobs(engine, jobs[2:3])
    assert calls[:3] == ["copy_blocks", "prepare", "write"] and calls.count("copy_blocks") == 1


def test_what_the_user_sees(tiny_model_dir: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(
        str(tiny_model_dir("llama")), max_model_len=64, block_size=4, num_kv_blocks=40, enable_prefix_caching=True
    )
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(3, 33))}
    cold, warm, salted = (
        llm.generate(p, params, use_tqdm=True)[0] for p in (prompt, prompt, prompt | {"cache_salt": "another user"})
    )
    assert (cold.num_cached_tokens, warm.num_cached_tokens, salted.num_cached_tokens) == (0, 28, 0)
    assert cold.outputs[0].token_ids == warm.outputs[0].token_ids == salted.outputs[0].token_ids
    stats = llm.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (90, 28)
    assert "prefix hits 31%" in capsys.readouterr().err
    stream = llm.stream(prompt, params)
    next(stream)
    assert not llm.reset_prefix_cache(), "a request runs"
    assert llm.reset_prefix_cache(reset_running_requests=True)
    assert len(list(stream)) == 3, "it goes on all the same"
    assert llm.reset_prefix_cache()
    assert llm.generate(prompt, params, use_tqdm=False)[0].num_cached_tokens == 0
