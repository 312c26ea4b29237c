"""The ranks of one model as Ray actors: they do what one process does, and the end of one is the engine's end."""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.engine.core import EngineCore
from folovllm.executor import ranks as ranks_executor
from folovllm.executor.base import ExecutorDeadError
from folovllm.executor.ray import RayExecutor
from folovllm.parallel import ParallelConfig
from tests.m9.multiproc_helpers import echo_config, oracle, request, run
from tests.m9.parallel_models import make_parallel
from tests.m10.conftest import all_cpus_are_free, is_alive, wait_for
from tests.m10.echo_rank import RefusingRank, echo_core

pytestmark = [pytest.mark.m10, pytest.mark.ray]
DEATH_SECONDS = 10.0  # the longest that the death of a rank may take to end the engine
PROMPTS = ["the other thing", "in", "there is a longer prompt here, with more tokens than the others have"]


@contextlib.contextmanager
def ranks(path: Path, **args: Any) -> Iterator[EngineCore]:
    """An engine core on echo actors. At the end none of them is left, and their CPUs are free."""
    core = echo_core(path, **args)
    ids = process_ids(core)
    try:
        yield core
    finally:
        core.executor.shutdown()
    wait_for(lambda: not any(map(is_alive, ids)), "a rank is left")
    wait_for(all_cpus_are_free, "a rank's CPU is not free")


def process_ids(core: EngineCore) -> list[int]:
    executor: Any = core.executor
    return executor.collective_rpc("ping")


@contextlib.contextmanager
def dies_within(seconds: float, match: str) -> Iterator[None]:
    began = time.monotonic()
    with pytest.raises(ExecutorDeadError, match=match):
        yield
    assert time.monotonic() - began < seconds


def test_ranks_compute_what_one_process_computes(ray_cluster, tmp_path):
    with ranks(tmp_path, tp=2, pp=2) as core:
        assert len({*process_ids(core), os.getpid()}) == 5
        assert run(core, *[request(f"r{i}", 20) for i in range(8)]) == {f"r{i}": oracle(f"r{i}", 20) for i in range(8)}
        assert core.executor.available_kv_cache_bytes() == 2**30  # that of the rank that has least
        assert core.executor.describe()["Ray actors"] == "2 x 2 ranks (tensor x pipeline parallel), gloo"


def test_several_steps_may_be_in_flight_and_one_may_be_discarded(ray_cluster, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    with ranks(gate, tp=1, pp=2) as core:
        outputs = []
        for name in ("wait", "b", "c"):  # each schedule() admits the request that has come since the last one
            core.add_request(request(name))
            outputs.append(core.scheduler.schedule())
        handles = [core.executor.execute(output) for output in outputs]
        gate.unlink()
        core.executor.discard(handles[0])
        assert core.executor.sample(handles[1]).sampled_token_ids["b"] == oracle("b")[:1]
        core.executor.discard(handles[1])  # it has been taken: nothing happens
        assert core.executor.sample(handles[2]).sampled_token_ids["c"] == oracle("c")[:1]


def test_a_request_that_raises_in_every_rank_fails_alone(ray_cluster, tmp_path):
    with ranks(tmp_path) as core:
        others = [request("r1", 20), request("r2", 20)]
        for one in [*others, request("raise")]:
            core.add_request(one)
        with pytest.raises(ValueError, match="this request cannot be computed"):
            core.step(blamed=["raise"])
        while core.has_unfinished_requests():
            core.step()
        assert [one.output_token_ids for one in others] == [oracle("r1", 20), oracle("r2", 20)]


def test_a_rank_that_raises_alone_ends_the_engine(ray_cluster, tmp_path, monkeypatch):
    """The other one waits in the middle of the step, for good."""
    monkeypatch.setattr(ranks_executor, "SYNC_SECONDS", 0.5)
    cause = "not in step with the others any more: it raised ValueError: this request cannot be computed"
    with ranks(tmp_path) as core:
        with dies_within(DEATH_SECONDS, cause):
            run(core, request("raise-1"))
        with dies_within(1.0, cause):
            core.executor.check_health()


def test_a_rank_that_dies_in_a_step_ends_the_engine(ray_cluster, tmp_path):
    with ranks(tmp_path) as core, dies_within(DEATH_SECONDS, "^rank 1: its process has ended"):
        run(core, request("other", 50), request("kill-1", 1))


def test_a_rank_that_is_killed_while_idle_is_noticed(ray_cluster, tmp_path):
    with ranks(tmp_path) as core:
        ids = process_ids(core)
        os.kill(ids[0], signal.SIGKILL)
        with dies_within(DEATH_SECONDS, "^rank 0: its process has ended"):
            core.executor.check_health()
        wait_for(lambda: not is_alive(ids[1]), "the other rank lives on")


def test_a_rank_that_refuses_the_config_raises_what_it_raised(ray_cluster, tmp_path):
    with pytest.raises(ValueError, match="does not suit this model: use 1"):
        RayExecutor(echo_config(), tmp_path, RefusingRank)


def test_a_model_that_a_machine_does_not_have_is_named(ray_cluster, tmp_path):
    with pytest.raises(ValueError, match=r"has no folder .*nowhere: put the model where all machines"):
        RayExecutor(echo_config(), tmp_path / "nowhere")


def test_ranks_that_find_no_room_are_an_error_of_the_user(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("folovllm.distributed.ray_cluster.PLACEMENT_SECONDS", 1.0)
    config = dataclasses.replace(echo_config(), cpu_threads=500, parallel_config=ParallelConfig(2))
    with pytest.raises(ValueError, match=r"no room for 1000 CPU \(4 in the cluster"):
        RayExecutor(config, tmp_path)


# ---- real ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_parallel("biases", tmp_path_factory.mktemp("biases")))


def tokens(llm: LLM) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (1, 1)])
def test_real_ranks_give_the_tokens_of_one_process(ray_cluster, model, sizes):
    args: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "cpu_threads": 1}
    expected = tokens(LLM(model, **args))
    tp, pp = sizes
    llm = LLM(
        model,
        distributed_executor_backend="ray",
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        **args,
    )
    try:
        assert tokens(llm) == expected
        assert llm.describe()["Ray actors"].startswith(f"{tp} x {pp} ranks")
    finally:
        llm.shutdown()


def test_an_llm_whose_rank_has_died_says_so_in_every_call(ray_cluster, model):
    args: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "cpu_threads": 1}
    llm = LLM(model, distributed_executor_backend="ray", tensor_parallel_size=2, **args)
    os.kill(process_ids(llm.llm_engine.engine_core)[1], signal.SIGKILL)
    for _ in range(2):
        with dies_within(DEATH_SECONDS, "^rank 1: its process has ended"):
            tokens(llm)
    llm.shutdown()
