"""`folovllm bench serve` without a server: what is sent and when, and the arithmetic of its figures by hand."""

import itertools
import json
import statistics

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from folovllm.benchmarks.serve.answers import Answer, read_answer
from folovllm.benchmarks.serve.load import Exchange, LoadRun
from folovllm.benchmarks.serve.metrics import client_figures, in_flight, meets, serve_figures, warnings
from folovllm.benchmarks.serve.options import ServeOptions, parse_options
from folovllm.benchmarks.serve.traffic import (
    ServeRequest,
    arrival_times,
    file_prompts,
    lengths_around,
    random_prompts,
)
from folovllm.benchmarks.workloads import LAST_RANDOM_ID, make_workload
from folovllm.engine.tokenizer import Tokenizer
from tests.m1.tiny_tokenizers import CORPUS, byte_fallback, byte_level

pytestmark = pytest.mark.m8


def event(text: str = "", finish: str | None = None, **fields: object) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish, **fields}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


def usage(prompt: int, completion: int) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return f"data: {json.dumps({'choices': [], 'usage': counts})}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def read(*chunks: tuple[float, bytes], sent: float = 1.0, output_len: int = 8, **fields: object) -> Answer:
    """The answer to a request that was sent at second 1."""
    seen = Exchange(due=sent, sent=sent, ended=chunks[-1][0] if chunks else sent, chunks=list(chunks))
    vars(seen).update({"status": 200, **fields})
    return read_answer(seen, ServeRequest("a prompt", None, output_len))


# --- one answer


def test_latencies_of_one_answer():
    answer = read(
        (1.5, event("Once")),
        (1.7, event(" upon")),
        (2.1, event(" a", "length")),
        (2.9, usage(5, 3)),
        (3.0, DONE),
    )
    assert answer.error is None and answer.output_tokens == 3 and answer.prompt_tokens == 5
    assert answer.ttft == pytest.approx(0.5)
    assert answer.e2e_latency == pytest.approx(1.1)  # the usage chunk and [DONE] are not part of the answer
    assert answer.tpot == pytest.approx((1.1 - 0.5) / 2)
    assert answer.inter_token_latencies == pytest.approx([0.2, 0.4])


def test_tokens_are_counted_by_usage_and_not_by_chunks():
    """A server that merges tokens sends 9 tokens in 2 chunks: TPOT is an eighth of the gap, ITL is the gap."""
    answer = read((2.0, event("five tokens at once")), (4.0, event("four", "length")), (4.0, usage(1, 9)), (4.0, DONE))
    assert answer.output_tokens == 9
    assert answer.tpot == pytest.approx(2.0 / 8)
    assert answer.inter_token_latencies == pytest.approx([2.0])


def test_without_usage_tokens_are_counted_by_ids_or_by_the_length_that_was_reached():
    ids = read((2.0, event("ab", token_ids=[7, 8])), (3.0, event("c", "stop", token_ids=[9])), (3.0, DONE))
    assert ids.output_tokens == 3
    length = read((2.0, event("ab")), (3.0, event("", "length")), (3.0, DONE), output_len=8)
    assert length.output_tokens == 8
    unknown = read((2.0, event("ab")), (3.0, event("", "stop")), (3.0, DONE))
    assert unknown.error is None and unknown.output_tokens is None and unknown.tpot is None


def test_a_chunk_without_text_is_no_token():
    """The first chunk of a chat has the role and no text; a token without visible text has its id."""
    role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    text = b'data: {"choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]}\n\n'
    assert read((1.1, role), (1.6, text), (1.6, DONE)).ttft == pytest.approx(0.6)
    assert read((1.1, event("")), (1.6, event("a", "stop")), (1.6, DONE)).ttft == pytest.approx(0.6)
    assert read((1.1, event("", token_ids=[5])), (1.6, event("a", "stop")), (1.6, DONE)).ttft == pytest.approx(0.1)


def test_an_event_counts_from_the_moment_of_its_last_byte():
    choice = {"text": "你", "finish_reason": "length"}
    data = f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode() + DONE
    cut = data.index("你".encode()) + 1  # inside the character
    answer = read((2.0, data[:cut]), (3.0, data[cut:]))
    assert answer.error is None and answer.ttft == pytest.approx(2.0)


