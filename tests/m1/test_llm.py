"""The LLM class on a tiny model: what users type, what they get, and that nothing they do breaks the engine.

Milestone: M1.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from folovllm import LLM, SamplingParams
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import RequestOutputKind
from tests.parity_helpers import GapNaiveModel
from tests.tiny_models import EOS

pytestmark = pytest.mark.m1

MAX_MODEL_LEN = 128
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
TEXTS = ["the other thing", "in", "there is a longer prompt here, with more tokens than the others have"]


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[[str], Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return LLM(str(folder), dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=8)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The engine of all tests; each has to leave it idle and whole."""
    yield shared
    assert_idle(shared)


def assert_idle(llm: LLM) -> None:
    engine = llm.llm_engine
    engine.step()  # tells the worker what has finished
    assert not engine.has_unfinished_requests() and not engine.output_processor.has_unfinished
    assert not engine.engine_core.scheduler.has_requests() and not llm._waited_for and not llm._mail
    engine.engine_core.scheduler.check_integrity()
    assert engine.stats().kv_cache_usage == 0.0
    runner = engine.engine_core.executor.worker.model_runner
    assert not runner.requests and not runner.batch.req_ids


def generate(llm: LLM, prompts: Any, params: Any = GREEDY, **args: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **args)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# --- prompts and parameters -------------------------------------------------------------------------------------------


def test_every_form_of_prompt_means_the_same(llm: LLM) -> None:
    text = TEXTS[0]
    token_ids = llm.get_tokenizer().encode(text)
    forms = [text, [text], token_ids, [token_ids], {"prompt": text}, {"prompt_token_ids": token_ids}, (text,)]
    forms += [[{"prompt": text}], [{"prompt_token_ids": token_ids}], {"prompt": text, "prompt_token_ids": token_ids}]
    results = [generate(llm, form) for form in forms]
    assert all(len(result) == 1 for result in results)
    assert all(tokens_of(result) == tokens_of(results[0]) for result in results)
    assert all(result[0].prompt_token_ids == token_ids for result in results)
    shown = [result[0].prompt for result in results]
    assert shown == [text, text, None, None, text, None, text, text, None, text]


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    """The first is the last to finish."""
    mixed = [TEXTS[0], llm.get_tokenizer().encode(TEXTS[1]), {"prompt": TEXTS[2]}]
    params = [GREEDY.replace(max_tokens=n) for n in (20, 1, 5)]
    outputs = generate(llm, mixed, params)
    assert [len(t) for t in tokens_of(outputs)] == [20, 1, 5]
    assert tokens_of(outputs) == [tokens_of(generate(llm, p, q))[0] for p, q in zip(mixed, params, strict=True)]
    assert [int(o.request_id) for o in outputs] == sorted(int(o.request_id) for o in outputs)


def test_the_text_is_the_decoded_tokens(llm: LLM) -> None:
    for output in generate(llm, TEXTS):
        assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)
        assert output.finished and output.outputs[0].finish_reason == "length"


def test_nothing_to_do(llm: LLM) -> None:
    assert generate(llm, []) == []


def test_default_params_are_vllms(llm: LLM) -> None:
    (output,) = llm.generate(TEXTS[0], use_tqdm=False)
    assert len(output.outputs[0].token_ids) <= 16 and output.finished


def test_n_completions(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=10, ignore_eos=True)
    first, second = generate(llm, TEXTS[:2], params)
    assert [c.index for c in first.outputs] == [0, 1, 2] and first.finished
    assert len({tuple(c.token_ids) for c in first.outputs}) == 3
    for i, completion in enumerate(second.outputs):
        alone = generate(llm, TEXTS[1], SamplingParams(seed=5 + i, max_tokens=10, ignore_eos=True))
        assert completion.token_ids == tokens_of(alone)[0]


