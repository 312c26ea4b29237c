"""The two communicators, of threads and of torch.distributed: one contract, the same tests."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from folovllm.distributed.communicator import SINGLE_RANK, Communicator
from folovllm.distributed.thread_communicator import ThreadGroup, run_ranks, thread_groups
from folovllm.distributed.torch_communicator import MAX_ON_THEIR_WAY, TorchCommunicator
from folovllm.model_executor.models.interface import IntermediateTensors
from folovllm.parallel import ParallelConfig
from folovllm.worker.pipeline_stage import PipelineStage

pytestmark = pytest.mark.m9

CPU = torch.device("cpu")
SHORT, LONG = 0.5, 60.0  # seconds
DTYPES = (torch.float32, torch.bfloat16)

Work = Callable[[Communicator], Any]


def run_gloo(size: int, work: Work, deadline: float = LONG) -> list[Any]:
    """`run_ranks` with process groups of gloo, whose ranks may as well be threads."""
    store, ends = dist.HashStore(), []  # an end that is dropped drops the tensors that are on their way

    def run(rank: int) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=deadline)
        group = dist.ProcessGroupGloo(store, rank, size, options)
        ends.append(end := TorchCommunicator(group, CPU))
        return work(end)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


RUNS: dict[str, Callable[..., list[Any]]] = {"threads": run_ranks, "gloo": run_gloo}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    return RUNS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3])
def test_all_reduce_adds_up_and_every_rank_has_the_same_bits(
    run: Callable[..., list[Any]], size: int, dtype: torch.dtype
) -> None:
    tensors = [torch.randn(5, 7, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(size)]
    results = run(size, lambda tp: tp.all_reduce(tensors[tp.rank].clone()))
    assert all(torch.equal(result, results[0]) and result.dtype is dtype for result in results)
    expected = torch.stack(tensors).double().sum(0)
    torch.testing.assert_close(results[0].double(), expected, atol=1e-6 if dtype is torch.float32 else 0.05, rtol=0)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_all_gather_joins_in_the_order_of_the_ranks(run: Callable[..., list[Any]], dim: int) -> None:
    tensors = [torch.full((2, 3), float(rank)) for rank in range(3)]
    results = run(3, lambda tp: tp.all_gather(tensors[tp.rank], dim))
    assert all(torch.equal(result, torch.cat(tensors, dim)) for result in results)


def test_tensors_that_are_not_contiguous(run: Callable[..., list[Any]]) -> None:
    whole = torch.arange(12.0).view(3, 4)
    summed, joined = zip(
        *run(2, lambda tp: (tp.all_reduce(whole.clone().t()), tp.all_gather(whole.t(), 0))), strict=True
    )
    assert all(torch.equal(result, 2 * whole.t()) for result in summed)
    assert all(torch.equal(result, torch.cat([whole.t(), whole.t()])) for result in joined)


def test_messages_arrive_in_order_and_a_send_does_not_wait(run: Callable[..., list[Any]]) -> None:
    """Rank 0 sends a whole batch ahead; what it does to a tensor's copy afterwards changes nothing."""
    count, sent = 8, threading.Event()

    def work(pp: Communicator) -> list[float]:
        if pp.rank == 0:
            for number in range(count):
                pp.send(torch.full((2, 3), float(number)), 1)
            sent.set()
            return []
        assert sent.wait(LONG), "the sender waits for the receiver"
        return [float(pp.receive((2, 3), torch.float32, 0)[1, 2]) for _ in range(count)]

    assert run(2, work)[1] == list(range(count))


def test_more_tensors_than_may_be_on_their_way(run: Callable[..., list[Any]]) -> None:
    count = MAX_ON_THEIR_WAY + 5

    def work(pp: Communicator) -> int:
        for number in range(count):
            if pp.rank == 0:
                pp.send(torch.tensor([number]), 1)
            else:
                assert pp.receive((1,), torch.int64, 0).item() == number
        return pp.counts.calls["receive" if pp.rank else "send"]

    assert run(2, work) == [count, count]