def test_one_token_has_no_tpot():
    answer = read((2.0, event("a", "length")), (2.0, usage(1, 1)), (2.0, DONE))
    assert answer.ttft == pytest.approx(1.0) and answer.tpot is None and answer.inter_token_latencies == []


@pytest.mark.parametrize(
    ("chunks", "fields", "error"),
    [
        ([(2.0, b'{"error": {"message": "too many"}}')], {"status": 429}, "HTTP 429: too many"),
        ([(2.0, b'{"detail": "Not Found"}')], {"status": 404}, "HTTP 404: Not Found"),
        ([(2.0, b"<html>down</html>")], {"status": 502}, "HTTP 502: <html>down</html>"),
        ([], {"status": 500}, "HTTP 500: an empty body"),
        ([], {"status": None, "error": "ClientConnectorError: refused"}, "ClientConnectorError: refused"),
        ([(2.0, event("a"))], {}, "the stream ended in mid-answer"),
        ([(2.0, event("a"))], {"error": "no complete answer within 5 s"}, "no complete answer within 5 s"),
        ([(2.0, b'data: {"error": {"message": "oom"}}\n\n'), (2.1, DONE)], {}, "error in the stream: oom"),
        ([(2.0, event("a", "abort")), (2.1, DONE)], {}, "the server ended it: finish_reason 'abort'"),
        ([(2.0, b"data: {nonsense\n\n"), (2.1, DONE)], {}, "not a chunk of a completion: {nonsense"),
        ([(2.0, b"data: [1, 2]\n\n"), (2.1, DONE)], {}, "not a chunk of a completion: [1, 2]"),
    ],
)
def test_an_incomplete_answer_is_a_failure_with_its_reason(chunks, fields, error):
    assert read(*chunks, **fields).error == error


# --- figures


def answer(ttft: float, *gaps: float, tokens: int | None = None, error: str | None = None, sent: float = 0.0) -> Answer:
    times = [sent + ttft]
    for gap in gaps:
        times.append(times[-1] + gap)
    return Answer(sent, times[-1], error, times, times[-1], 10, len(times) if tokens is None else tokens, "length")


def test_figures_of_a_run():
    answers = [answer(0.1, 0.02, 0.04), answer(0.3, 0.06), answer(9.0, 9.0, error="HTTP 429: full", sent=0.1)]
    figures = serve_figures(answers, 2.0, {"ttft": 200.0}, [50, 99])
    assert (figures["completed"], figures["failed"], figures["errors"]) == (2, 1, {"HTTP 429: full": 1})
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (20, 5)
    assert figures["output_throughput"] == pytest.approx(2.5)
    assert figures["total_token_throughput"] == pytest.approx(12.5)
    assert figures["request_throughput"] == pytest.approx(1.0)
    assert figures["request_goodput"] == pytest.approx(0.5)
    assert figures["mean_ttft_ms"] == pytest.approx(200.0) and figures["std_ttft_ms"] == pytest.approx(100.0)
    assert figures["p99_ttft_ms"] == pytest.approx(100 + 0.99 * 200)  # between two values, linear
    assert figures["median_tpot_ms"] == pytest.approx((30 + 60) / 2)  # per request
    assert figures["median_itl_ms"] == pytest.approx(40)  # over all gaps: 20, 40, 60
    assert figures["max_concurrent_requests"] == 3  # the failed one was in flight, too


def test_a_run_in_which_all_failed_still_has_figures():
    figures = serve_figures([answer(1.0, error="refused")], 2.0, {}, [99])
    assert (figures["completed"], figures["failed"], figures["p99_ttft_ms"]) == (0, 1, None)
    assert figures["request_goodput"] is None  # no promise was named


def test_goodput_needs_every_promise():
    slow_start, slow_flow, good = answer(0.6, 0.01), answer(0.1, 0.2), answer(0.1, 0.01)
    promises = {"ttft": 500.0, "tpot": 50.0}
    assert [meets(one, promises) for one in (slow_start, slow_flow, good)] == [False, False, True]
    assert meets(answer(0.1), {"tpot": 1.0})  # one token: there is no TPOT that could be too long
    assert not meets(answer(0.1, 0.01, 0.3), {"itl": 100.0})  # each gap counts
    assert not meets(answer(0.1, 2.0), {"e2el": 2000.0})


