"""A step makes the host wait for the GPU once, and copies little to it. Asked without a GPU.

Milestone: M4. The engine's steps run as on a GPU (tests/gpu_engine.py), and what crosses is counted. A copy from memory
that is not pinned, and a value that Python asks for, raise. That these are found is tested, too.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from folovllm import LLM
from folovllm.attention.backends import flash_attn
from folovllm.attention.backends.triton_paged import TritonPagedBackend
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.transfers import to_host
from folovllm.worker.input_buffers import InputBuffers
from tests.fake_gpu import Account, FakeGpu, HiddenWait
from tests.gpu_engine import add, gpu_machine, step

pytestmark = pytest.mark.m4

GPU = FakeGpu()
TOKENS_AND_TABLE = 2  # copies: input ids, positions and slots in one; the columns of the block table that are in use
COPIES = {"torch_naive": 2, "torch_flash": 2, "torch_sdpa": 3, "triton_paged": 3}  # these two, and the backend's own
if flash_attn.find_kernel() is flash_attn.call_torch:  # torch >= 2.12
    COPIES["flash_attn"] = 3
SELECTED_ROWS = 1  # unless every token is the last one of its request

MakeTiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def engines(tiny_model_dir: MakeTiny) -> dict[str, LLM]:
    """An engine on each backend, without requests."""
    folder = tiny_model_dir("mistral")
    args = {"dtype": "bfloat16", "num_kv_blocks": 40, "max_num_batched_tokens": 32, "enable_prefix_caching": False}
    with pytest.MonkeyPatch.context() as monkeypatch, gpu_machine(monkeypatch, GPU) as machine:
        return {
            name: machine.llm(folder, attention_backend=name, block_size=256 if name == "flash_attn" else 16, **args)
            for name in COPIES
        }


@pytest.fixture
def llm(engines: dict[str, LLM]) -> LLM:
    return engines["triton_paged"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with gpu_machine(monkeypatch, GPU):
        yield GPU


@pytest.fixture(autouse=True)
def no_requests_are_left(llm: LLM, gpu: FakeGpu) -> Iterator[None]:
    yield
    llm.llm_engine.abort_request([str(i) for i in range(10)])


def one_step(llm: LLM, gpu: FakeGpu) -> Account:
    with gpu.step() as account:
        step(llm)
    return account


def decode(llm: LLM, gpu: FakeGpu, *requests: dict[str, Any]) -> Account:
    """The second step of requests with short prompts."""
    for i, params in enumerate(requests):
        add(llm, str(i), 3 + i, **params)
    step(llm)
    account = one_step(llm, gpu)
    llm.llm_engine.abort_request([str(i) for i in range(len(requests))])
    return account


# --- every backend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COPIES)
def test_a_decode_step(name: str, engines: dict[str, LLM], gpu: FakeGpu) -> None:
    account = decode(engines[name], gpu, {}, {}, {})
    assert (account.waits, account.down) == (1, [(3,)])
    assert account.up[:TOKENS_AND_TABLE] == [(3, 3), (3, 1)]  # 3 tokens; 3 requests, which have a block each
    assert len(account.up) == COPIES[name]


@pytest.mark.parametrize("name", COPIES)
def test_a_step_of_chunks_and_decodes(name: str, engines: dict[str, LLM], gpu: FakeGpu) -> None:
    llm = engines[name]
    add(llm, "0", 3)
    step(llm)
    add(llm, "1", 9)
    add(llm, "2", 60)  # more than the budget: a chunk, whose rows are not read
    account = one_step(llm, gpu)
    llm.llm_engine.abort_request(["0", "1", "2"])
    assert (account.waits, account.down) == (1, [(2,)])
    assert len(account.up) == COPIES[name] + SELECTED_ROWS and account.up[0] == (3, 32)


def test_a_long_table_is_not_copied_whole(llm: LLM, gpu: FakeGpu) -> None:
    """The table has columns for max_model_len, 256 tokens; the longest request has 3 blocks of 16."""
    add(llm, "0", 40, max_tokens=8)
    step(llm), step(llm)
    add(llm, "1", 3)
    step(llm)
    assert (2, 3) in one_step(llm, gpu).up


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, more_copies",
    [
        ({"temperature": 0.8}, 2),  # the temperatures, the keys of the noise
        ({"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.05}, 3),  # floats, integers, keys
        ({"logprobs": 3}, 0),
        ({"temperature": 0.8, "logprobs": 0}, 2),
        ({"repetition_penalty": 1.2, "frequency_penalty": 0.5}, 2),  # integers and floats of the cells
        ({"logit_bias": {7: 2.0}, "min_tokens": 2, "stop_token_ids": [4]}, 3),  # cells twice, the numbers to add
        ({"allowed_token_ids": [5, 7, 9]}, 2),  # rows, cells
    ],
    ids=str,
)
def test_sampling_waits_once(params: dict[str, Any], more_copies: int, llm: LLM, gpu: FakeGpu) -> None:
    account = decode(llm, gpu, params, params)
    assert account.waits == 1
    assert len(account.up) <= COPIES["triton_paged"] + more_copies, account.up


def test_logprobs_of_some_requests(llm: LLM, gpu: FakeGpu) -> None:
    account = decode(llm, gpu, {}, {"logprobs": 2}, {"temperature": 0.7, "logprobs": 5})
    assert account.waits == 1 and len(account.down) == 4  # ids; and of two rows: ids, logprobs, ranks


@pytest.mark.parametrize("num_requests", [1, 3])
def test_prompt_logprobs_wait_once_more(num_requests: int, llm: LLM, gpu: FakeGpu) -> None:
    """However many requests, and rows of a prompt, there are."""
    for i in range(num_requests):
        add(llm, str(i), 6 + i, prompt_logprobs=2)
    account = one_step(llm, gpu)
    assert account.waits == 2
    # The tokens that the rows predict, and which rows are the last ones of their requests.
    assert len(account.up) == COPIES["triton_paged"] + 2
    assert one_step(llm, gpu).waits == 1  # they are decodes now


def test_a_prompt_whose_token_is_not_sampled_waits_for_nothing(llm: LLM, gpu: FakeGpu) -> None:
    add(llm, "0", 60)
    account = one_step(llm, gpu)
    assert (account.waits, account.down) == (0, [])


# --- faults that are planted are found --------------------------------------------------------------------------------


def ask_for_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RMSNorm.forward

    def forward(self: RMSNorm, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        assert hidden.isfinite().all()
        return plain(self, hidden, residual)

    monkeypatch.setattr(RMSNorm, "forward", forward)


def copy_from_pageable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TritonPagedBackend.prepare

    def prepare(self: TritonPagedBackend, metadata: Any) -> None:
        plain(self, metadata)
        torch.tensor(metadata.seq_lens, device=metadata.block_table.device)

    monkeypatch.setattr(TritonPagedBackend, "prepare", prepare)


def index_with_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForCausalLM.compute_logits
    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", lambda self, hidden: plain(self, hidden[[0]]))


def index_with_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForCausalLM.compute_logits
    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", lambda self, x: plain(self, x[x.sum(dim=-1) > 0]))


def copy_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(self: InputBuffers, input_ids: Any, positions: Any, slot_mapping: Any) -> None:
        self.input_ids[: len(input_ids)].copy_(torch.from_numpy(input_ids), non_blocking=True)

    monkeypatch.setattr(InputBuffers, "fill", fill)


@pytest.mark.parametrize(
    "plant", [ask_for_a_value, copy_from_pageable_memory, index_with_a_list, index_with_a_mask, copy_a_slice]
)
def test_a_hidden_wait_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], llm: LLM, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(llm, "0", 3)
    step(llm)
    plant(monkeypatch)
    with pytest.raises(HiddenWait):
        one_step(llm, gpu)


def test_a_second_wait_is_counted(llm: LLM, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForCausalLM.compute_logits

    def compute_logits(self: LlamaForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
        to_host(hidden)
        return plain(self, hidden)

    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", compute_logits)
    assert decode(llm, gpu, {}).waits == 2