def test_stop_strings_cut_the_text(llm: LLM) -> None:
    (full,) = generate(llm, TEXTS[0], GREEDY.replace(max_tokens=30))
    text = full.outputs[0].text
    stop = text[8:10]
    (cut,) = generate(llm, TEXTS[0], GREEDY.replace(max_tokens=30, stop=[stop]))
    completion = cut.outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) < 30
    (kept,) = generate(llm, TEXTS[0], GREEDY.replace(max_tokens=30, stop=stop, include_stop_str_in_output=True))
    assert kept.outputs[0].text == text[: text.index(stop) + len(stop)]


def test_max_model_len_ends_a_text(llm: LLM) -> None:
    for max_tokens in (None, 500):
        (output,) = generate(llm, {"prompt_token_ids": [5] * 100}, GREEDY.replace(max_tokens=max_tokens))
        assert len(output.outputs[0].token_ids) == MAX_MODEL_LEN - 100
        assert output.outputs[0].finish_reason == "length"


def test_eos_ends_a_text(llm: LLM) -> None:
    (output,) = generate(llm, TEXTS[0], SamplingParams(temperature=0.0, logit_bias={EOS: 100.0}))
    assert output.outputs[0].token_ids == [EOS] and output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == "" and output.outputs[0].stop_reason is None


def test_priority_decides_who_comes_first(folder: Path) -> None:
    llm = LLM(str(folder), dtype="float32", max_model_len=64, max_num_seqs=1, scheduling_policy="priority")
    outputs = generate(llm, TEXTS, priority=[2, 0, 1])
    begun = [output.metrics.time_to_first_token for output in outputs]
    assert begun[1] < begun[2] < begun[0]


# --- logprobs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_logprobs_are_huggingfaces(model: str, tiny_model_dir: Callable[[str], Path]) -> None:
    from folovllm.entrypoints.commands.hf_baseline import load_hf

    llm = LLM(str(tiny_model_dir(model)), dtype="float32", max_model_len=MAX_MODEL_LEN)
    outputs = generate(llm, TEXTS, GREEDY.replace(logprobs=3, prompt_logprobs=2))
    for output in outputs:
        completion, num_prompt = output.outputs[0], len(output.prompt_token_ids)
        text = output.prompt_token_ids + completion.token_ids
        with torch.inference_mode():
            logits = load_hf(tiny_model_dir(model), "float32")(torch.tensor([text])).logits[0]
        theirs = logits.log_softmax(-1)  # [num_tokens, vocab_size]; row i predicts token i + 1
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == num_prompt
        entries = output.prompt_logprobs[1:] + completion.logprobs
        assert len(entries) == len(text) - 1
        for row, (token, entry) in enumerate(zip(text[1:], entries, strict=True)):
            k = 2 if row < num_prompt - 1 else 3
            top = theirs[row].topk(k)
            assert entry.keys() == {token, *top.indices.tolist()}
            for token_id, logprob in entry.items():
                assert logprob.logprob == pytest.approx(theirs[row, token_id].item(), abs=1e-4)
            assert entry[token].rank == 1 + (theirs[row] > theirs[row, token]).sum().item()
        total = sum(entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True))
        assert completion.cumulative_logprob == pytest.approx(total)


def test_no_logprobs_unless_asked(llm: LLM) -> None:
    (output,) = generate(llm, TEXTS[0])
    assert output.prompt_logprobs is None and output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


# --- streams ----------------------------------------------------------------------------------------------------------


def test_stream_deltas_join_to_the_text(llm: LLM) -> None:
    params = GREEDY.replace(max_tokens=20, logprobs=0)
    (whole,) = generate(llm, TEXTS[0], params)
    parts = list(llm.stream(TEXTS[0], params))
    assert len(parts) == 20, "one output per step"
    assert "".join(part.outputs[0].text for part in parts) == whole.outputs[0].text
    assert [t for part in parts for t in part.outputs[0].token_ids] == whole.outputs[0].token_ids
    assert sum(len(part.outputs[0].logprobs) for part in parts) == 20
    assert [part.finished for part in parts] == [False] * 19 + [True]


