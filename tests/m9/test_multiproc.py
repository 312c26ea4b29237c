"""MultiprocExecutor with echo processes: it does what one process does."""

import copy
import os
import sys
import threading
from pathlib import Path

import pytest

from folovllm.engine.core import EngineCore
from folovllm.executor import multiproc
from folovllm.executor.multiproc import MultiprocExecutor
from folovllm.executor.ranks import in_step
from folovllm.parallel import ParallelConfig
from tests.m9.multiproc_helpers import (
    TIMEOUT,
    descriptors,
    echo_config,
    echo_core,
    echo_executor,
    nothing_left_behind,
    oracle,
    process_ids,
    request,
    run,
)

pytestmark = pytest.mark.m9


def test_ranks_compute_what_one_process_computes():
    with echo_core(tp=2, pp=2) as core:
        assert len(set(process_ids(core)) | {os.getpid()}) == 5
        assert run(core, *[request(f"r{i}", 20) for i in range(8)]) == {f"r{i}": oracle(f"r{i}", 20) for i in range(8)}
        assert core.executor.available_kv_cache_bytes() == 2**30  # that of the rank that has least
        facts = core.executor.describe()
        assert facts["rank"] == 0 and facts["process"] == process_ids(core)[0]
        assert facts["processes"] == "2 x 2 ranks (tensor x pipeline parallel), gloo"


def test_several_steps_may_be_in_flight(tmp_path):
    """`execute` does not wait for the ranks. An answer that is discarded does not disturb the next ones."""
    gate = tmp_path / "gate"
    gate.touch()
    with echo_core(gate, tp=1, pp=2) as core:
        outputs = []
        for name in ("wait", "b", "c"):  # each schedule() admits the request that has come since the last one
            core.add_request(request(name))
            outputs.append(core.scheduler.schedule())
        handles = [core.executor.execute(output) for output in outputs]
        gate.unlink()
        core.executor.discard(handles[0])
        assert core.executor.sample(handles[1]).sampled_token_ids["b"] == oracle("b")[:1]
        assert core.executor.sample(handles[2]).sampled_token_ids["c"] == oracle("c")[:1]


def test_a_message_may_be_longer_than_the_ring():
    """The ring holds 1 MiB. The prompt of a long request does not fit into it."""
    length = 600_000
    with echo_core(
        max_model_len=length + 100, block_size=4096, num_kv_blocks=200, max_num_batched_tokens=10**6
    ) as core:
        long = request("long")
        long = type(long)("long", [i % 390 for i in range(length)], long.sampling_params)
        tokens = run(core, long, request("short"))
        assert tokens["short"] == oracle("short") and len(tokens["long"]) == 6


def test_what_a_rank_refuses_is_the_users_error():
    with nothing_left_behind():
        executor = echo_executor(config := echo_config(num_kv_blocks=13, max_model_len=16))
        with pytest.raises(ValueError, match="13 blocks") as caught:
            EngineCore(config, executor)
        assert str(caught.value) == "13 blocks do not fit: lower num_kv_blocks"
        assert "in rank 1:\nTraceback" in caught.value.__notes__[0]
        executor.shutdown()


def test_an_interrupted_step_is_undone_and_its_late_answer_is_dropped(tmp_path, monkeypatch):
    """A second Ctrl-C ends the wait, and not the step: the ranks finish it before they see the next one."""
    gate = tmp_path / "gate"
    with echo_core(gate) as core:
        others = [request("r1", 20), request("r2", 20)]
        for one in others:
            core.add_request(one)
        core.step()
        gate.touch()
        core.add_request(request("wait", 20))
        with monkeypatch.context() as patch:
            patch.setattr(core.executor, "_receive", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                core.step(blamed=["wait"])
        gate.unlink()
        while core.has_unfinished_requests():
            core.step()
        assert [one.output_token_ids for one in others] == [oracle("r1", 20), oracle("r2", 20)]


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_two_engines_do_not_disturb_each_other():
    with echo_core() as one, echo_core() as other:
        assert not set(process_ids(one)) & set(process_ids(other))
        results: dict[int, object] = {}
        cores = {0: one, 1: other}
        threads = [
            threading.Thread(target=lambda i=i: results.update({i: run(cores[i], request(f"r{i}", 50))}), daemon=True)
            for i in cores
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
        assert results == {i: {f"r{i}": oracle(f"r{i}", 50)} for i in cores}


def test_an_executor_that_is_forgotten_ends_its_ranks():
    """E.g. in a notebook whose cell is run again."""
    with nothing_left_behind():
        executor = echo_executor(echo_config())
        ids = executor.process_ids
        del executor
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ids)


def test_a_forked_child_does_not_end_the_ranks_of_its_parent():
    with echo_core() as core:
        child = os.fork()
        if child == 0:
            core.executor.shutdown()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert run(core, request("r")) == {"r": oracle("r")}


def test_the_threads_of_this_process_are_divided(monkeypatch):
    from folovllm import platforms
    from folovllm.cpus import CpuCount

    monkeypatch.setattr(platforms, "default_threads", lambda: CpuCount(7, "a test"))
    assert multiproc._threads_per_rank(echo_config(tp=3)) == 2
    assert multiproc._threads_per_rank(echo_config(tp=8)) == 1


def test_ranks_are_in_step_if_their_calls_meet():
    parallel = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3)
    first = {"tp": {"all_reduce": 9}, "pp": {"send": 4}}
    middle = {"tp": {"all_reduce": 8}, "pp": {"send": 4, "receive": 4}}
    last = {"tp": {"all_reduce": 7, "all_gather": 2}, "pp": {"receive": 4}}
    stages = [first, first, middle, middle, last, last]
    assert in_step(parallel, stages)
    for rank, calls in enumerate(stages):
        for group, counts in calls.items():
            for operation in counts:
                ahead = [copy.deepcopy(other) for other in stages]
                ahead[rank][group][operation] += 1
                assert not in_step(parallel, ahead), (rank, group, operation)


def test_the_ranks_find_the_modules_of_this_process(tmp_path, monkeypatch):
    """Also if `sys.path` was changed, as in a notebook; and a file here does not take the place of a module."""
    (tmp_path / "my_ranks.py").write_text("from tests.m9.echo_worker import make_echo\n")
    (tmp_path / "queue.py").write_text("raise SystemExit('the wrong module')\n")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "path"
    folder.mkdir()
    (tmp_path / "my_ranks.py").rename(folder / "my_ranks.py")
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    with nothing_left_behind():
        executor = MultiprocExecutor(echo_config(), Path("unused"), "my_ranks:make_echo")
        executor.shutdown()


def test_each_engine_closes_its_descriptors():
    before = descriptors()
    for _ in range(3):
        with echo_core() as core:
            run(core, request("r"))
    assert descriptors() == before
