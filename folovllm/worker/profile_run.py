"""Profile run: one step as large as any, to learn what activations need before the KV cache takes the rest.

Milestone: M3. vLLM counterpart: `GPUModelRunner.profile_run` in vllm/v1/worker/gpu_model_runner.py and
`Worker.determine_available_memory` in vllm/v1/worker/gpu_worker.py. vLLM leaves attention out of its profile run; ours
goes through the runner like any step, on a cache of its own.
"""

import torch

from folovllm.core.kv_cache_utils import KVCacheConfig, cdiv
from folovllm.core.sched.output import NewRequestData, SchedulerOutput
from folovllm.sampling_params import SamplingParams
from folovllm.worker.model_runner import ModelRunner


def profile_run(runner: ModelRunner) -> int:
    """Run the largest step that the scheduler may ask for; the bytes of the temporary cache, which is gone again."""
    config = runner.config
    lens = prompt_lens(config.max_num_batched_tokens, config.max_model_len - 1, config.max_num_seqs)
    num_blocks = [cdiv(length, config.block_size) for length in lens]
    runner.initialize_kv_cache(KVCacheConfig(1 + sum(num_blocks), config.block_size, bytes_per_block=0))
    cache_bytes = runner.kv_caches.numel() * runner.kv_caches.element_size()
    step = largest_step(lens, num_blocks)
    runner.sample(runner.execute(step))
    runner.execute(SchedulerOutput([], [], {}, 0, frozenset(), finished_req_ids=frozenset(step.num_scheduled_tokens)))
    runner.kv_caches = torch.empty(0)
    for layer in runner.model.attention_layers():
        layer.bind(runner.backend, runner.kv_caches)
    return cache_bytes


def prompt_lens(token_budget: int, longest: int, max_num_reqs: int) -> list[int]:
    """Lengths of at most `max_num_reqs` prompts that use up a budget. E.g. 10 tokens, 4 at most each -> [4, 4, 2]."""
    lens = [longest] * min(token_budget // longest, max_num_reqs)
    rest = min(token_budget - sum(lens), longest)
    return [*lens, rest] if rest and len(lens) < max_num_reqs else lens


def largest_step(lens: list[int], num_blocks: list[int]) -> SchedulerOutput:
    """A step that admits prompts of these lengths at once and samples for each."""
    block_ids = iter(range(1, 1 + sum(num_blocks)))  # 0 is the null block
    params = SamplingParams(temperature=1.0, top_p=0.9)  # the sampler's most expensive path
    requests = [
        NewRequestData(
            request_id=f"profile-{i}",
            prompt_token_ids=[0] * length,
            sampling_params=params,
            eos_token_id=None,
            seed=0,
            bad_words_token_ids=[],
            block_ids=([next(block_ids) for _ in range(n)],),
            num_computed_tokens=0,
        )
        for i, (length, n) in enumerate(zip(lens, num_blocks, strict=True))
    ]
    scheduled = {request.request_id: len(request.prompt_token_ids) for request in requests}
    return SchedulerOutput(requests, [], scheduled, sum(lens), frozenset(scheduled), frozenset())
