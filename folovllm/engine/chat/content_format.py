"""Does a chat template walk lists of content parts, or does it want strings? The answer is read off its syntax tree.

Milestone: M1. vLLM counterpart: vllm/entrypoints/chat_utils.py (`_detect_content_format`), and for the role
"developer" a later release's `_detect_developer_role_support` (seen in 0.32). vLLM follows plain
assignments; this also follows macros, namespaces, conditional expressions and `.get("content")`.

    {% set rest = messages[1:] %}              rest: a list of messages
    {% for m in rest %}                        m: a message
      {% set content = m['content'] or [] %}   content: the content of a message
      {% for part in content %}                -> the template walks parts
"""

from collections.abc import Iterator

from jinja2 import nodes

MESSAGES, MESSAGE, CONTENT = "messages", "message", "content"
Meaning = set[str]
DEVELOPER = "developer"  # OpenAI's newer name of the role "system"
PICKERS = ("first", "last", "random")  # filters that take one element out of a list


def walks_parts(tree: nodes.Template) -> bool:
    """Whether some loop runs over the content of a message."""
    meanings = _Meanings(tree)
    return any(CONTENT in meanings.of(loop.iter) for loop in tree.find_all(nodes.For))


def mentions_content(tree: nodes.Template) -> bool:
    """Whether the template reads `content` at all, as an attribute or as a string."""
    return any(node.attr == CONTENT for node in tree.find_all(nodes.Getattr)) or any(
        node.value == CONTENT for node in tree.find_all(nodes.Const)
    )


def mentions_developer(tree: nodes.Template) -> bool:
    """Whether the template holds the string "developer", which it does if that role is special to it."""
    return any(node.value == DEVELOPER for node in tree.find_all(nodes.Const))


class _Meanings:
    """What each name of a template may stand for. A name keeps all it ever stood for: scopes are not told apart."""

    def __init__(self, tree: nodes.Template) -> None:
        self._names: dict[str, Meaning] = {MESSAGES: {MESSAGES}}
        bindings = list(_bindings(tree))
        while any(self._bind(name, value, element) for name, value, element in bindings):
            pass  # a name may be bound to another one that gets its meaning later

    def of(self, node: nodes.Node | None) -> Meaning:
        """What an expression may stand for."""
        match node:
            case nodes.Name(name=name):
                return self._names.get(name, set())
            case nodes.Filter(node=inner, name=name):
                return _element(self.of(inner)) if name in PICKERS else self.of(inner)
            case nodes.Getitem(node=inner, arg=nodes.Slice()):
                return self.of(inner)
            case nodes.Getitem(node=inner, arg=nodes.Const(value=str(key))):
                return self._field(inner, key)
            case nodes.Getitem(node=inner):
                return _element(self.of(inner))
            case nodes.Getattr(attr="previtem" | "nextitem"):
                return {MESSAGE}
            case nodes.Getattr(node=inner, attr=key):
                return self._field(inner, key)
            case nodes.Call(node=nodes.Getattr(node=inner, attr="get"), args=[nodes.Const(value=str(key)), *_]):
                return self._field(inner, key)
            case nodes.CondExpr(expr1=one, expr2=other) | nodes.BinExpr(left=one, right=other):
                return self.of(one) | self.of(other)
        return set()

    def _field(self, node: nodes.Node, key: str) -> Meaning:
        own = self._names.get(f"{node.name}.{key}", set()) if isinstance(node, nodes.Name) else set()  # a namespace's
        return own | ({CONTENT} if key == CONTENT and MESSAGE in self.of(node) else set())

    def _bind(self, name: str, value: nodes.Node, element: bool) -> bool:
        """Add what `value` (or an element of it) stands for to `name`. Returns True if that is news."""
        meaning = _element(self.of(value)) if element else self.of(value)
        known = self._names.setdefault(name, set())
        news = not meaning <= known
        known |= meaning
        return news


def _element(meaning: Meaning) -> Meaning:
    return {MESSAGE} if MESSAGES in meaning else set()


def _bindings(tree: nodes.Template) -> Iterator[tuple[str, nodes.Node, bool]]:
    """(name, expression, whether the name gets an element of it) for each `set`, `for`, `with` and macro call."""
    for assign in tree.find_all(nodes.Assign):
        yield from _targets(assign.target, assign.node, element=False)
    for loop in tree.find_all(nodes.For):
        yield from _targets(loop.target, loop.iter, element=True)
    for scope in tree.find_all(nodes.With):
        for target, value in zip(scope.targets, scope.values, strict=True):
            yield from _targets(target, value, element=False)
    parameters = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    for call in tree.find_all(nodes.Call):
        names = parameters.get(call.node.name, []) if isinstance(call.node, nodes.Name) else []
        yield from ((name, value, False) for name, value in zip(names, call.args, strict=False))
        yield from ((pair.key, pair.value, False) for pair in call.kwargs if pair.key in names)


def _targets(target: nodes.Node, value: nodes.Node, element: bool) -> Iterator[tuple[str, nodes.Node, bool]]:
    if isinstance(target, nodes.Name):
        yield target.name, value, element
    elif isinstance(target, nodes.NSRef):
        yield f"{target.name}.{target.attr}", value, element
