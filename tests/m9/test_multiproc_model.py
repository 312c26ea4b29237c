"""Real models in several processes, through LLM and through the server: same tokens, errors, deaths (slow to start)."""

import contextlib
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams
from folovllm.executor.base import ExecutorDeadError
from folovllm.executor.multiproc import MultiprocExecutor
from folovllm.outputs import RequestOutput
from tests.m8.server_process import Client, serve_process
from tests.m9.multiproc_helpers import (
    DEATH_SECONDS,
    TIMEOUT,
    descendants_of,
    is_alive,
    nothing_left_behind,
    ranks_of,
    wait_until,
)
from tests.m9.parallel_models import make_parallel

pytestmark = pytest.mark.m9

PROMPTS = [[3 + i, 4, 5, 6 + i] * length for i, length in enumerate((1, 3, 9, 20, 2, 4))]
# Each kind of parameter in one batch: all ranks of the last stage must draw the same tokens.
PARAMS = [
    SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.8, seed=7, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=1.2, seed=8, top_p=0.9, top_k=20, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0, logprobs=3, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.7, seed=9, repetition_penalty=1.3, n=2, ignore_eos=True),
    SamplingParams(max_tokens=12, seed=10, min_p=0.1, ignore_eos=True),
]
POISON = '''
from folovllm.sample.sampler import Sampler

class Poisoned(Sampler):
    """Raises for a batch in which a request has this temperature: in every rank that samples."""

    def __call__(self, logits, metadata):
        if metadata.temperature is not None and 1.75 in metadata.temperature:
            raise ArithmeticError("this temperature is poison")
        return super().__call__(logits, metadata)
'''


