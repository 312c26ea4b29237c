"""The errors between the name of a model and its folder (milestone M0).

Every class is a `ValueError`, because each error is something that the user can fix. Every message has three parts:
what was expected, what was found, and what to do. vLLM lets the exceptions of huggingface_hub and transformers through.
"""

from __future__ import annotations


class HubError(ValueError):
    """Base class of every error of `folovllm.hub`."""


class ModelNotFoundError(HubError):
    """The name leads to no model: unknown alias, missing folder, unreachable repository, alias not pulled yet."""


class ModelFolderError(HubError):
    """The folder exists but is not a usable HuggingFace model: files are missing, pickled or truncated."""


class PullError(HubError):
    """`pull` could not finish: no package client, no network, a failed conversion, or another pull
    that does not end.
    """


class HashMismatchError(PullError):
    """A file's sha256 is not the pinned one."""


def problem(expected: str, found: str, todo: str) -> str:
    """The one shape all messages of this package have.

    >>> problem("a folder", "a file", "pass its folder")
    'expected a folder; found a file; to fix it: pass its folder'
    """
    return f"expected {expected}; found {found}; to fix it: {todo}"