def test_requests_in_flight_over_time():
    answers = [answer(1.0, sent=0.0), answer(2.0, sent=0.5), answer(0.5, sent=1.0)]
    assert in_flight(answers) == [(0.0, 1), (0.5, 2), (1.0, 2), (1.5, 1), (2.5, 0)]


def test_the_clients_own_lag_is_reported():
    late = Exchange(due=1.0, ready=1.5, sent=1.5)
    held_back = Exchange(due=1.0, ready=1.0, sent=3.0)
    client = client_figures(LoadRun([late, held_back, Exchange(2.0, 2.001, 2.001)], 10.0, 2.5, [0.0, 0.004]))
    assert (client["late_sends"], client["held_back"], client["cpu_share"]) == (1, 1, 0.25)
    assert client["max_send_lag_ms"] == pytest.approx(500)
    figures = serve_figures([answer(0.1), answer(0.1, tokens=3)], 1.0, {}, [50])
    lines = warnings(figures, client, 3, wanted_tokens=9)
    assert [line.split(":")[0] for line in lines] == [
        "4 tokens instead of 9",
        "the client sent 1 of 3 requests more than 10 ms late (at most 500 ms)",
        "--max-concurrency held 1 requests back",
    ]


# --- arrivals and prompts


def test_poisson_arrivals_have_the_rate_and_the_spread_that_they_should_have():
    times = arrival_times(4_000, rate=5.0, burstiness=1.0, seed=0)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times == sorted(times) and times[-1] == pytest.approx(4_000 / 5.0)
    assert statistics.fmean(gaps) == pytest.approx(0.2, rel=0.01)
    assert statistics.pstdev(gaps) == pytest.approx(0.2, rel=0.1)  # an exponential gap varies as much as it lasts
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # 1 / e


def test_burstiness_changes_the_spread_and_not_the_rate():
    spreads = []
    for burstiness in (0.25, 4.0):
        times = arrival_times(4_000, 5.0, burstiness, seed=0)
        assert times[-1] == pytest.approx(800.0)
        spreads.append(statistics.pstdev(b - a for a, b in itertools.pairwise(times)))
    assert spreads == pytest.approx([0.2 * 2, 0.2 / 2], rel=0.15)  # the mean gap over the root of the burstiness


def test_arrivals_follow_the_seed():
    assert arrival_times(50, 2.0, 1.0, seed=3) == arrival_times(50, 2.0, 1.0, seed=3)
    assert arrival_times(50, 2.0, 1.0, seed=3) != arrival_times(50, 2.0, 1.0, seed=4)
    assert arrival_times(3, float("inf"), 1.0, seed=3) == [0.0, 0.0, 0.0]


def test_random_prompts_are_workload_a_unless_lengths_or_seed_differ():
    workload = make_workload("A", LAST_RANDOM_ID + 1, 5).requests
    found = random_prompts(5, 0, None)
    assert [(r.prompt, r.output_len) for r in found] == [(r.prompt_token_ids, r.output_len) for r in workload]
    assert random_prompts(5, 1, None) != found
    other = random_prompts(20, 0, None, prompt_len=lengths_around(10, 0.2, (1, 1)), output_len=(4, 4))
    assert {len(r.prompt) for r in other} == {8, 9, 10, 11, 12} and {r.output_len for r in other} == {4}


