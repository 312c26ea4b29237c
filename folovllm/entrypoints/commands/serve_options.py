"""The command line of `folovllm serve`: every engine argument and every option of the server.

Milestone: M8. vLLM counterpart: vllm/entrypoints/openai/cli_args.py and the add_cli_args of vllm/engine/arg_utils.py.

Names, types, defaults and help texts come from folovllm.config and ServerOptions: a new field is a new option. Nothing
heavy is imported here, so that a wrong option is answered before the model is loaded.
"""

import argparse
import dataclasses
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args, get_type_hints

from folovllm import config as engine_config
from folovllm.config import DEFAULT_MODEL, EngineConfig
from folovllm.entrypoints.commands.options import my_own_parts, parse_engine_args, parse_parts, parse_value
from folovllm.entrypoints.commands.vllm_serve_args import without_vllm_options
from folovllm.entrypoints.field_comments import field_comments
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.milestones import fold, top_rung

DESCRIPTION = """\
Serve a model over HTTP, so that any client of the OpenAI API can use it.

  folovllm serve
  folovllm serve ./my-model --port 9000 --api-key secret
  folovllm serve --max-num-seqs 16 --no-enable-prefix-caching

Numbers may end in k, m or g (1000, 1000000, ...) or in K, M or G (1024, ...).
Options have vLLM's names. --help=WORD shows those that have WORD in their name.
"""
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
# Options that have a form of their own below.
_NOT_GENERATED = {*engine_config.FILLED_IN, "model", "parts"}
_SHORT_NAMES = {"quantization": ["-q"]}


@dataclass(frozen=True)
class ServeCommand:
    """What the command line asks for, checked. `engine_args` are for `EngineConfig.from_args`."""

    engine_args: dict[str, Any]
    options: ServerOptions
    preset: str | None = None
    without: tuple[str, ...] = ()


def parse_command(argv: Sequence[str]) -> ServeCommand:
    """Reads the command line. Raises ValueError for a wrong option, and SystemExit after --help."""
    parser = make_parser()
    given = vars(parser.parse_args(_several_values(without_vllm_options(_help(parser, argv), _arity(parser)), parser)))
    given = {name: value for name, value in given.items() if value is not None}
    own = {f.name: given.pop(f.name) for f in dataclasses.fields(ServerOptions) if f.name in given}
    preset, without = given.pop("preset", None), tuple(given.pop("without", ()))
    command = ServeCommand(_engine_args(given), _server_options(own), preset, without)
    EngineConfig.from_args(preset=preset, without=without, **command.engine_args)
    return command


def _engine_args(given: dict[str, Any]) -> dict[str, Any]:
    """The options of the engine as arguments, with those of --engine-arg, --part and --mine."""
    given = {"disable_log_stats": False} | given
    models = {given.pop(name) for name in ("model_tag", "model") if name in given}
    if len(models) > 1:
        raise ValueError(f"two models are given, {' and '.join(sorted(models))}: a server has one")
    extra = parse_engine_args(given.pop("engine_arg", ()))
    needed: dict[str, Any] = {}
    mine, part = given.pop("mine", False), given.pop("part", [])
    if mine or part:
        own, needed = my_own_parts() if mine else ({}, {})
        given["parts"] = own | parse_parts(part)
    for name in extra.keys() & given.keys() - {"disable_log_stats"}:
        raise ValueError(f"{name} is given twice: keep --{_dashed(name)} or --engine-arg {name}=..., not both")
    return {"model": next(iter(models), DEFAULT_MODEL)} | needed | given | extra


def _server_options(own: dict[str, Any]) -> ServerOptions:
    if "allowed_origins" in own:
        own["allowed_origins"] = [origin for item in own["allowed_origins"] for origin in _json_list(item)]
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
    return ServerOptions(**fields)


def _json_list(text: str) -> list[str]:
    """vLLM's form is JSON, '["https://a.org"]'; a bare origin is taken as well."""
    value = parse_value(text)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise ValueError(f"--allowed-origins takes an origin or a JSON list of origins, got {text!r}")
    return values


# ---- the parser


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are ValueErrors, which `cli.FriendlyGroup` prints as one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Writes a switch as one name, "--[no-]mine", so that the names fit beside their meaning."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Text of several lines stays as it is; the one line below a heading is wrapped."""
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


def make_parser() -> Parser:
    parser = Parser(
        prog="folovllm serve",
        usage="folovllm serve [MODEL] [OPTIONS]",
        description=DESCRIPTION,
        formatter_class=Formatter,
        allow_abbrev=False,
        argument_default=None,
    )
    parser.add_argument(
        "model_tag",
        metavar="MODEL",
        nargs="?",
        help=f"an alias, a HuggingFace folder or a HuggingFace id (default: {DEFAULT_MODEL})",
    )
    _add_fields(parser, "Server", "The HTTP server.", ServerOptions)
    for cls in engine_config.CONFIG_GROUPS.values():
        _add_fields(parser, cls.__name__, first_sentence(cls.__doc__ or ""), cls)
    _add_fields(parser, "EngineConfig", "The rest of the engine.", EngineConfig)
    _add_own(parser)
    return parser


