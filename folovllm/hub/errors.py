"""What can go wrong between a model's name and its folder (milestone M0).

Every class is a `ValueError`, because each names something its user can fix, and every message has three parts: what
was expected, what was found, what to do. vLLM lets huggingface_hub's and transformers' own exceptions through instead.
"""

from __future__ import annotations


class HubError(ValueError):
    """Base of every error of `folovllm.hub`."""


class ModelNotFoundError(HubError):
    """The name leads to no model: unknown alias, missing folder, unreachable repository, alias not pulled yet."""


class ModelFolderError(HubError):
    """The folder exists but is no usable HuggingFace model: files missing, pickled weights only, truncated weights."""


class PullError(HubError):
    """`pull` could not finish: no package client, no network, a failed conversion, another pull that never ends."""


class HashMismatchError(PullError):
    """A file's sha256 is not the pinned one."""


def problem(expected: str, found: str, todo: str) -> str:
    """The one shape all messages of this package have.

    >>> problem("a folder", "a file", "pass its folder")
    'expected a folder; found a file; to fix it: pass its folder'
    """
    return f"expected {expected}; found {found}; to fix it: {todo}"