POISONED_TABLE = '''
from folovllm.worker.block_table import BlockTable

class Poisoned(BlockTable):
    """Raises for a new request of exactly 7 blocks: in every rank, before its stage receives or sends."""

    def add_row(self, block_ids, row):
        if len(block_ids) == 7:
            raise ArithmeticError("seven blocks are poison")
        super().add_row(block_ids, row)
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parallel("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_process(model: Path) -> list[Any]:
    """What the model answers in one process."""
    given = answers(make_llm(model).generate(PROMPTS, PARAMS, use_tqdm=False))
    # The ranks add in another order, so the last bits of a logprob differ.
    return [(token_ids, pytest.approx(logprobs, abs=1e-4)) for token_ids, logprobs in given]


def make_llm(model: Path, **args: Any) -> LLM:
    return LLM(str(model), dtype="float32", max_model_len=256, block_size=16, num_kv_blocks=65, cpu_threads=1, **args)


def answers(outputs: list[RequestOutput]) -> list[Any]:
    """For each request: the tokens of its completions, their logprobs, and those of its prompt."""
    return [
        (
            [completion.token_ids for completion in output.outputs],
            [value for completion in output.outputs for value in values_of(completion.logprobs)]
            + values_of(output.prompt_logprobs),
        )
        for output in outputs
    ]


def values_of(logprobs: list[Any] | None) -> list[float]:
    return [value.logprob for position in logprobs or [] for value in (position or {}).values()]


def executor_of(llm: LLM) -> MultiprocExecutor:
    executor = llm.llm_engine.engine_core.executor
    assert isinstance(executor, MultiprocExecutor)
    return executor


@contextlib.contextmanager
def ranks(model: Path, **args: Any) -> Iterator[LLM]:
    """An LLM of several processes, of which nothing is left at the end."""
    with nothing_left_behind():
        llm = make_llm(model, **args)
        ids = executor_of(llm).process_ids
        try:
            yield llm
        finally:
            llm.shutdown()
            assert not any(map(is_alive, ids))


def test_two_parts_answer_as_one_process_and_a_dead_one_ends_the_llm(model, one_process):
    with ranks(model, tensor_parallel_size=2) as llm:
        assert answers(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == one_process
        facts = llm.describe()
        assert facts["processes"] == "2 x 1 ranks (tensor x pipeline parallel), gloo" and facts["threads"] == 1

        stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=200, temperature=0, ignore_eos=True))
        next(stream)
        os.kill(executor_of(llm).process_ids[1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(ExecutorDeadError, match=r"rank 1 \(process \d+\) was killed by SIGKILL"):
            list(stream)
        for _ in range(2):
            with pytest.raises(ExecutorDeadError, match="rank 1"):
                llm.generate(PROMPTS[0], PARAMS[0], use_tqdm=False)
        assert time.monotonic() - began < DEATH_SECONDS


def test_stages_answer_as_one_process_and_a_request_that_raises_in_the_last_one_fails_alone(
    model, one_process, tmp_path
):
    """The first stage has already computed the next batch, and the last stage must take its tensors nevertheless."""
    (tmp_path / "poison.py").write_text(POISON)
    parts = {"sample.sampler": f"{tmp_path / 'poison.py'}:Poisoned"}
    poison = SamplingParams(max_tokens=12, temperature=1.75, ignore_eos=True)
    with ranks(model, tensor_parallel_size=2, pipeline_parallel_size=2, parts=parts) as llm:
        assert answers(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == one_process
        stream = llm.stream(PROMPTS[3], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        token_ids = list(next(stream).outputs[0].token_ids)
        with pytest.raises(ArithmeticError, match="this temperature is poison"):
            llm.generate(PROMPTS, [*PARAMS[:5], poison], use_tqdm=False)
        token_ids += [token_id for output in stream for token_id in output.outputs[0].token_ids]
        assert token_ids == one_process[3][0][0], "a stream beside it has lost something"
        assert answers(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == one_process


def test_a_step_that_all_stages_skip_is_not_waited_for(model, one_process, tmp_path):
    """The next step is in flight when all stages raise: the first one skips it, and so the last one gets nothing."""
    (tmp_path / "poison.py").write_text(POISONED_TABLE)
    parts = {"worker.block_table": f"{tmp_path / 'poison.py'}:Poisoned"}
    poison = [5] * 100  # 7 blocks of 16
    with ranks(model, pipeline_parallel_size=2, parts=parts) as llm:
        stream = llm.stream(PROMPTS[3], SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        token_ids = list(next(stream).outputs[0].token_ids)
        for _ in range(4):
            with pytest.raises(ArithmeticError, match="seven blocks are poison"):
                llm.generate([poison], PARAMS[0], use_tqdm=False)
            token_ids += next(stream).outputs[0].token_ids
        token_ids += [token_id for output in stream for token_id in output.outputs[0].token_ids]
        assert token_ids == one_process[3][0][0], "a stream beside it has lost something"
        assert answers(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == one_process


def test_a_rank_that_cannot_load_its_part_is_the_users_error(model, tmp_path):
    with nothing_left_behind(), pytest.raises(ValueError, match="does not fit"):
        LLM(str(model), tensor_parallel_size=2, max_model_len=256, kv_cache_memory=2**50)


TEXTS = ["The capital of France is", "Once upon a time, there was a small robot who", "1 2 3 4 5"]


@pytest.fixture(scope="module")
def texts_of_one_process(model_dir: Path) -> list[str]:
    return texts_of(LLM(str(model_dir), dtype="float32", max_model_len=256))


def texts_of(llm: LLM) -> list[str]:
    params = SamplingParams(max_tokens=24, temperature=0)
    return [output.outputs[0].text for output in llm.generate(TEXTS, params, use_tqdm=False)]


@pytest.mark.weights
@pytest.mark.parametrize(
    ("parts", "stages"),
    # 9 query heads: 3 parts, and never 2. tests/m9/test_real_model.py also runs 3 parts of this model, as threads.
    [pytest.param(3, 1, marks=pytest.mark.slow), (1, 2)],
)
def test_the_default_model_in_several_processes(parts, stages, model_dir, texts_of_one_process):
    with nothing_left_behind():
        sizes = {"tensor_parallel_size": parts, "pipeline_parallel_size": stages}
        llm = LLM(str(model_dir), dtype="float32", max_model_len=256, **sizes)
        try:
            assert texts_of(llm) == texts_of_one_process
        finally:
            llm.shutdown()


# ---- the server


def vanish(port: int) -> None:
    """A client that asks for a long stream, reads its first bytes, and is gone without a word (a reset)."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
        send_question(client, port)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def send_question(client: socket.socket, port: int) -> None:
    body = json.dumps(question(200) | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert client.recv(100).startswith(b"HTTP/1.1 200")


def question(max_tokens: int) -> dict[str, Any]:
    return {"prompt": "the", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


def test_a_server_of_two_parts_survives_vanishing_clients_and_ends_with_the_death_of_a_part(model):
    with serve_process(str(model), "-tp", "2", "--max-model-len", "256", "--dtype", "float32") as server:
        pids = descendants_of(server.process.pid)
        parts = ranks_of(server.process.pid)
        assert len(parts) == 2
        first = ask(server)
        for _ in range(3):
            vanish(server.port)
        with socket.create_connection(("127.0.0.1", server.port), timeout=TIMEOUT) as half_open:
            send_question(half_open, server.port)  # and reads no more, and does not close
            assert ask(server) == first
        wait_until(lambda: "vllm:num_requests_running" in metrics(server) and running(server) == 0)
        assert server.get("/health").status == 200

        os.kill(parts[0], signal.SIGKILL)  # the server is idle
        out, err = server.process.communicate(timeout=TIMEOUT)
        assert server.process.returncode != 0
        assert f"rank 0 (process {parts[0]}) was killed by SIGKILL" in out + err
        wait_until(lambda: not any(map(is_alive, pids)), DEATH_SECONDS)


def ask(server: Client) -> str:
    answer = server.post("/v1/completions", question(8))
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["text"]


def metrics(server: Client) -> str:
    return server.get("/metrics").body.decode()


def running(server: Client) -> float:
    line = next(line for line in metrics(server).splitlines() if line.startswith("vllm:num_requests_running"))
    return float(line.rpartition(" ")[2])