def test_calls_and_bytes_are_counted(run: Callable[..., list[Any]]) -> None:
    def work(end: Communicator) -> Any:
        end.all_reduce(torch.zeros(4, 3))
        end.all_reduce(torch.zeros(1, 3))
        end.all_gather(torch.zeros(2, dtype=torch.bfloat16))
        if end.rank == 0:
            end.send(torch.zeros(5), 1)
        else:
            end.receive((5,), torch.float32, 0)
        return end.counts.calls, end.counts.bytes

    for rank, (calls, num_bytes) in enumerate(run(2, work)):
        last = "receive" if rank else "send"
        assert calls == {"all_reduce": 2, "all_gather": 1, last: 1}
        assert num_bytes == {"all_reduce": 60, "all_gather": 4, last: 20}


@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "receive"])
def test_no_rank_waits_longer_than_the_deadline(run: Callable[..., list[Any]], operation: str) -> None:
    """Rank 1 stays away, and rank 0 is told so."""

    def work(end: Communicator) -> None:
        if end.rank == 1:
            return
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: end.all_reduce(torch.zeros(2)),
            "all_gather": lambda: end.all_gather(torch.zeros(2)),
            "receive": lambda: end.receive((2,), torch.float32, 1),
        }
        calls[operation]()

    with pytest.raises((TimeoutError, RuntimeError)):
        run(2, work, deadline=SHORT)


def test_a_rank_that_raises_frees_the_others() -> None:
    """Long before the deadline, and the caller gets the cause and not its consequence."""

    def work(tp: Communicator) -> None:
        if tp.rank == 1:
            raise ZeroDivisionError("the cause")
        tp.all_reduce(torch.zeros(1))

    with pytest.raises(ZeroDivisionError, match="the cause"):
        run_ranks(3, work, deadline=LONG)


def test_a_group_that_was_aborted_can_begin_anew() -> None:
    group = ThreadGroup(2, SHORT)
    ends = [group.communicator(rank) for rank in range(2)]
    ends[0].send(torch.zeros(1), 1)
    group.abort()
    for end in ends:
        with pytest.raises(TimeoutError, match=f"rank {end.rank} of 2 waited for the others in vain"):
            end.all_reduce(torch.zeros(1))
    group.renew()
    with pytest.raises(TimeoutError, match="waited for a tensor from rank 0 in vain"):
        ends[1].receive((1,), torch.float32, 0)  # what was on its way is gone
    with ThreadPoolExecutor(2) as threads:
        assert [t.item() for t in threads.map(lambda end: end.all_reduce(torch.ones(1)), ends)] == [2, 2]


def test_the_groups_of_two_parts_and_three_stages() -> None:
    """Part p of stage s is in the group of stage s, at place p, and in the group of part p, at place s."""
    groups = thread_groups(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3))
    assert [(g.shard.pp_rank, g.shard.tp_rank) for g in groups] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(g.tp.rank, g.tp.size, g.pp.rank, g.pp.size) for g in groups] == [
        (p, 2, s, 3) for s in range(3) for p in (0, 1)
    ]
    groups[1].pp.send(torch.ones(1), 1)  # from stage 0, part 1
    assert groups[3].pp.receive((1,), torch.float32, 0).item() == 1


def test_one_rank_has_nothing_to_say() -> None:
    (groups,) = thread_groups(ParallelConfig())
    assert groups.tp is SINGLE_RANK and groups.pp is SINGLE_RANK
    tensor = torch.ones(2)
    assert SINGLE_RANK.all_reduce(tensor) is tensor and SINGLE_RANK.all_gather(tensor) is tensor
    assert SINGLE_RANK.counts.calls == {}


@pytest.mark.parametrize("num_steps_sent", [0, 1, 2])
def test_a_stage_takes_of_the_skipped_steps_what_was_sent(num_steps_sent: int) -> None:
    """The stage before computes the first of two skipped steps, both, or neither; and later steps meet again."""
    first, last = thread_groups(ParallelConfig(1, 2), deadline=SHORT)
    stage = PipelineStage(last, hidden_size=4, dtype=torch.float32)
    for num_tokens in (3, 5):
        stage.skip(num_tokens)
    for num_tokens in (3, 5)[:num_steps_sent]:
        for _ in IntermediateTensors._fields:
            first.pp.send(torch.zeros(num_tokens, 4), 1)
    stage.catch_up(first.pp.counts.calls.get("send", 0))
    assert last.pp.counts.calls.get("receive", 0) == len(IntermediateTensors._fields) * num_steps_sent
    first.pp.send(torch.ones(2, 4), 1)
    stage.catch_up(first.pp.counts.calls["send"])  # of a step that was not skipped
    assert last.pp.receive((2, 4), torch.float32, 0).sum() == 8