def test_stream_of_several_completions(llm: LLM) -> None:
    params = SamplingParams(n=2, seed=1, max_tokens=8, ignore_eos=True)
    (whole,) = generate(llm, TEXTS[0], params)
    texts = ["", ""]
    for part in llm.stream(TEXTS[0], params):
        for completion in part.outputs:
            texts[completion.index] += completion.text
    assert texts == [completion.text for completion in whole.outputs] and part.finished


def test_stream_with_final_only(llm: LLM) -> None:
    (part,) = llm.stream(TEXTS[0], GREEDY.replace(output_kind=RequestOutputKind.FINAL_ONLY))
    assert part.finished and part.outputs[0].text == generate(llm, TEXTS[0])[0].outputs[0].text


def test_leaving_a_stream_early_aborts_it(llm: LLM) -> None:
    for count, _ in enumerate(llm.stream(TEXTS[0], GREEDY.replace(max_tokens=100))):
        if count == 3:
            break
    assert_idle(llm)
    stream = llm.stream(TEXTS[0], GREEDY)
    next(stream)
    stream.close()
    assert_idle(llm)


def test_streams_can_be_read_in_turns(llm: LLM) -> None:
    """Whoever steps the engine, every stream gets its own outputs; a `generate` in between does not take them."""
    expected = [output.outputs[0].text for output in generate(llm, TEXTS)]
    texts = [""] * 3
    streams = {i: llm.stream(text, GREEDY) for i, text in enumerate(TEXTS)}
    while streams:
        for i, stream in list(streams.items()):
            part = next(stream, None)
            if part is None:
                del streams[i]
            else:
                texts[i] += part.outputs[0].text
        if len(texts[0]) < 4:
            assert generate(llm, TEXTS[1])[0].outputs[0].text == expected[1]
    assert texts == expected


def test_a_stream_aborted_from_outside_ends(llm: LLM) -> None:
    stream = llm.stream(TEXTS[0], GREEDY)
    first = next(stream)
    llm.llm_engine.abort_request(first.request_id)
    assert list(stream) == []


# --- chat -------------------------------------------------------------------------------------------------------------


def test_chat_applies_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    wanted = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt == wanted
    assert output.prompt_token_ids == llm.get_tokenizer().encode(wanted, add_special_tokens=False)
    assert tokens_of([output]) == tokens_of(generate(llm, {"prompt_token_ids": output.prompt_token_ids}))


def test_several_chats_and_a_template_of_ones_own(llm: LLM) -> None:
    chats = [[{"role": "user", "content": text}] for text in TEXTS[:2]]
    outputs = llm.chat(chats, GREEDY, use_tqdm=False, chat_template="{{ messages[0]['content'] }}!")
    assert [output.prompt for output in outputs] == [text + "!" for text in TEXTS[:2]]


@pytest.mark.parametrize("messages", [[], "Hello", None])
def test_chat_refuses_what_is_no_conversation(llm: LLM, messages: Any) -> None:
    with pytest.raises(ValueError, match="messages must be a non-empty list"):
        llm.chat(messages)


# --- wrong inputs -----------------------------------------------------------------------------------------------------

WRONG_PROMPTS: list[tuple[Any, str]] = [
    ("", "prompt 1: the prompt cannot be empty"),
    ([], "prompt 1: the prompt cannot be empty"),
    ([5, 264], "prompt 1: the prompt: token id 264 is out of vocabulary"),
    ([5, -1], "prompt 1: the prompt: token id -1"),
    ([5, 1.5], "prompt 1: token ids must be integers, got 1.5"),
    ([5] * MAX_MODEL_LEN, "prompt 1: .*longer than the maximum model length of 128"),
    (None, "prompt 1: a prompt must be a string"),
    ({"text": "Hello"}, "prompt 1: unknown prompt key 'text'"),
    ({"prompt": 7}, "prompt 1: a prompt given as a dict needs"),
]