def _add_fields(parser: Parser, title: str, description: str, cls: Any) -> None:
    """One option per field of `cls`, below a heading of its own."""
    group = parser.add_argument_group(title, description)
    hints, comments, newest = get_type_hints(cls), field_comments(cls), fold(top_rung().id)
    for field in dataclasses.fields(cls):
        if field.name in _NOT_GENERATED or field.name in engine_config.CONFIG_GROUPS:
            continue
        default = newest.get(field.name, field.default)
        shown = "" if default in (None, (), "") or field.name == "disable_log_stats" else f" (default: {default})"
        names = [f"--{_dashed(field.name)}", *_SHORT_NAMES.get(field.name, ())]
        text = (comments[field.name] + shown).replace("%", "%%")
        group.add_argument(*names, dest=field.name, default=None, help=text, **_form(hints[field.name]))


def _form(hint: Any) -> dict[str, Any]:
    """The keywords of `add_argument` for a field of this type."""
    types = {getattr(item, "__origin__", item) for item in (get_args(hint) or (hint,))}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if list in types or getattr(hint, "__origin__", None) is tuple:
        return {"action": "append", "metavar": "TEXT"}
    if types & {dict, Mapping}:
        return {"type": _json_object, "metavar": "JSON"}
    if {bool, str} <= types:
        return {"type": parse_value, "metavar": "{auto,true,false}"}
    if {int, str} <= types:
        return {"type": parse_value, "metavar": "N"}
    if int in types:
        return {"type": _whole_number, "metavar": "N"}
    return {"type": float, "metavar": "X"} if float in types else {"metavar": "TEXT"}


def _add_own(parser: Parser) -> None:
    group = parser.add_argument_group("FoloVLLM", "What vLLM does not have, and options of all commands.")
    group.add_argument("--model", metavar="TEXT", help="the same as MODEL")
    group.add_argument("--preset", metavar="MILESTONE", help="the engine as of a milestone, such as m1")
    group.add_argument(
        "--without", metavar="MILESTONE", action="append", help="switch one milestone off, such as m6; repeatable"
    )
    group.add_argument(
        "--part",
        metavar="NAME=FILE.py:CLASS",
        action="append",
        help="replace a part of the engine by a class of yours, such as core.scheduler=mine.py:Scheduler; repeatable",
    )
    group.add_argument(
        "--mine", action="store_true", default=None, help="run on the parts that you have written; see folovllm learn"
    )
    group.add_argument(
        "--engine-arg", metavar="NAME=VALUE", action="append", help="any engine argument, by its name; repeatable"
    )


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    return " ".join(re.split(r"(?<=\.)\s", text.strip(), maxsplit=1)[0].split())


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _whole_number(text: str) -> int:
    """E.g. "4096" -> 4096, "4k" -> 4000, "4K" -> 4096, "1.5g" -> 1500000000, as in vLLM."""
    number, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    try:
        return int(number) * unit if unit == 1 or "." not in number else int(float(number) * unit)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number such as 4096 or 4K, got {text!r}") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"temperature\": 0.7}}', got {text!r}")
    return value


# ---- the command line before the parser reads it


def _arity(parser: Parser) -> dict[str, bool]:
    """Every option -> whether a value follows it."""
    return {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}


def _several_values(argv: list[str], parser: Parser) -> list[str]:
    """Writes vLLM's `MODEL --api-key=a b` as `MODEL --api-key=a --api-key=b`.

    This is done after the model only: before it, the last value could be the model.
    """
    repeatable = {n for a in parser._actions if isinstance(a, argparse._AppendAction) for n in a.option_strings}
    result = list[str]()
    has_model, option = False, ""
    for item in argv:
        if item.startswith("-"):
            option = item.partition("=")[0]
        elif has_model and option in repeatable:
            item = f"{option}={item}"
        else:
            has_model, option = True, ""
        result.append(item)
    return result


def _help(parser: Parser, argv: Sequence[str]) -> Sequence[str]:
    """Answers --help=WORD: prints the options with WORD in their names, or a whole group, and ends."""
    wanted = [item.partition("=")[2] for item in argv if item.startswith("--help=")]
    if not wanted:
        return argv
    word = wanted[0].lower().replace("_", "-")
    formatter = parser._get_formatter()
    found = False
    for group in parser._action_groups:
        whole = (group.title or "").lower() == word or word == "all"
        actions = [a for a in group._group_actions if whole or any(word in name for name in a.option_strings)]
        if actions:
            found = True
            formatter.start_section(group.title)
            formatter.add_arguments(actions)
            formatter.end_section()
    if not found:
        titles = ", ".join(group.title or "" for group in parser._action_groups[2:])
        raise ValueError(
            f"no option has {wanted[0]!r} in its name; --help lists all of them, and the groups are {titles}"
        )
    print(formatter.format_help())
    raise SystemExit(0)
