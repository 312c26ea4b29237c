"""What `folovllm serve` answers to the options of `vllm serve` that it does not have.

Milestone: M8. vLLM counterpart: FrontendArgs (vllm/entrypoints/openai/cli_args.py at v0.11.0), which names every option
here. The engine's own are in folovllm.vllm_args. As there, a value that changes nothing is accepted without a word.
"""

from collections import deque
from collections.abc import Mapping, Sequence

from folovllm.entrypoints.commands.options import parse_value
from folovllm.utils import did_you_mean
from folovllm.vllm_args import ANYTHING, SHORT_FORMS, VLLM_ARGS, Answer, long_form

_ONE_SERVER = "one process is the front end of all engines: start several servers behind a load balancer instead"
_NO_TLS = "let a reverse proxy, such as nginx or Caddy, speak TLS"
_NO_TOOLS = "tool calls in an answer are not parsed yet: pass tools with tool_choice='none' and read the text"
_NO_LORA = "LoRA adapters are not applied: merge the adapter into the weights (peft: merge_and_unload) and load those"
_FIXED_CORS = "--allowed-origins is the one setting of CORS: leave it out"

VLLM_SERVER_ARGS: dict[str, Answer] = {
    "config": Answer("write the options on the command line"),
    "headless": Answer(_ONE_SERVER, (False,)),
    "api_server_count": Answer(_ONE_SERVER, (1,)),
    "allow_credentials": Answer(_FIXED_CORS, (False,)),
    "allowed_methods": Answer(_FIXED_CORS, (["*"],)),
    "allowed_headers": Answer(_FIXED_CORS, (["*"],)),
    "ssl_keyfile": Answer(_NO_TLS),
    "ssl_certfile": Answer(_NO_TLS),
    "ssl_ca_certs": Answer(_NO_TLS),
    "ssl_cert_reqs": Answer(_NO_TLS, (0,)),
    "enable_ssl_refresh": Answer(_NO_TLS, (False,)),
    "lora_modules": Answer(_NO_LORA),
    "chat_template_content_format": Answer("it is read from the template: leave it out", ("auto",)),
    "trust_request_chat_template": Answer("put the template into --chat-template", (False,)),
    "response_role": Answer("answers have the role 'assistant': leave it out", ("assistant",)),
    "middleware": Answer("put a reverse proxy in front", ([],)),
    "return_tokens_as_token_ids": Answer("set return_token_ids in the request", (False,)),
    "enable_request_id_headers": Answer("X-Request-Id is in every answer: leave it out", ANYTHING),
    "enable_auto_tool_choice": Answer(_NO_TOOLS, (False,)),
    "exclude_tools_when_tool_choice_none": Answer("leave tools out of the request instead", (False,)),
    "tool_call_parser": Answer(_NO_TOOLS),
    "tool_parser_plugin": Answer(_NO_TOOLS, ("",)),
    "tool_server": Answer("the server runs no tools: call them in your client"),
    "log_config_file": Answer("use --uvicorn-log-level, and redirect stderr"),
    "max_log_len": Answer("prompts are never logged: leave it out", ANYTHING),
    "enable_prompt_tokens_details": Answer("usage always has them: leave it out", ANYTHING),
    "enable_server_load_tracking": Answer("GET /metrics has the number of running requests: leave it out", (False,)),
    "enable_force_include_usage": Answer("set stream_options={'include_usage': true} in the request", (False,)),
    "enable_tokenizer_info_endpoint": Answer("use POST /tokenize and /detokenize", (False,)),
    "enable_log_outputs": Answer("answers are never logged: log them in the client", (False,)),
    "h11_max_incomplete_event_size": Answer("use --max-body-size", ANYTHING),
    "h11_max_header_count": Answer("leave it out", ANYTHING),
    "log_error_stack": Answer("the log always has the traceback of an internal error: leave it out", ANYTHING),
}
ALL = VLLM_SERVER_ARGS | VLLM_ARGS
_RENAMED = {
    "--enable-log-requests": "--log-requests",
    "--no-enable-log-requests": "--no-log-requests",
}
_FLAGS = ("enable_", "disable_", "skip_", "use_", "no_")  # how the names of options begin that take no value


def without_vllm_options(argv: Sequence[str], takes_value: Mapping[str, bool]) -> list[str]:
    """`argv` without the options that only vLLM has, if their values change nothing.

    `takes_value` has our own options, such as {"--port": True, "--log-requests": False}. They are written with their
    values, "--port=8000", and with dashes: vLLM takes underscores as well. Raises ValueError for any other option, with
    what to do instead, or with the nearest known name.
    """
    kept: list[str] = []
    rest = deque(argv)
    while rest:
        item = rest.popleft()
        name, equals, value = item.partition("=")
        option = "--" + name[2:].replace("_", "-") if name.startswith("--") else name
        option = _RENAMED.get(option, option)
        if (own := "--" + SHORT_FORMS.get(option[1:], "").replace("_", "-")) in takes_value:  # -tp
            option = own
        if option in takes_value:
            if takes_value[option] and not equals and rest and rest[0] not in takes_value:
                equals, value = "=", rest.popleft()
            kept.append(option + equals + value)
        elif item.startswith("-") and item.strip("-"):
            _drop(name, value if equals else None, rest, list(takes_value))
        else:
            kept.append(item)
    return kept


def _drop(option: str, value: str | None, rest: deque[str], known: list[str]) -> None:
    """Takes the value of `option` from `rest`. Raises ValueError unless the option changes nothing."""
    base, dot, below = option.partition(".")
    if dot and base in known:
        raise ValueError(f"{option} is not an option: write the value as JSON, {base} '{{\"{below}\": ...}}'")
    name, wanted = _name_of(base), True
    if name not in ALL and name.startswith("no_"):
        name, wanted = name.removeprefix("no_"), False
    if name not in ALL:
        meant = "--" + long_form(name).replace("_", "-")
        near = did_you_mean(meant, known) or "; folovllm serve --help lists the options"
        raise ValueError(f"there is no option {option}{near}")
    answer = ALL[name]
    if value is None and not _is_flag(name, answer) and rest and not rest[0].startswith("-"):
        value = rest.popleft()
    given = wanted if value is None else parse_value(value)
    if dot or given not in answer.harmless:
        shown = option if value is None else f"{option} {value}"
        raise ValueError(f"{shown} is an option of vLLM that FoloVLLM does not have; {answer.instead}")


def _name_of(option: str) -> str:
    """E.g. "--swap-space" and "--swap_space" -> "swap_space", "-asc" -> "api_server_count"."""
    if not option.startswith("--"):
        short = "O" if option.startswith("-O") else option[1:]  # -O3
        return SHORT_FORMS.get(short, short)
    return option.removeprefix("--").replace("-", "_")


def _is_flag(name: str, answer: Answer) -> bool:
    return name.startswith(_FLAGS) or any(isinstance(value, bool) for value in answer.harmless)
