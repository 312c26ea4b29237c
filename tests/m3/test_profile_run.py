"""The profile run: as large as any step, and without a trace afterwards."""

import pytest

from folovllm import LLM, SamplingParams
from folovllm.worker.profile_run import largest_step, profile_run, prompt_lens

pytestmark = pytest.mark.m3


@pytest.mark.parametrize(
    ("budget", "longest", "max_num_reqs", "lens"),
    [(10, 4, 8, [4, 4, 2]), (10, 4, 2, [4, 4]), (3, 8, 2, [3]), (8, 4, 2, [4, 4]), (8, 4, 8, [4, 4])],
)
def test_prompts_use_up_the_budget(budget, longest, max_num_reqs, lens):
    assert prompt_lens(budget, longest, max_num_reqs) == lens


def test_the_largest_step_gives_every_prompt_its_own_blocks():
    step = largest_step([5, 3], [2, 1])
    assert [request.block_ids for request in step.scheduled_new_reqs] == [([1, 2],), ([3],)]
    assert step.num_scheduled_tokens == {"profile-0": 5, "profile-1": 3} and step.total_num_scheduled_tokens == 8
    assert step.sampling_req_ids == {"profile-0", "profile-1"}


def test_it_runs_a_full_step_and_leaves_nothing_behind(tiny_model_dir, monkeypatch):
    llm = LLM(str(tiny_model_dir("qwen3")), preset="m3", max_model_len=64, max_num_batched_tokens=100, max_num_seqs=4)
    prompts, params = [[5, 6, 7], [9] * 20], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    before = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    engine_core = llm.llm_engine.engine_core
    runner = engine_core.executor.worker.model_runner
    num_tokens = []
    forward = runner.model.forward
    monkeypatch.setattr(runner.model, "forward", lambda ids, pos: num_tokens.append(len(ids)) or forward(ids, pos))
    cache_bytes = profile_run(runner)
    assert num_tokens == [100]
    per_block = engine_core.kv_cache_config.bytes_per_block
    assert cache_bytes == (1 + 4 + 3) * per_block, "63 tokens in 4 blocks, 37 in 3, and the null block"
    assert not [request_id for request_id in runner.requests if request_id.startswith("profile")]
    assert not runner.batch.num_reqs and runner.kv_caches.numel() == 0

    runner.initialize_kv_cache(engine_core.kv_cache_config)
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)] == before