def word_tokenizer() -> Tokenizer:
    """Byte-level with words: a space begins a new token, as in SmolLM2."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend)


def test_random_texts_have_exactly_the_tokens_of_the_random_ids():
    tokenizer = word_tokenizer()
    texts, ids = (random_prompts(8, 0, tokenizer, as_text=as_text) for as_text in (True, False))
    assert [len(tokenizer.encode(r.prompt)) for r in texts] == [len(r.prompt) for r in ids]
    assert [r.output_len for r in texts] == [r.output_len for r in ids]
    assert len({r.prompt for r in texts}) == 8


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (None, "--tokenizer"),
        (byte_level(), "this tokenizer joins words"),
        (byte_fallback(), "no words of one token each"),
    ],
)
def test_texts_of_unknown_length_are_refused(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        random_prompts(3, 0, tokenizer, as_text=True)


def test_prompts_of_a_file(tmp_path):
    conversation = {"conversations": [{"from": "human", "value": "the dog"}, {"from": "gpt", "value": "the sun"}]}
    items = ["the fox", {"prompt": "the end", "output_len": 7}, conversation]
    lines, whole = tmp_path / "p.jsonl", tmp_path / "p.json"
    lines.write_text("\n".join(map(json.dumps, items)))
    whole.write_text(json.dumps(items))
    tokenizer = byte_level()
    for path in (lines, whole):
        found = file_prompts(path, None, tokenizer, output_len=5)
        assert [(r.prompt, r.output_len) for r in found] == [("the fox", 5), ("the end", 5), ("the dog", 5)]
    whole.write_text(json.dumps(items[1:]))
    lengths = [7, len(tokenizer.encode("the sun"))]
    assert [r.output_len for r in file_prompts(whole, None, tokenizer, None)] == lengths
    assert len(file_prompts(whole, 1, tokenizer, None)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 prompts"),
        ('{"prompt": "a", "output_len": 3}', "has 1 prompts; ask for fewer"),
        ("{", "neither a JSON list nor"),
        ('["a", "b"]', "item 1: how many tokens"),
        ('[{"prompt": ""}, "b"]', 'item 1: no text in "prompt"'),
        ("[3, 4]", "item 1: expected a text or an object"),
        ('[{"conversations": []}, "b"]', 'item 1: no text in "prompt"'),
        ('[{"conversations": ["hello"]}, "b"]', 'item 1: no text in "prompt"'),
    ],
)
def test_a_file_that_is_no_set_of_prompts_is_refused(tmp_path, text, message):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        file_prompts(tmp_path / "p.jsonl", 2, None, None)


# --- the command line


def test_options_are_vllms():
    command = (
        "--host 10.0.0.1 --port 81 --request-rate 2.5 --burstiness 0.5 --max-concurrency 4 --ignore-eos --seed 3 "
        "--goodput ttft:500 tpot:50.5 --percentile-metrics ttft,e2el --metric-percentiles 50,99.9"
    )
    options = parse_options(command.split())
    assert options.url == "http://10.0.0.1:81/v1/completions"
    assert (options.request_rate, options.burstiness, options.max_concurrency, options.seed) == (2.5, 0.5, 4, 3)
    assert options.goodput == (("ttft", 500.0), ("tpot", 50.5))
    assert (options.percentile_metrics, options.metric_percentiles) == (("ttft", "e2el"), (50.0, 99.9))
    assert parse_options([]) == ServeOptions()
    assert parse_options(["--base-url", "https://x/v1/"]).url == "https://x/v1/completions"
    assert parse_options(["--endpoint", "/v1/chat/completions"]).as_text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--goodput ttff:5", "did you mean 'ttft'"),
        ("--goodput ttft", "argument --goodput"),
        ("--percentile-metrics tpto", "did you mean 'tpot'"),
        ("--metric-percentiles 101", "from 0 to 100"),
        ("--request-rate 0", "above 0"),
        ("--request-rate nan", "above 0"),
        ("--request-rate fast", "argument --request-rate"),
        ("--num-warmups -1", "argument --num-warmups"),
        ("--random-range-ratio 1", "below 1"),
        ("--base-url http://10.0.0.1:port", "is not the URL of a server"),
        ("--dataset-name sharegpt", "belong together"),
        ("--dataset-path p.jsonl", "belong together"),
        ("--header Authorization", "KEY=VALUE"),
        ("--extra-body [1]", "JSON object"),
        ("--extra-body {", "argument --extra-body"),
        ("--prompts ids --endpoint /v1/chat/completions", "a chat takes texts only"),
    ],
)
def test_a_wrong_option_is_refused_with_what_to_do(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_options(argv.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err
