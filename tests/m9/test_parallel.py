"""Which layers and KV heads a rank has. What is refused: test_parallel_config.py."""

import pytest

from folovllm.parallel import ModelShard, ParallelConfig

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


def test_one_process_cannot_be_several_ranks() -> None:
    assert [ParallelConfig(size).executor_backend for size in (1, 2)] == ["uni", "mp"]
    with pytest.raises(ValueError, match="tensor_parallel_size=2 x pipeline_parallel_size=1 are 2: use 'mp' or 'ray'"):
        ParallelConfig(tensor_parallel_size=2, distributed_executor_backend="uni")
