"""A chat template: compiled once, rendered in a sandbox, with what its syntax tree tells about it.

Milestone: M1. vLLM counterpart: vllm/entrypoints/chat_utils.py (`resolve_hf_chat_template`,
`resolve_chat_template_kwargs`), which renders through transformers. Rendering here follows transformers'
`_compile_jinja_template` without importing it.
"""

import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

DEFAULT, TOOL_USE = "default", "tool_use"


@dataclass(frozen=True)
class ChatTemplate:
    """`variables`: the names that the template reads and does not set, e.g. messages, tools, enable_thinking.
    `knows_developer`: it treats the role "developer" by name.
    """

    compiled: "jinja2.Template"
    variables: frozenset[str]
    walks_parts: bool
    mentions_content: bool
    knows_developer: bool

    def render(self, variables: dict[str, Any]) -> str:
        """The prompt text. Raises ValueError if the template refuses what it is given, or fails."""
        try:
            return str(self.compiled.render(**variables))
        except Exception as error:  # a template is a program by a stranger: it may fail in any way
            raise ValueError(f"the chat template refuses these messages: {error}") from None


def choose_template(templates: dict[str, str], asked: str | None, has_tools: bool) -> str:
    """The text of the template to use: `asked` (a name or jinja text), else the one for tools, else the default one.

    E.g. {"default": ..., "tool_use": ...} with tools -> "tool_use", as in transformers.
    """
    if asked is None:
        if not templates:
            raise ValueError(
                "this model has no chat template: use generate() with a plain prompt, or pass chat_template="
            )
        name = TOOL_USE if has_tools and TOOL_USE in templates else DEFAULT
        if name not in templates:
            raise ValueError(f"this model has no default chat template: pass chat_template= one of {_names(templates)}")
        return templates[name]
    if not isinstance(asked, str):
        raise ValueError(f"chat_template must be a name or the text of a template, got {type(asked).__name__}")
    if asked in templates:
        return templates[asked]
    if not asked.strip() or not any(character in asked for character in "{}\n"):
        known = f"this model has {_names(templates)}" if templates else "this model has none"
        raise ValueError(f"no chat template is named {asked!r}: {known}; or pass the text of a jinja template")
    return asked


def _names(templates: dict[str, str]) -> str:
    return ", ".join(map(repr, sorted(templates)))


@lru_cache(maxsize=16)
def compile_template(text: str) -> ChatTemplate:
    """Raises ValueError if `text` is not a jinja template."""
    from jinja2 import TemplateSyntaxError, meta

    from folovllm.engine.chat.content_format import mentions_content, mentions_developer, walks_parts

    environment = _environment()
    try:
        tree = environment.parse(text)
        compiled = environment.from_string(tree)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template refuses these messages: {error} (line {error.lineno})") from None
    variables = frozenset(meta.find_undeclared_variables(tree)) - environment.globals.keys()
    return ChatTemplate(compiled, variables, walks_parts(tree), mentions_content(tree), mentions_developer(tree))


@lru_cache(maxsize=1)
def _environment() -> "jinja2.Environment":
    """The sandbox with the additions that HuggingFace's templates count on."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; it renders as its body."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # jinja2's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
