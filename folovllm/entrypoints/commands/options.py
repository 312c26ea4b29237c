"""Options that several commands share: engine options, sampling options, and --debug.

Milestone: M1. vLLM counterpart: vllm/engine/arg_utils.py (`EngineArgs.add_cli_args`). Left out: a flag for every engine
argument. `--engine-arg NAME=VALUE` sets those that have none.
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from folovllm.config import DEFAULT_MODEL, EngineConfig
from folovllm.parts import check_parts
from folovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from folovllm.entrypoints.llm import LLM

ENGINE, SAMPLING = "Engine", "Sampling"  # panels of the help text


def set_debug(ctx: typer.Context, debug: bool) -> bool:
    """Stores --debug where `cli.FriendlyGroup` finds it, whatever its place on the command line."""
    if debug:
        ctx.find_root().meta["folovllm.debug"] = True
    return debug


def without_debug(ctx: typer.Context) -> list[str]:
    """The arguments of a command that parses its own, without --debug, which is stored."""
    set_debug(ctx, "--debug" in ctx.args)
    return [item for item in ctx.args if item != "--debug"]


DebugOption = Annotated[
    bool, typer.Option("--debug", callback=set_debug, help="Show the traceback of an error, not just its message.")
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Ask this server (any OpenAI API), e.g. http://127.0.0.1:8000, and start no engine.",
    ),
]
ApiKeyOption = Annotated[str | None, typer.Option("--api-key", metavar="KEY", help="The key of the server at --url.")]
DownloadDirOption = Annotated[
    str | None, typer.Option("--download-dir", metavar="DIR", help="Where models are kept.", rich_help_panel=ENGINE)
]


@dataclass(frozen=True)
class EngineOptions:
    """The options that choose the model and the engine. Every field is an option of its name; None
    means "not given".
    """

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="An alias, a HuggingFace folder or a HuggingFace id.",
            show_default=DEFAULT_MODEL,
            rich_help_panel=ENGINE,
        ),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(help="The engine as of a milestone, e.g. m1. Default: the newest.", rich_help_panel=ENGINE),
    ] = None
    without: Annotated[
        list[str] | None,
        typer.Option(
            help="Switch one milestone off, e.g. m2. Repeatable.", rich_help_panel=ENGINE, metavar="MILESTONE"
        ),
    ] = None
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=ENGINE)] = (
        None
    )
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.", rich_help_panel=ENGINE)] = None
    cpu_threads: Annotated[
        int | None,
        typer.Option(help="Threads that compute on a CPU. Default: as many as torch chooses.", rich_help_panel=ENGINE),
    ] = None
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest prompt plus output, in tokens. Default: the model's.", rich_help_panel=ENGINE),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of requests that have none of their own.", rich_help_panel=ENGINE)
    ] = None
    download_dir: DownloadDirOption = None
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE.py:CLASS",
            help="Replace a part of the engine by a class of yours, e.g. core.scheduler=mine.py:Scheduler. Repeatable.",
            rich_help_panel=ENGINE,
        ),
    ] = None
    mine: Annotated[
        bool | None,
        typer.Option(
            "--mine", help="Run on the parts that you have written; see folovllm learn.", rich_help_panel=ENGINE
        ),
    ] = None
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write a record of every step; see folovllm trace.", rich_help_panel=ENGINE),
    ] = None
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other engine argument, e.g. block_size=32 or gptq_runtime=memory. Repeatable.",
            rich_help_panel=ENGINE,
        ),
    ] = None

    def engine_args(self, **defaults: Any) -> dict[str, Any]:
        """Returns arguments for `EngineConfig.from_args` without preset and without. `defaults` apply where an option
        is not given.
        """
        own = {name: value for name, value in vars(self).items() if value is not None}
        own = {name: own[name] for name in own if name not in ("preset", "without", "part", "mine", "engine_arg")}
        if self.part or self.mine:
            mine, needed = my_own_parts() if self.mine else ({}, {})
            own["parts"], defaults = mine | parse_parts(self.part or ()), defaults | needed
        extra = parse_engine_args(self.engine_arg or ())
        for name in own.keys() & extra.keys():
            raise ValueError(
                f"{name} is given twice: keep --{name.replace('_', '-')} or --engine-arg {name}=..., not both"
            )
        return defaults | extra | own

    def refuse_with_url(self) -> None:
        """Raises ValueError if an option is given that the engine of a server at --url cannot take from here."""
        given = [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]
        given = [option for option in given if option != "--model"]  # names the server's model
        if given:
            raise ValueError(
                f"--url asks a server that has an engine already: give {', '.join(given)} to that server instead, when "
                "it starts"
            )

    def load(self, **defaults: Any) -> "LLM":
        """Starts the engine. If the model has not been pulled, it is pulled first."""
        args = self.engine_args(**defaults)
        # Checked before torch is imported, so that a typing error is answered at once.
        EngineConfig.from_args(preset=self.preset, without=self.without or (), **args)
        from folovllm.entrypoints.llm import LLM

        return LLM(preset=self.preset, without=self.without or (), **args)


@dataclass(frozen=True)
class SamplingOptions:
    """The sampling options. They have the names of SamplingParams, except --sampling-seed (--seed is the engine's).

    An option that is not given comes from the model's generation_config.json, as in vLLM's server, and only then from
    the command's own defaults.
    """

    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 takes the most likely token. Default: the model's (generation_config.json), else 0, in a chat 0.7.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens up to this mass.", rich_help_panel=SAMPLING)
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Keep this many of the likeliest tokens.", rich_help_panel=SAMPLING)
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop tokens below this share of the likeliest one's probability.", rich_help_panel=SAMPLING),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer. Default: generate 128, chat 512.", rich_help_panel=SAMPLING),
    ] = None
    sampling_seed: Annotated[
        int | None, typer.Option(help="Seed of the requests: the same answer every time.", rich_help_panel=SAMPLING)
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this text. Repeatable.", rich_help_panel=SAMPLING, metavar="TEXT"),
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 discourages tokens that occurred.", rich_help_panel=SAMPLING)
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option(help="Report this many log-probabilities per token (generate).", rich_help_panel=SAMPLING),
    ] = None

    def given(self) -> dict[str, Any]:
        """The given options, under the names that SamplingParams and OpenAI's API have for them."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if "sampling_seed" in given:
            given["seed"] = given.pop("sampling_seed")
        return given

    def sampling_params(self, **defaults: Any) -> SamplingParams:
        """Returns SamplingParams of the given options over `defaults`. Raises ValueError for a value out of range."""
        return SamplingParams(**(defaults | self.given()))


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Lets a command take whole dataclasses of options, so that typer sees each of their fields as one option.

    E.g. `def chat(engine: EngineOptions, debug: DebugOption = False)` has --debug, --model, ..., --engine-arg.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        parameters += _parameters_of(group) if group else [parameter.replace(kind=parameter.KEYWORD_ONLY)]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    # typer reads both. In the help text, a command's own options come before the shared ones.
    parameters.sort(key=lambda p: any(p.name in group.__dataclass_fields__ for group in groups.values()))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameters_of(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(group)
    ]


def parse_engine_args(items: Iterable[str]) -> dict[str, Any]:
    """["block_size=32", "batching=static"] -> {"block_size": 32, "batching": "static"}. EngineConfig checks names."""
    parsed: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--engine-arg takes NAME=VALUE, e.g. block_size=32; got {item!r}")
        if name in ("preset", "without"):
            raise ValueError(f"{name} is an option of its own: write --{name} {text or 'm1'}")
        if name in parsed:
            raise ValueError(f"--engine-arg {name} is given twice; keep one")
        parsed[name] = parse_value(text.strip())
    return parsed


def parse_parts(items: Iterable[str]) -> dict[str, str]:
    """["core.scheduler=mine.py:Scheduler"] -> {"core.scheduler": "mine.py:Scheduler"}."""
    parts: dict[str, str] = {}
    for item in items:
        name, equals, spec = item.partition("=")
        if not equals or not name or not spec:
            raise ValueError(f"--part takes NAME=FILE.py:CLASS, e.g. core.scheduler=mine.py:Scheduler; got {item!r}")
        parts[name] = spec
    check_parts(parts)
    return parts


def my_own_parts() -> tuple[dict[str, str], dict[str, Any]]:
    """The parts that the learner has written in ./work, and the engine arguments that they need; both go to stderr."""
    from folovllm.learn.mine import my_engine_args, my_parts
    from folovllm.learn.workspace import find_work

    parts, args = my_parts(find_work()), my_engine_args(find_work())
    typer.secho("your parts: " + ", ".join(f"{name} ({spec})" for name, spec in parts.items()), dim=True, err=True)
    if args:
        typer.secho("they need: " + ", ".join(f"{name}={value}" for name, value in args.items()), dim=True, err=True)
    return parts, args


def parse_value(text: str) -> Any:
    """Reads a value as Python would write it, e.g. `none`, `True`, `32` or `0.5`, or a JSON object or list.

    Everything else is a string, e.g. `max_model_len`.
    """
    words: dict[str, Any] = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if text.startswith(("{", "[")):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{text!r} looks like JSON and is none ({error}); quote it for the shell") from None
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text
