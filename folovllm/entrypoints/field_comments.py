"""The comments behind the fields of a dataclass: help texts of options, and the tables of the quick reference.

Milestone: M8. vLLM counterpart: the docstrings below the fields of its config classes, which vllm/engine/arg_utils.py
reads in the same way. So code, `folovllm serve --help` and pages say the same.
"""

import ast
import functools
import inspect
import io
import tokenize


@functools.cache
def field_comments(cls: type) -> dict[str, str]:
    """Field -> the comment behind it, or "" where there is none. `cls` is a class at the top of its module.

    E.g. `port: int = 8000  # 0: any free port` -> {"port": "0: any free port"}.
    """
    source = inspect.getsource(cls)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        node.target.id: comments.get(node.end_lineno or 0, "")
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