@pytest.mark.parametrize("wrong,message", WRONG_PROMPTS, ids=lambda v: str(v)[:30])
def test_a_wrong_prompt_among_others_adds_nothing(llm: LLM, wrong: Any, message: str) -> None:
    steps = llm.stats().num_steps
    with pytest.raises(ValueError, match=message):
        generate(llm, [TEXTS[0], wrong, TEXTS[1]])
    assert not llm.llm_engine.has_unfinished_requests() and llm.stats().num_steps == steps


@pytest.mark.parametrize(
    "params,message",
    [
        ([], "0 sampling_params for 2 prompts"),
        ([GREEDY], "1 sampling_params for 2 prompts"),
        ([GREEDY] * 3, "3 sampling_params for 2 prompts"),
        ([GREEDY, None], "prompt 1: sampling_params must be a SamplingParams, got NoneType"),
        ({"temperature": 0.5}, "prompt 0: sampling_params must be a SamplingParams, got dict"),
        ([GREEDY, GREEDY.replace(logprobs=21)], "prompt 1: logprobs: 21 is greater than the maximum allowed, 20"),
        ([GREEDY, GREEDY.replace(stop_token_ids=[264])], "prompt 1: stop_token_ids: token id 264"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_wrong_params_add_nothing(llm: LLM, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(llm, TEXTS[:2], params)
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("prompts", [5, None, 1.5, object()])
def test_what_is_no_prompt_at_all(llm: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match="prompts must be a string, token ids, a dict or a list of those"):
        generate(llm, prompts)


def test_wrong_priorities(llm: LLM) -> None:
    with pytest.raises(ValueError, match="1 priority for 2 prompts"):
        generate(llm, TEXTS[:2], priority=[1])
    with pytest.raises(ValueError, match="prompt 1: priority must be an integer"):
        generate(llm, TEXTS[:2], priority=[1, "high"])


def test_an_unknown_argument_is_refused_with_the_nearest(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown engine argument 'max_num_seq'; did you mean 'max_num_seqs'"):
        LLM(str(folder), max_num_seq=4)


def test_a_preset_that_does_not_exist(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown milestone 'm99'"):
        LLM(str(folder), preset="m99")
    with pytest.raises(ValueError, match="there is no engine before m1"):
        LLM(str(folder), preset="m0")


def test_a_cache_that_is_too_small_is_refused_with_the_numbers(folder: Path) -> None:
    with pytest.raises(ValueError, match="one request of max_model_len=128 needs 8 blocks of 16 tokens"):
        LLM(str(folder), preset="m3", max_model_len=128, num_kv_blocks=8)


# --- when a step fails ------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


@pytest.mark.parametrize("method", ["execute", "sample"])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("at_step", [0, 4])
def test_the_engine_survives_a_failed_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, method: str, error: type[BaseException], at_step: int
) -> None:
    expected = tokens_of(generate(llm, TEXTS))
    executor = llm.llm_engine.engine_core.executor
    working, calls = getattr(executor, method), iter(range(1000))

    def fail(argument: Any) -> Any:
        if next(calls) == at_step:
            raise error("in the middle of a step")
        return working(argument)

    monkeypatch.setattr(executor, method, fail)
    params = SamplingParams(n=2, seed=1, max_tokens=10)
    with pytest.raises(error):
        generate(llm, [*TEXTS, TEXTS[0]], [GREEDY] * 3 + [params])
    assert not llm.llm_engine.has_unfinished_requests()
    assert tokens_of(generate(llm, TEXTS)) == expected


def test_a_failed_step_spares_who_was_not_in_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight seats: the ninth request waits while the others fail, and is served after."""
    engine = llm.llm_engine
    for i in range(9):
        engine.add_request(f"request {i}", TEXTS[0], GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine_core.executor, "execute", lambda _: (_ for _ in ()).throw(Boom()))
        with pytest.raises(Boom):
            engine.step()
    finished = []
    while engine.has_unfinished_requests():
        finished += [output for output in engine.step() if output.finished]
    assert [output.request_id for output in finished] == ["request 8"]
    assert tokens_of(finished) == tokens_of(generate(llm, TEXTS[0]))


# --- the engine underneath --------------------------------------------------------------------------------------------


def test_requests_may_come_while_others_run(llm: LLM) -> None:
    expected = {str(i): tokens for i, tokens in enumerate(tokens_of(generate(llm, TEXTS)))}
    engine, got, steps = llm.llm_engine, {}, 0
    names = iter(expected)
    while len(got) < 3:
        if steps % 4 == 0 and (name := next(names, None)) is not None:
            engine.add_request("mine " + name, TEXTS[int(name)], GREEDY)
        for output in engine.step():
            if output.finished:
                got[output.request_id.removeprefix("mine ")] = output.outputs[0].token_ids
        steps += 1
    assert got == expected


def test_generate_beside_requests_of_ones_own(llm: LLM) -> None:
    """Requests added to `llm_engine` run along; their outputs are not mistaken for the call's, nor their ids taken."""
    engine = llm.llm_engine
    taken = next(llm._request_ids) + 1
    for request_id in (str(taken), "mine"):
        engine.add_request(request_id, TEXTS[0], GREEDY.replace(max_tokens=2))
    outputs = generate(llm, TEXTS[1:])
    assert [output.prompt for output in outputs] == TEXTS[1:]
    assert [len(tokens) for tokens in tokens_of(outputs)] == [12, 12]
    assert str(taken) not in {output.request_id for output in outputs}


def test_an_id_in_use_is_refused(llm: LLM) -> None:
    llm.llm_engine.add_request("mine", TEXTS[0], GREEDY)
    with pytest.raises(ValueError, match="'mine' is in use"):
        llm.llm_engine.add_request("mine", TEXTS[1], GREEDY)
    llm.llm_engine.abort_request("mine")


def test_metrics_are_filled(llm: LLM) -> None:
    assert llm.reset_prefix_cache()  # other tests have asked the same
    for output in generate(llm, TEXTS):
        m = output.metrics
        assert m.num_generation_tokens == 12 and len(m.inter_token_latencies) == 11
        assert m.queue_time >= 0 and 0 < m.prefill_time < m.inference_time <= m.e2e_latency
        assert m.time_to_first_token >= m.prefill_time and m.time_per_output_token > 0
        assert m.decode_time == pytest.approx(sum(m.inter_token_latencies))
        assert output.num_cached_tokens == 0
    block_size = llm.config.block_size
    for output in generate(llm, TEXTS):
        assert output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // block_size * block_size


def test_stats_count(llm: LLM) -> None:
    before = llm.stats()
    outputs = generate(llm, TEXTS)
    after = llm.stats()
    assert after.num_generation_tokens - before.num_generation_tokens == 36
    assert after.num_prompt_tokens - before.num_prompt_tokens == sum(len(o.prompt_token_ids) for o in outputs)
    assert after.num_steps - before.num_steps == 12
    assert after.num_running == after.num_waiting == after.num_reserved_slots == 0


def test_stats_while_running(llm: LLM) -> None:
    stream = llm.stream({"prompt_token_ids": [5] * 20}, GREEDY)
    next(stream)
    stats = llm.stats()
    assert (stats.num_running, stats.num_used_slots, stats.num_reserved_slots) == (1, 20, 32)
    assert 0 < stats.kv_cache_usage < 1 and stats.num_scheduled_tokens == 20
    stream.close()


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    bars: list[tqdm] = []

    def my_tqdm(*args: Any, **kwargs: Any) -> tqdm:
        bars.append(tqdm(*args, **kwargs))
        return bars[-1]

    llm.generate(TEXTS, GREEDY, use_tqdm=my_tqdm)
    assert len(bars) == 1 and bars[0].n == bars[0].total == 3
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown and "output " in shown and "tok/s" in shown
    llm.generate(TEXTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_naive_agrees(llm: LLM, folder: Path) -> None:
    (output,) = generate(llm, TEXTS[2])
    assert GapNaiveModel(folder).run(output.prompt_token_ids, GREEDY).tokens == output.outputs[0].token_ids
