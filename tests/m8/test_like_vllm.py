"""Answers of vLLM's own server, recorded, and ours to the same requests: texts, logprobs, usage and form are equal.

data/vllm_answers.json holds requests and what vLLM's CPU server 0.32.0 answered with the default model in float32 and
2048 tokens of context. `answers`: those that both servers give. `refused`: what both refuse, with the status. `ours`:
where this server decides otherwise, and why.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from folovllm import start_async_llm
from folovllm.entrypoints.openai.app import build_app
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.entrypoints.openai.state import make_state
from tests.m8.api_helpers import Answer, Client, join_choices
from tests.m8.serving_helpers import assert_all_free

pytestmark = [pytest.mark.m8, pytest.mark.weights]

RECORDED = json.loads((Path(__file__).parent / "data" / "vllm_answers.json").read_text())
CASES = [case for kind in ("answers", "refused", "ours") for case in RECORDED[kind]]
ENGINE_ARGS = {"model": "smollm2-135m", "dtype": "float32", "max_model_len": 2048, "num_kv_blocks": 1000}
# What no two servers have in common: names, times, and how much of a prompt was in the cache by chance.
VOLATILE = {"id", "created", "model", "system_fingerprint", "prompt_tokens_details"}
LIMIT = 300.0  # seconds for all of them on a machine that is busy
ERROR_FIELDS = {"message", "type", "param", "code"}
TOLERANCE = 2e-3  # of logprobs


def plain(value: Any) -> Any:
    """An answer without nulls and volatile fields: clients read a null and a missing field alike."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: plain(item) for key, item in value.items() if item is not None and key not in VOLATILE}


def reduced(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream, whatever the cut of its texts: its kind, its first chunk's choices, its joined choices, its usage."""
    count = 1 + max((choice["index"] for chunk in chunks for choice in chunk["choices"]), default=0)
    return {
        "objects": sorted({chunk["object"] for chunk in chunks}),
        "roles": [
            plain(choice["delta"])
            for chunk in chunks
            for choice in chunk["choices"]
            if "role" in choice.get("delta", {})
        ],
        "choices": plain(join_choices(chunks, count)),
        "usage": [plain(chunk["usage"]) for chunk in chunks if not chunk["choices"]],
    }


def differences(expected: Any, found: Any, place: str = "") -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        for key in expected:
            yield from differences(expected[key], found[key], f"{place}.{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, pair in enumerate(zip(expected, found, strict=True)):
            yield from differences(*pair, f"{place}[{index}]")
    elif isinstance(expected, float) and isinstance(found, float):
        if abs(expected - found) > TOLERANCE:
            yield f"{place}: {expected} != {found}"
    elif expected != found:
        yield f"{place}: {str(expected)[:300]} != {str(found)[:300]}"


async def ask_all() -> list[Answer]:
    """The answers of this server to all recorded requests, which come at once."""
    async with await start_async_llm(in_process=False, **ENGINE_ARGS) as engine:
        state = make_state(engine, ServerOptions(max_queue=len(CASES)))
        client = Client(build_app(state), engine, state)
        answers = await asyncio.gather(*(client.post(case["path"], case["body"]) for case in CASES))
        await assert_all_free(engine)
        return answers


def compare(case: dict[str, Any], answer: Answer) -> Iterator[str]:
    """What is wrong with an answer of this server."""
    if answer.status != case.get("status", 200):
        yield f"status {answer.status}: {answer.pieces[:1]}"
    elif "answer" in case:
        is_stream = answer.headers["content-type"].startswith("text/event-stream")
        yield from differences(case["answer"], reduced(answer.chunks) if is_stream else plain(answer.json))
    elif answer.status != 200 and not (set(answer.error) == ERROR_FIELDS and answer.error["message"]):
        yield f"not OpenAI's form: {answer.json}"


def test_answers_and_refusals_are_those_of_vllm():
    """One test, as all requests share an engine: several workers would start one each."""
    answers = asyncio.run(asyncio.wait_for(ask_all(), LIMIT))
    wrong = [
        f"{case['name']} {fault}"
        for case, answer in zip(CASES, answers, strict=True)
        for fault in compare(case, answer)
    ]
    assert not wrong, "\n".join(wrong)


def test_where_this_server_decides_otherwise_the_recording_says_why():
    assert all(case["why"] and case["status"] != case["vllm"] for case in RECORDED["ours"])
    assert len({case["name"] for case in CASES}) == len(CASES) > 300
