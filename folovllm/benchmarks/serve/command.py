"""`folovllm bench serve` from its command line to its files.

Milestone: M8. vLLM counterpart: `main_async` and `benchmark` in vllm/benchmarks/serve.py. No torch in this process.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import command_line, machine_header
from folovllm.benchmarks.report import write_json
from folovllm.benchmarks.serve import report
from folovllm.benchmarks.serve.answers import Answer, read_answer
from folovllm.benchmarks.serve.load import LoadRun, Target, run_load
from folovllm.benchmarks.serve.metrics import client_figures, serve_figures, warnings
from folovllm.benchmarks.serve.options import RANDOM, ServeOptions, parse_options
from folovllm.benchmarks.serve.traffic import (
    ServeRequest,
    arrival_times,
    file_prompts,
    lengths_around,
    random_prompts,
)
from folovllm.benchmarks.workloads import A_OUTPUT_LEN, A_PROMPT_LEN
from folovllm.engine.tokenizer import Tokenizer
from folovllm.entrypoints.openai_client import OpenAIClient
from folovllm.hub import ALIASES, HubError, find_model
from folovllm.hub.find import find_tokenizer

SCHEMA = "folovllm.bench_serve/1"
WARM_UP_PROMPT, WARM_UP_OUTPUT = 64, 8  # characters or tokens of a prompt, tokens of an answer
Result = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """0 if every request was answered, 1 if some failed, 2 for a wrong command, 130 if it was interrupted."""
    options = parse_options(argv)
    try:
        result, answers = measure(options)
        result["run"]["command"] = shown_command(argv, options)
        files = write_files(options, result, answers)
    except (ValueError, OSError, HubError) as error:
        print(f"folovllm bench serve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("folovllm bench serve: interrupted; nothing was written", file=sys.stderr)
        return 130
    report.print_result(result, options, files)
    return 0 if result["figures"]["completed"] == len(answers) else 1


def shown_command(argv: Sequence[str], options: ServeOptions) -> str:
    """The command, without the values of headers: a result may be published, the key of a server may not."""
    command = f"folovllm {command_line('bench', ['serve', *argv])}"
    for _, value in options.header:
        command = command.replace(value, "...")
    return command


def measure(options: ServeOptions, tokenizer: Tokenizer | None = None) -> tuple[Result, list[Answer]]:
    """Run the load that the options describe. Raises ValueError if the server cannot be measured at all."""
    machine = machine_header()  # first: the load average should not be ours
    options = replace(options, model=options.model or asyncio.run(ask_model(options)))
    requests = make_requests(options, tokenizer or find_its_tokenizer(options))
    if options.num_warmups:
        warm_up(options, requests)
    due = arrival_times(len(requests), options.request_rate, options.burstiness, options.seed)
    with nullcontext(lambda: None) if options.disable_tqdm else report.ProgressBar(len(requests)) as advance:
        run = send(options, requests, due, options.max_concurrency, advance)
    answers = [read_answer(seen, request) for seen, request in zip(run.exchanges, requests, strict=True)]
    figures = serve_figures(answers, run.seconds, dict(options.goodput), options.metric_percentiles)
    client = client_figures(run)
    completed = [request for request, answer in zip(requests, answers, strict=True) if answer.error is None]
    wanted = sum(request.output_len for request in completed) if options.ignore_eos else None
    result = {
        "schema": SCHEMA,
        "date": datetime.now().isoformat(timespec="seconds"),
        "machine": machine,
        "run": describe_run(options, requests),
        "figures": figures,
        "client": client,
        "warnings": warnings(figures, client, len(requests), wanted),
    }
    return result, answers


async def ask_model(options: ServeOptions) -> str:
    """The first model that the server names."""
    async with OpenAIClient(options.base_url, options.api_key) as client:
        return str((await client.model_card())["id"])


def find_its_tokenizer(options: ServeOptions) -> Tokenizer | None:
    """The tokenizer that was asked for. Without --tokenizer: that of the model, if its name is one on this machine."""
    if options.tokenizer:
        return Tokenizer.from_folder(find_tokenizer(options.tokenizer))
    if options.model is None or options.model not in ALIASES:  # any other name could start a download
        return None
    try:
        return Tokenizer.from_folder(find_model(options.model))
    except HubError:
        return None


def make_requests(options: ServeOptions, tokenizer: Tokenizer | None) -> list[ServeRequest]:
    if options.dataset_name != RANDOM:
        assert options.dataset_path is not None
        return file_prompts(options.dataset_path, options.num_prompts, tokenizer, options.sharegpt_output_len)
    return random_prompts(
        options.num_prompts or 100,
        options.seed,
        tokenizer,
        as_text=options.as_text,
        prompt_len=lengths_around(options.random_input_len, options.random_range_ratio, A_PROMPT_LEN),
        output_len=lengths_around(options.random_output_len, options.random_range_ratio, A_OUTPUT_LEN),
    )


def warm_up(options: ServeOptions, requests: list[ServeRequest]) -> None:
    """A few short requests, all at once. They are real prompts backwards, so that no prefix cache knows a real one."""
    first = requests[: options.num_warmups]
    short = [ServeRequest(r.prompt[:WARM_UP_PROMPT][::-1], None, min(r.output_len, WARM_UP_OUTPUT)) for r in first]
    run = send(options, short, [0.0] * len(short))
    for seen, request in zip(run.exchanges, short, strict=True):
        if (error := read_answer(seen, request).error) is not None:
            raise ValueError(f"the warm-up at {options.url} failed, and nothing was measured: {error}")


def send(
    options: ServeOptions,
    requests: Sequence[ServeRequest],
    due: Sequence[float],
    max_concurrency: int | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> LoadRun:
    bodies = [json.dumps(request_body(options, request)).encode() for request in requests]
    target = Target(options.url, dict(options.header), options.timeout)
    return asyncio.run(run_load(target, bodies, due, max_concurrency, on_done))


def request_body(options: ServeOptions, request: ServeRequest) -> dict[str, Any]:
    message = {"messages": [{"role": "user", "content": request.prompt}]}
    return {
        "model": options.model,
        **(message if options.is_chat else {"prompt": request.prompt}),
        "max_tokens": request.output_len,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},  # the tokens are counted there, never by chunks
        **({"ignore_eos": True} if options.ignore_eos else {}),
        **(options.extra_body or {}),
    }


def describe_run(options: ServeOptions, requests: Sequence[ServeRequest]) -> Result:
    """What was sent, so that it can be sent again."""
    kept = ("endpoint", "model", "dataset_name", "as_text", "burstiness", "max_concurrency", "ignore_eos", "seed")
    rate = options.request_rate
    return {
        **{name: getattr(options, name) for name in kept},
        "num_prompts": len(requests),
        "request_rate": rate if rate < float("inf") else "inf",
        "goodput": dict(options.goodput),
        "wanted_tokens": sum(request.output_len for request in requests),
    }


def write_files(options: ServeOptions, result: Result, answers: Sequence[Answer]) -> list[Path]:
    """The JSON and the picture, if they were asked for; their paths."""
    rate, model = result["run"]["request_rate"], str(result["run"]["model"]).rpartition("/")[2]
    name = options.result_filename or f"serve_{model}_{rate}qps_{datetime.now():%Y%m%d-%H%M%S}.json"
    path, files = options.result_dir / name, []
    if options.save_result or options.result_filename:
        files.append(write_json(result | {"requests": [vars(answer) for answer in answers]}, path))
    if options.plot:
        from folovllm.benchmarks.serve.plot import write_plot  # matplotlib takes a while: not before the run

        files.append(write_plot(result, answers, path.with_suffix(".png")))
    return files
