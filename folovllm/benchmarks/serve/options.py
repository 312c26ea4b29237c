"""The command line of `folovllm bench serve`, checked before anything is sent.

Milestone: M8. vLLM counterpart: `add_cli_args` in vllm/benchmarks/serve.py, whose option names are used.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.benchmarks.options import names, positive
from folovllm.benchmarks.serve.metrics import LATENCIES
from folovllm.benchmarks.workloads import A_OUTPUT_LEN, A_PROMPT_LEN
from folovllm.entrypoints.openai_client import base_url
from folovllm.utils import unknown_name_message

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RANDOM, SHAREGPT = "random", "sharegpt"
Add = Callable[..., object]  # a group's add_argument
DESCRIPTION = """\
Send requests to an OpenAI-compatible server at a given rate and measure what its users feel: the time to the first
token (TTFT), the time per output token (TPOT), the gaps between chunks (ITL), throughput, and goodput under an SLO.

  folovllm serve &
  folovllm bench serve --request-rate 2 --num-prompts 60 --ignore-eos --goodput ttft:500 tpot:50 --plot"""


@dataclass(frozen=True)
class ServeOptions:
    """What was asked for."""

    base_url: str = "http://127.0.0.1:8000"
    endpoint: str = COMPLETIONS
    model: str | None = None  # None: ask the server
    tokenizer: str | None = None
    dataset_name: str = RANDOM
    dataset_path: Path | None = None
    random_input_len: int | None = None
    random_output_len: int | None = None
    random_range_ratio: float = 0.0
    sharegpt_output_len: int | None = None
    prompts: str | None = None  # of the random data set: "ids" | "text"; None: ids, texts in a chat
    num_prompts: int | None = None
    num_warmups: int = 1
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ignore_eos: bool = False
    seed: int = 0
    goodput: tuple[tuple[str, float], ...] = ()
    percentile_metrics: tuple[str, ...] = LATENCIES[:3]
    metric_percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    header: tuple[tuple[str, str], ...] = ()
    extra_body: dict[str, Any] | None = None
    timeout: float = 600.0
    disable_tqdm: bool = False
    save_result: bool = False
    result_dir: Path = Path("bench_results")
    result_filename: str | None = None
    plot: bool = False

    @property
    def url(self) -> str:
        return base_url(self.base_url).removesuffix("/v1") + self.endpoint

    @property
    def api_key(self) -> str | None:
        return dict(self.header).get("Authorization", "").removeprefix("Bearer ") or None

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("/chat/completions")

    @property
    def as_text(self) -> bool:
        return self.is_chat or self.prompts == "text"


def make_parser() -> argparse.ArgumentParser:
    """An option that is not given is left out: the defaults are those of ServeOptions."""
    parser = argparse.ArgumentParser(
        prog="folovllm bench serve",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_server(parser.add_argument_group("the server").add_argument)
    _add_requests(parser.add_argument_group("the requests").add_argument)
    _add_load(parser.add_argument_group("the load").add_argument)
    _add_result(parser.add_argument_group("the result").add_argument)
    return parser


def _add_server(add: Add) -> None:
    add("--base-url", metavar="URL", help="e.g. http://127.0.0.1:8000 (default); instead of --host and --port")
    add("--host", help="default: 127.0.0.1")
    add("--port", type=positive, help="default: 8000")
    add("--endpoint", help=f"default: {COMPLETIONS}; or {CHAT}")
    add("--model", help="its name at the server (default: the first of /v1/models)")
    add("--header", type=_header, nargs="+", metavar="KEY=VALUE", help="e.g. Authorization='Bearer KEY'")
    add("--extra-body", type=_json_object, metavar="JSON", help="more fields of every request")
    add("--timeout", type=_above_zero, metavar="SECONDS", help="of one whole answer (default: 600)")


def _add_requests(add: Add) -> None:
    add("--dataset-name", choices=[RANDOM, SHAREGPT],
        help=f"{RANDOM} (default): random tokens, as long as those of workload A ({A_PROMPT_LEN[0]}-{A_PROMPT_LEN[1]} "
        f"in, {A_OUTPUT_LEN[0]}-{A_OUTPUT_LEN[1]} out) or as given; {SHAREGPT}: prompts of a file")  # fmt: skip
    add("--dataset-path", type=Path, metavar="FILE",
        help='JSON lines or a list: texts, objects with "prompt" and "output_len", or conversations in ShareGPT\'s '
        "form")  # fmt: skip
    add("--num-prompts", type=positive, metavar="N", help="default: 100, or the whole file")
    add("--random-input-len", type=positive, metavar="TOKENS")
    add("--random-output-len", type=positive, metavar="TOKENS")
    add("--random-range-ratio", type=_fraction, metavar="R",
        help="lengths vary evenly between (1 - R) and (1 + R) times the given ones (default: 0)")  # fmt: skip
    add("--sharegpt-output-len", type=positive, metavar="TOKENS", help="instead of the file's lengths")
    add("--prompts", choices=["ids", "text"],
        help="random prompts as token ids (default) or as words of one token each (default in a chat)")  # fmt: skip
    add("--tokenizer", metavar="NAME", help="alias or folder (default: the model's name, if it is one)")
    add("--ignore-eos", action="store_true", help="every answer has as many tokens as were asked for")
    add("--seed", type=int, help="of prompts and arrivals (default: 0)")


def _add_load(add: Add) -> None:
    add("--request-rate", type=_above_zero, metavar="PER_SECOND",
        help="average rate of arrivals, which do not wait for answers; inf (default): all at once")  # fmt: skip
    add("--burstiness", type=_above_zero, metavar="B",
        help="1 (default): a Poisson process; below: bursts; above: evenly")  # fmt: skip
    add("--max-concurrency", type=positive, metavar="N", help="at most N requests at once")
    add("--num-warmups", type=_count, metavar="N", help="short requests before the run (default: 1)")


def _add_result(add: Add) -> None:
    add("--goodput", type=_promise, nargs="+", metavar="KEY:MS",
        help="count the requests that keep all of these, e.g. ttft:500 tpot:50 e2el:3000 (milliseconds)")  # fmt: skip
    add("--percentile-metrics", type=names, metavar="ttft,...", help="the latencies to show (default: ttft,tpot,itl)")
    add("--metric-percentiles", type=_percentiles, metavar="50,...", help="default: 50,90,99")
    add("--save-result", action="store_true", help="write the figures as JSON, and the latencies of every request")
    add("--result-dir", type=Path, help="default: bench_results")
    add("--result-filename", metavar="NAME", help="default: serve_MODEL_RATE_DATE.json")
    add("--plot", action="store_true", help="write a picture: distributions, and the run over time")
    add("--disable-tqdm", action="store_true", help="no progress bar")


def parse_options(argv: Sequence[str]) -> ServeOptions:
    """Options from arguments; a mistake ends the program with a message (exit status 2), as argparse does."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    address = f"http://{given.pop('host', '127.0.0.1')}:{given.pop('port', 8000)}"
    given["base_url"] = given.get("base_url", address)
    for name in ("goodput", "percentile_metrics", "header"):
        if name in given:
            given[name] = tuple(given[name])
    options = ServeOptions(**given)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: ServeOptions) -> None:
    base_url(options.base_url)
    for name in [*options.percentile_metrics, *(name for name, _ in options.goodput)]:
        if name not in LATENCIES:
            raise ValueError(unknown_name_message("latency", name, LATENCIES))
    if (options.dataset_name == SHAREGPT) != (options.dataset_path is not None):
        raise ValueError(f"--dataset-name {SHAREGPT} and --dataset-path FILE belong together")
    if options.is_chat and options.prompts == "ids":
        raise ValueError(f"--prompts ids: a chat takes texts only; use --endpoint {COMPLETIONS}")


def _above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _percentiles(text: str) -> tuple[float, ...]:
    found = tuple(float(part) for part in names(text))
    if not all(0 <= value <= 100 for value in found):
        raise argparse.ArgumentTypeError(f"expected percentiles from 0 to 100 like 50,99, got {text!r}")
    return found


def _promise(text: str) -> tuple[str, float]:
    """E.g. "ttft:500" -> ("ttft", 500.0)."""
    name, _, limit = text.partition(":")
    return name, _above_zero(limit or "0")


def _header(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return name, value


def _json_object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return found
