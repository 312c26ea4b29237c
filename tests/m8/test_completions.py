"""POST /v1/completions: the shapes of its answers, streamed and not, and what it refuses."""

import asyncio
import http.client
import json
import logging

import pytest

from tests.m1.tiny_tokenizers import byte_level
from tests.m8.api_helpers import (
    Answer,
    LogprobsExecutor,
    join_choices,
    logprob_of,
    make_client,
    slow_executor,
    with_client,
)
from tests.m8.server_process import running_server
from tests.m8.serving_helpers import VOCAB_SIZE, assert_all_free, eventually, oracle, prompt_ids, run_async

pytestmark = pytest.mark.m8

PATH = "/v1/completions"
TEXT = "two words here"
IDS = byte_level().encode(TEXT)
LIMIT = 256  # max_model_len of the server under test
POISON = 399  # a token id at which PoisonedExecutor raises


def text_of(token_ids, prompt=None):
    """The text that the engine gives for an answer: decoded behind its prompt."""
    tokenizer, before = byte_level(), list(prompt or [])
    whole = tokenizer.decode(before + token_ids)
    return whole[len(tokenizer.decode(before)) :]


def hits(token_id, max_tokens=200):
    """A prompt after which the fake model gives `token_id`, and the number of tokens until then."""
    for seed in range(1000):
        prompt = prompt_ids(seed, 5)
        tokens = oracle(prompt, max_tokens)
        if tokens.index(token_id) >= 3 if token_id in tokens else False:
            return prompt, tokens.index(token_id) + 1
    raise AssertionError("no such prompt")


# ---- an answer that is not streamed


