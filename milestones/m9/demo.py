"""Milestone M9 without weights: a pair of matrices on three ranks, what each rank holds, and two steps in flight.
All parts but the model are the engine's own. The ranks are threads. Run: python milestones/m9/demo.py"""

import torch

from folovllm.communication_plan import CommunicationPlan
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.thread_communicator import Communicator, run_ranks
from folovllm.executor.fake import fake_tokens
from folovllm.executor.fake_pipeline import FakePipeline, FakeStep
from folovllm.learn.toy_engine import make_core, make_request
from folovllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from folovllm.model_shapes import shape_architecture
from folovllm.parallel import ParallelConfig


def a_pair_of_matrices() -> None:
    torch.manual_seed(0)
    up, down, x = torch.randn(12, 4), torch.randn(4, 12), torch.randn(2, 4)

    def one_rank(tp: Communicator) -> tuple[torch.Tensor, dict[str, int]]:
        first, second = ColumnParallelLinear(4, 12, tp=tp), RowParallelLinear(12, 4, tp=tp)
        for layer, weight in ((first, up), (second, down)):
            layer.weight_loader(layer.weight, weight)
        return second(torch.relu(first(x))), tp.counts.calls

    whole, ranks = torch.relu(x @ up.T) @ down.T, run_ranks(3, one_rank)
    worst = max((result - whole).abs().max().item() for result, _ in ranks)
    print(f"column, then row: {len(ranks)} ranks, calls {ranks[0][1]}, within {worst:.0e} of one rank")
    assert worst < 1e-5 and all(calls == {"all_reduce": 1} for _, calls in ranks), "one exchange for two matrices"


def what_each_rank_holds() -> None:
    arch, config = shape_architecture("tiny"), ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    for shard in map(config.shard, range(config.world_size)):
        mine, calls = shard.attention_arch(arch), CommunicationPlan(arch, shard).calls(1)
        heads = f"{mine.num_attention_heads} query heads, {mine.num_key_value_heads} KV head"
        print(f"stage {shard.pp_rank}, part {shard.tp_rank}:  {mine.num_hidden_layers} layer, {heads}, calls {calls}")
    calls = CommunicationPlan(arch, ParallelConfig(tensor_parallel_size=2).shard(0)).calls(1)
    assert calls["all_reduce"] == 2 * arch.num_hidden_layers + 1, "two per layer, and the embedding's"


def two_steps_in_flight() -> None:
    class Watched(FakePipeline):
        def execute(self, scheduler_output: SchedulerOutput) -> FakeStep:
            started.append("".join(scheduler_output.num_scheduled_tokens))
            return super().execute(scheduler_output)

    started, core = list[str](), make_core(Watched(2), pipeline_parallel_size=2)
    for request in (requests := [make_request(name, prompt=3, max_tokens=3) for name in "abcd"]):
        core.add_request(request)
    while core.has_unfinished_requests():
        core.step()
    print(f"two stages:       steps of {', '.join(started)}")
    assert started == ["ab", "cd"] * 3, "two groups take turns"
    assert [r.output_token_ids for r in requests] == [fake_tokens(r.prompt_token_ids, 3) for r in requests]


for scene in (a_pair_of_matrices, what_each_rank_holds, two_steps_in_flight):
    scene()
