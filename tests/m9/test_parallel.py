"""Which part of a model a rank computes, and how many ranks there are."""

import pytest

from folovllm.model_shapes import shape_architecture
from folovllm.parallel import WHOLE_MODEL, ModelShard, ParallelConfig

pytestmark = pytest.mark.m9


@pytest.mark.parametrize(("num_layers", "pp_size"), [(6, 4), (30, 2), (30, 4), (3, 3), (5, 4), (80, 7), (1, 1)])
def test_stages_hold_every_layer_once(num_layers: int, pp_size: int) -> None:
    """In order, as equal as possible; the first and the last stage, which have more to do, are not the longest."""
    stages = [ModelShard(pp_rank=rank, pp_size=pp_size).layers(num_layers) for rank in range(pp_size)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert max(sizes) - min(sizes) <= 1 and sizes[-1] == min(sizes) and sizes[:-1] == sorted(sizes[:-1])


def test_the_example_of_the_docstring() -> None:
    assert [len(ModelShard(pp_rank=rank, pp_size=4).layers(6)) for rank in range(4)] == [1, 2, 2, 1]


@pytest.mark.parametrize(("total", "tp_size", "wanted"), [(8, 1, 8), (8, 4, 2), (3, 3, 1), (2, 4, 1), (1, 8, 1)])
def test_kv_heads_of_a_rank(total: int, tp_size: int, wanted: int) -> None:
    assert {ModelShard(rank, tp_size).num_kv_heads(total) for rank in range(tp_size)} == {wanted}


def test_the_attention_of_a_rank_has_its_heads_and_layers() -> None:
    arch = shape_architecture("smollm2-135m")
    mine = ModelShard(tp_rank=1, tp_size=3, pp_rank=1, pp_size=2).attention_arch(arch)
    assert (mine.num_attention_heads, mine.num_key_value_heads, mine.num_hidden_layers) == (3, 1, 15)
    assert (mine.hidden_size, mine.head_dim) == (arch.hidden_size, arch.head_dim)
    assert mine.kv_bytes_per_token(2) * 6 == arch.kv_bytes_per_token(2)
    assert WHOLE_MODEL.attention_arch(arch) == arch


def test_ranks_count_through_the_stages() -> None:
    config = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    places = [(shard.pp_rank, shard.tp_rank) for shard in map(config.shard, range(config.world_size))]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert config.executor_backend == "mp" and ParallelConfig().executor_backend == "uni"


def test_one_process_cannot_be_several_ranks() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=2 x pipeline_parallel_size=1 are 2: use 'mp' or 'ray'"):
        ParallelConfig(tensor_parallel_size=2, distributed_executor_backend="uni")