@with_client()
async def test_the_whole_answer(client):
    answer = await client.complete(prompt=IDS, max_tokens=6)
    body = answer.json
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    assert body.pop("id").startswith("cmpl-") and isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": client.state.model_names[0],
        "choices": [
            {
                "index": 0,
                "text": text_of(oracle(IDS, 6), IDS),
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "prompt_logprobs": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {
            "prompt_tokens": len(IDS),
            "completion_tokens": 6,
            "total_tokens": len(IDS) + 6,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@with_client()
async def test_a_text_is_tokenised_and_gives_16_tokens(client):
    for fields in ({}, {"max_tokens": None}, {"model": ""}, {"model": None}, {"model": client.state.model_names[0]}):
        answer = await client.complete(prompt=TEXT, return_token_ids=True, **fields)
        (choice,) = answer.json["choices"]
        assert choice["prompt_token_ids"] == IDS and choice["token_ids"] == oracle(IDS, 16)


@with_client()
async def test_many_prompts_keep_their_order(client):
    prompts = [prompt_ids(seed, 5 + seed) for seed in range(20)]
    body = (await client.complete(prompt=prompts, max_tokens=3, return_token_ids=True)).json
    assert [choice["index"] for choice in body["choices"]] == list(range(20))
    assert [choice["token_ids"] for choice in body["choices"]] == [oracle(prompt, 3) for prompt in prompts]
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts)) and body["usage"]["completion_tokens"] == 60
    texts = (await client.complete(prompt=[TEXT, "a", TEXT], max_tokens=2, return_token_ids=True)).json["choices"]
    assert [choice["prompt_token_ids"] for choice in texts] == [IDS, byte_level().encode("a"), IDS]


@with_client()
async def test_n_answers_count_their_prompt_once(client):
    body = (await client.complete(prompt=[IDS, [5, 6]], n=3, temperature=1, max_tokens=4)).json
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"]["prompt_tokens"] == len(IDS) + 2 and body["usage"]["completion_tokens"] == 24


@with_client()
async def test_cached_tokens_are_told(client):
    prompt = prompt_ids(3, 40)
    used = [(await client.complete(prompt=prompt, max_tokens=2)).json["usage"] for _ in range(2)]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in used] == [0, 32]  # two full blocks of 16
    for salt, cached in (("mine", 0), ("mine", 32), ("yours", 0)):
        usage = (await client.complete(prompt=prompt, max_tokens=2, cache_salt=salt)).json["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == cached
    (await client.complete(prompt=prompt, n=2, temperature=1, stream=True))  # the children's own hits do not count
    fields = {"n": 2, "temperature": 1, "stream": True, "stream_options": {"include_usage": True}}
    last = (await client.complete(prompt=prompt_ids(4, 40), **fields)).chunks[-1]
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# ---- logprobs and echo


@with_client()
async def test_logprobs(client):
    tokens = oracle(IDS, 3)
    (choice,) = (await client.complete(prompt=IDS, max_tokens=3, logprobs=2)).json["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [logprob_of(i) for i in tokens]
    assert [len(top) for top in logprobs["top_logprobs"]] == [3, 3, 3]  # none of them is among the two likeliest
    assert choice["prompt_logprobs"] is None
    (choice,) = (await client.complete(prompt=IDS, max_tokens=3, logprobs=0)).json["choices"]
    assert [list(top.values()) for top in choice["logprobs"]["top_logprobs"]] == [[logprob_of(i)] for i in tokens]


@with_client()
async def test_prompt_logprobs(client):
    (choice,) = (await client.complete(prompt=[7, 8], max_tokens=1, prompt_logprobs=1)).json["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None
    assert second["8"] == {"logprob": logprob_of(8), "rank": 9, "decoded_token": byte_level().token_text(8)}
    assert second["0"]["rank"] == 1


@pytest.mark.parametrize("prompt", [TEXT, IDS])
@with_client()
async def test_echo(client, prompt):
    (choice,) = (await client.complete(prompt=prompt, max_tokens=3, echo=True)).json["choices"]
    assert choice["text"] == TEXT + text_of(oracle(IDS, 3), IDS) and choice["logprobs"] is None
    (choice,) = (await client.complete(prompt=prompt, max_tokens=3, echo=True, return_token_ids=True)).json["choices"]
    assert choice["text"].startswith(TEXT) and choice["token_ids"] == oracle(IDS, 3)


@with_client()
async def test_echo_with_logprobs_scores_the_prompt(client):
    """What lm-eval's local-completions reads: the prompt's tokens, their logprobs and the likeliest tokens."""
    (choice,) = (await client.complete(prompt=TEXT, max_tokens=2, echo=True, logprobs=1)).json["choices"]
    ids, logprobs = IDS + oracle(IDS, 2), choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, *(logprob_of(i) for i in ids[1:])]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"]) == len(ids)
    assert "".join(logprobs["tokens"][: len(IDS)]) == TEXT
    lengths = [len(token) for token in logprobs["tokens"]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(len(ids))]
    assert len(choice["prompt_logprobs"]) == len(IDS)


@pytest.mark.parametrize("stream", [False, True])
@with_client()
async def test_echo_of_nothing_else(client, stream):
    """The engine computes a token, and it counts, but the answer is the prompt."""
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = await client.complete(prompt=TEXT, max_tokens=0, echo=True, logprobs=0, **options)
    (choice,) = join_choices(answer.chunks, 1) if stream else answer.json["choices"]
    usage = answer.chunks[-1]["usage"] if stream else answer.json["usage"]
    assert choice["text"] == TEXT and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(IDS) and usage["completion_tokens"] == 1


# ---- streams


@with_client()
async def test_the_chunks_of_a_stream(client):
    answer = await client.complete(prompt=IDS, max_tokens=3, stream=True)
    assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert len({(chunk["id"], chunk["created"]) for chunk in answer.chunks}) == 1
    for chunk in answer.chunks:
        assert chunk["object"] == "text_completion" and chunk["model"] == client.state.model_names[0]
        assert list(chunk) == ["id", "object", "created", "model", "choices"]
        (choice,) = chunk["choices"]
        assert list(choice) == ["index", "text", "logprobs", "finish_reason", "stop_reason"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in answer.chunks[:-1]] == [None] * (len(answer.chunks) - 1)
    assert answer.chunks[-1]["choices"][0]["finish_reason"] == "length"


CASES = {
    "plain": {},
    "many prompts": {"prompt": [IDS, [7, 8, 9], [50] * 30]},
    "many texts": {"prompt": [TEXT, "a", TEXT]},
    "logprobs": {"logprobs": 2},
    "ids": {"logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True},
    "echo": {"echo": True},
    "echo and logprobs": {"echo": True, "logprobs": 2, "prompt": [IDS, [7, 8, 9]]},
    "echo and ids": {"echo": True, "return_token_ids": True, "logprobs": 0},
    "n": {"n": 3, "temperature": 1.0},
    "n, echo, logprobs": {"n": 3, "temperature": 1.0, "echo": True, "logprobs": 1, "prompt": [[9] * 40, [8] * 40]},
    "no tokens": {"echo": True, "max_tokens": 0, "logprobs": 1},
    "stop": {"stop": "e", "max_tokens": 100},
    "stop kept": {"stop": ["e", "o"], "include_stop_str_in_output": True, "max_tokens": 100},
}


@pytest.mark.parametrize("case", CASES)
@with_client()
async def test_the_chunks_join_to_the_whole_answer(client, case):
    """The second time the prompts are cached, so with n > 1 other choices overtake the one that scores the prompt."""
    fields = {"prompt": IDS, "max_tokens": 8, **CASES[case]}
    count = fields.get("n", 1) * (len(fields["prompt"]) if isinstance(fields["prompt"][0], (list, str)) else 1)
    for _ in range(2):
        whole = (await client.complete(**fields)).json
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = (await client.complete(**fields, **options)).chunks
        for choice in whole["choices"]:
            del choice["prompt_logprobs"]  # not in streams
        assert join_choices(chunks, count) == whole["choices"]
        for usage in (whole["usage"], chunks[-1]["usage"]):
            del usage["prompt_tokens_details"]  # the first request fills the cache for the second
        assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
        assert all(chunk["usage"] is None for chunk in chunks[:-1])


@with_client(executor_factory=slow_executor, long_prefill_token_threshold=8)
async def test_a_choice_that_overtakes_waits_for_the_logprobs_of_the_prompt(client):
    """Choice 0 computes the prompt in five steps, as it needs its logprobs. The others find it in the cache."""
    fields = {"prompt": [9] * 40, "n": 3, "temperature": 1, "echo": True, "logprobs": 0, "max_tokens": 12}
    whole = (await client.complete(**fields)).json["choices"]
    choices = join_choices((await client.complete(**fields, stream=True)).chunks, 3)
    assert [choice["logprobs"] for choice in choices] == [choice["logprobs"] for choice in whole]
    assert all(choice["logprobs"]["token_logprobs"][1] == logprob_of(9) for choice in choices)


@with_client()
async def test_continuous_usage(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = (
        await client.complete(prompt=[IDS, [5]], n=2, temperature=1, max_tokens=4, stream=True, stream_options=options)
    ).chunks
    seen: dict[int, list[int]] = {}
    for chunk in chunks[:-1]:
        index = chunk["choices"][0]["index"]
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == (len(IDS) if index < 2 else 1)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        seen.setdefault(index, []).append(usage["completion_tokens"])
    assert all(counts == sorted(counts) and counts[-1] == 4 for counts in seen.values()) and len(seen) == 4
    assert chunks[-1]["usage"]["completion_tokens"] == 16 and chunks[-1]["usage"]["prompt_tokens"] == len(IDS) + 1
    # Without the first there is no second, and neither is on by itself (vLLM 0.32; in 0.11 the first was).
    for options in ({"include_usage": False, "continuous_usage_stats": True}, {"continuous_usage_stats": True}, {}):
        chunks = (await client.complete(prompt=IDS, stream=True, stream_options=options)).chunks
        assert not any("usage" in chunk for chunk in chunks)


# ---- how an answer ends


@pytest.mark.parametrize("kept", [False, True])
@with_client()
async def test_a_stop_string(client, kept):
    prompt, _ = hits(byte_level().encode("x")[0])
    fields = {"prompt": prompt, "max_tokens": 200, "stop": ["never said", "x"], "include_stop_str_in_output": kept}
    (choice,) = (await client.complete(**fields)).json["choices"]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == "x"
    assert choice["text"].endswith("x") is kept and choice["text"].count("x") == kept


@pytest.mark.parametrize("kept", [False, True])
@with_client()
async def test_a_stop_token(client, kept):
    token_id = byte_level().encode("x")[0]
    prompt, count = hits(token_id)
    fields = {"prompt": prompt, "max_tokens": 200, "stop_token_ids": [token_id], "include_stop_str_in_output": kept}
    body = (await client.complete(**fields)).json
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop" and choice["stop_reason"] == token_id
    assert choice["text"].endswith("x") is kept and body["usage"]["completion_tokens"] == count


@with_client()
async def test_the_end_of_the_text_counts_and_has_no_stop_reason(client):
    prompt, count = hits(byte_level().eos_token_id)
    body = (await client.complete(prompt=prompt, max_tokens=200, ignore_eos=False)).json
    (choice,) = body["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    assert body["usage"]["completion_tokens"] == count and choice["text"] == text_of(oracle(prompt, count - 1), prompt)


@with_client()
async def test_an_answer_that_does_not_fit_is_shortened(client):
    body = (await client.complete(prompt=prompt_ids(1, LIMIT - 3), max_tokens=LIMIT)).json
    assert body["usage"]["completion_tokens"] == 3 and body["choices"][0]["finish_reason"] == "length"


# ---- prompts that are too long, too many, or cut


@pytest.mark.parametrize(
    "prompt",
    [[5] * LIMIT, [5] * 5000, "x" * 2000, ["a", "x" * 20_000_000], [[5], [6] * LIMIT]],
    ids=["exact", "long", "text", "20 MB", "second"],
)
@with_client()
async def test_a_prompt_that_is_too_long(client, prompt):
    """The 20 MB are refused by their characters: tokenising them would take seconds."""
    answer = await client.complete(prompt=prompt, max_tokens=2)
    assert answer.status == 400 and answer.error["param"] == "prompt"
    assert answer.error["code"] == "context_length_exceeded" and str(LIMIT) in answer.error["message"]
    assert len(answer.error["message"]) < 300
    assert ("20000000 characters" in answer.error["message"]) == ("x" * 20_000_000 in prompt)


@with_client()
async def test_truncation_keeps_the_end(client):
    prompt = prompt_ids(2, 300)

    async def kept(count, **fields):
        answer = await client.complete(
            prompt=prompt, truncate_prompt_tokens=count, return_token_ids=True, **{"max_tokens": 4, **fields}
        )
        return answer.json["choices"][0]["prompt_token_ids"]

    assert await kept(7) == prompt[-7:]
    assert await kept(-1) == prompt[-(LIMIT - 4) :]
    assert await kept(-1, max_tokens=LIMIT) == prompt[-1:]
    text = "the quick " * 5000  # too many characters for any prompt, but not for its end
    answer = await client.complete(prompt=text, truncate_prompt_tokens=5, return_token_ids=True, echo=True)
    assert answer.json["choices"][0]["prompt_token_ids"] == byte_level().encode(text)[-5:]
    for count in (0, -2, LIMIT + 1):
        answer = await client.complete(prompt=prompt, truncate_prompt_tokens=count)
        assert answer.status == 400 and answer.error["param"] == "truncate_prompt_tokens"


@with_client()
async def test_a_request_has_at_most_1024_completions(client):
    answer = await client.complete(prompt=[[5]] * 1025, max_tokens=1)
    assert answer.status == 400 and answer.error["param"] == "prompt" and "1024" in answer.error["message"]
    answer = await client.complete(prompt=[[5]] * 2, n=513, temperature=1)
    assert answer.status == 400 and answer.error["param"] == "n"
    answer = await client.complete(prompt="a", n=2**62, temperature=1)
    assert answer.status == 400 and answer.error["param"] == "n"
    answer = await client.complete(prompt=[[5 + i % 300] for i in range(1024)], max_tokens=1)
    assert answer.status == 200 and len(answer.json["choices"]) == 1024


@with_client()
async def test_special_tokens_of_a_text(client):
    """The tiny tokenizer adds none, so the test looks at what it is asked for."""
    asked = []
    encode = client.engine.encode

    async def spy(text, add_special_tokens=True):
        asked.append(add_special_tokens)
        return await encode(text, add_special_tokens)

    client.engine.encode = spy
    for value in (None, True, False):
        await client.complete(prompt="a", add_special_tokens=value)
    assert asked == [True, True, False]


# ---- refusals


BAD = {
    "missing prompt": ({"prompt": None}, "prompt"),
    "empty text": ({"prompt": ""}, "prompt"),
    "no such token": ({"prompt": [5, VOCAB_SIZE]}, "prompt"),
    "negative token": ({"prompt": [-1]}, "prompt"),
    "huge token": ({"prompt": [10**30]}, "prompt"),
    "lone surrogate": ({"prompt": "a\ud800"}, "prompt"),
    "temperature": ({"temperature": -1}, "temperature"),
    "logit_bias of an unknown token": ({"logit_bias": {"12345": 1}}, "logit_bias"),
    "stop token": ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    "too many logprobs": ({"logprobs": 21}, "logprobs"),
    "too many prompt_logprobs": ({"prompt_logprobs": 21}, "prompt_logprobs"),
    "min_tokens": ({"min_tokens": 20}, "min_tokens"),
    "n": ({"n": 2}, "n"),
    "priority": ({"priority": 1}, "priority"),
    "request_id": ({"request_id": "a\nb"}, "request_id"),
    "empty request_id": ({"request_id": ""}, "request_id"),
    "cache_salt": ({"cache_salt": ""}, "cache_salt"),
    "suffix": ({"suffix": "end"}, "suffix"),
    "stream_options": ({"stream_options": {}}, "stream_options"),
    "no stream of prompt_logprobs": ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    "stops": ({"stop": ["a"] * 5}, "stop"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens"),
    "a type": ({"max_tokens": [1]}, "max_tokens"),
}


@pytest.mark.parametrize("stream", [False, True])
@with_client()
async def test_bad_requests_are_400_with_the_name_of_the_field(client, stream):
    for name, (fields, param) in BAD.items():
        if not (stream and name == "stream_options"):
            answer = await client.complete(**{"prompt": IDS, "stream": stream, **fields})
            assert answer.status == 400, name
            assert answer.error["type"] == "invalid_request_error" and answer.error["param"] == param, name
            assert set(answer.error) == {"message", "type", "param", "code"} and "http" not in answer.error["message"]


@with_client()
async def test_another_model_is_404(client):
    answer = await client.complete(prompt=IDS, model="gpt-4")
    assert answer.status == 404 and answer.error["param"] == "model" and answer.error["code"] == "model_not_found"


@with_client(skip_tokenizer=True, tokenizer=None)
async def test_without_a_tokenizer_ids_are_served_and_texts_refused(client):
    answer = await client.complete(prompt=IDS, max_tokens=3, return_token_ids=True, logprobs=0)
    (choice,) = answer.json["choices"]
    assert choice["token_ids"] == oracle(IDS, 3)
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in oracle(IDS, 3)]
    answer = await client.complete(prompt="a")
    assert answer.status == 400 and "tokenizer" in answer.error["message"]
    answer = await client.complete(prompt=IDS, echo=True)
    assert answer.status == 400 and answer.error["param"] == "echo"


@with_client()
async def test_one_bad_prompt_of_many_leaves_nothing_behind(client):
    answer = await client.complete(prompt=[IDS, [5], [VOCAB_SIZE]], max_tokens=100)
    assert answer.status == 400 and "out of vocabulary" in answer.error["message"]
    assert client.engine.num_unfinished == 0


@with_client()
async def test_unknown_fields_are_named_once_per_server(client, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert (await client.complete(prompt=IDS, max_tokens=1, user="me", colour="red")).status == 200
    assert [("user" in r.getMessage(), "colour" in r.getMessage()) for r in caplog.records] == [(True, True)]


@with_client(scheduling_policy="priority")
async def test_priority_where_the_scheduler_has_it(client):
    assert (await client.complete(prompt=IDS, max_tokens=1, priority=-5)).status == 200


@with_client(executor_factory=slow_executor, options={"max_queue": 0}, max_num_seqs=2)
async def test_a_full_server_answers_429(client):
    first = asyncio.create_task(client.complete(prompt=[IDS, [5]], max_tokens=100))
    await eventually(lambda: client.engine.num_unfinished == 2)
    answer = await client.complete(prompt=IDS)
    assert answer.status == 429 and answer.headers["retry-after"] == "1"
    assert answer.error["type"] == "rate_limit_error"
    assert (await first).status == 200


# ---- ids


@with_client()
async def test_the_id_of_an_answer_is_the_clients(client):
    body = {"prompt": IDS, "max_tokens": 1, "request_id": "mine"}
    assert (await client.post(PATH, body)).json["id"] == "cmpl-mine"
    assert (await client.post(PATH, body, {"X-Request-Id": "header"})).json["id"] == "cmpl-header"
    plain = [(await client.complete(prompt=IDS, max_tokens=1)).json["id"] for _ in range(2)]
    assert plain[0] != plain[1]


@with_client()
async def test_two_clients_may_choose_the_same_id(client):
    answers = await asyncio.gather(*(client.complete(prompt=IDS, request_id="same") for _ in range(3)))
    assert [answer.status for answer in answers] == [200] * 3


# ---- clients that leave, requests that fail


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "n": 3, "temperature": 1}])
@pytest.mark.parametrize("prompt", [IDS, [IDS, [5], [6]]])
@with_client(executor_factory=slow_executor)
async def test_a_client_that_leaves_frees_its_blocks(client, fields, prompt):
    leaving = asyncio.Event()
    body = {"prompt": prompt, "max_tokens": 250, "ignore_eos": True, **fields}
    call = asyncio.create_task(client.post(PATH, body, leaving=leaving))
    await eventually(lambda: client.engine.stats.num_running > 0)
    leaving.set()
    answer = await call
    assert client.engine.num_unfinished == 0
    assert b"[DONE]" not in b"".join(answer.pieces)  # and with_client checks that the blocks are free


@with_client()
async def test_a_client_that_leaves_while_its_text_is_tokenised(client):
    leaving, tokenising = asyncio.Event(), asyncio.Event()

    async def slow(text, add_special_tokens=True):
        tokenising.set()
        await asyncio.Event().wait()

    client.engine.encode = slow
    call = asyncio.create_task(client.post(PATH, {"prompt": "a"}, leaving=leaving))
    await tokenising.wait()
    leaving.set()
    assert (await call).status == 499
    assert client.state.num_admitting == 0


class PoisonedExecutor(LogprobsExecutor):
    """Raises as long as a request with POISON in its prompt is in the batch."""

    def execute(self, scheduler_output):
        handle = super().execute(scheduler_output)
        if any(POISON in self.requests[i].token_ids for i in scheduler_output.num_scheduled_tokens):
            raise RuntimeError("secret cause")
        return handle


def poisoned(config):
    return PoisonedExecutor()


@pytest.mark.parametrize("prompt", [[POISON], [[5], [POISON], [6]]])
@with_client(executor_factory=poisoned)
async def test_a_request_that_fails_is_500_without_the_cause(client, prompt):
    answer = await client.complete(prompt=prompt, max_tokens=2)
    assert answer.status == 500 and answer.error["type"] == "server_error"
    assert "secret" not in answer.error["message"]


@pytest.mark.parametrize("prompt", [[POISON], [[5], [POISON], [6]]])
@with_client(executor_factory=poisoned)
async def test_a_stream_that_fails_tells_so_and_ends(client, prompt):
    answer = await client.complete(prompt=prompt, max_tokens=2, stream=True)
    assert answer.status == 200
    (error,) = [chunk["error"] for chunk in answer.chunks if "error" in chunk]
    assert error["type"] == "server_error" and "secret" not in error["message"]
    assert "error" in answer.chunks[-1]  # nothing follows but [DONE]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_the_shutdown_cuts_off_says_so(stream, late):
    """It ends like any other, with what there is so far."""

    async def main():
        async with make_client(executor_factory=slow_executor) as client:
            fields = {"prompt": [IDS, [5]], "max_tokens": 200, "stream": stream, "echo": True, "logprobs": 0}
            call = asyncio.create_task(client.complete(**fields))
            await eventually(lambda: client.engine.num_unfinished == 2)
            if late:
                await eventually(lambda: client.engine.stats.num_generation_tokens > 3)
            assert await client.engine.drain(0.0) == 2
            answer = await call
            choices = join_choices(answer.chunks, 2) if stream else answer.json["choices"]
            assert [choice["finish_reason"] for choice in choices] == ["abort", "abort"]
            assert all(choice["text"].startswith(text) for choice, text in zip(choices, (TEXT, "#"), strict=True))
            assert (await client.complete(prompt=IDS)).status == 503

    run_async(main)


# ---- the part serve.event_stream


def test_events_are_written_by_the_part(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from folovllm.entrypoints.openai.sse import EventStream\n"
        "class Mine(EventStream):\n"
        "    def encode(self, data):\n"
        "        return b': mine\\n' + super().encode(data)\n"
    )

    async def main():
        async with make_client(parts={"serve.event_stream": f"{path}:Mine"}) as client:
            answer = await client.complete(prompt=IDS, max_tokens=1, stream=True)
            assert b"".join(answer.pieces).count(b": mine\n") == len(answer.events) == 2

    run_async(main)


@with_client()
async def test_what_comes_together_is_sent_together(client):
    """All chunks of an output leave in one write: n answers do not cost n system calls."""
    answer = Answer()
    body = {"prompt": IDS, "n": 4, "temperature": 1, "max_tokens": 4, "stream": True, "ignore_eos": True}
    await client.post(PATH, body, answer=answer)
    assert len(answer.events) > len(answer.pieces)


# ---- over a socket


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_ends_the_request(path, stream):
    """uvicorn tells the application that the client has gone only if the application listens."""
    body = {"prompt": [IDS, [5]]} if path == PATH else {"messages": [{"role": "user", "content": "Hi"}]}
    body = {**body, "max_tokens": 200, "ignore_eos": True, "stream": stream}
    with running_server({"executor_factory": slow_executor}) as server:
        engine = server.state.engine

        async def computing():
            await eventually(lambda: engine.stats.num_generation_tokens > 3)

        async def gone():
            await eventually(lambda: engine.num_unfinished == 0)
            await assert_all_free(engine)

        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        server.in_loop(computing)
        connection.close()
        server.in_loop(gone)
        assert engine.stats.num_generation_tokens < 200, "the request ran to its end"
