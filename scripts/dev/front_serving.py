"""Blocks of docs/serving.md: the server's options, what it refuses, and its metrics, read from the code.

Milestone: M8. vLLM counterpart: none (its page of options is made from its argument parser).
The meaning of an option is the comment behind its field, so code, `--help` and page say the same.
"""

import dataclasses
from pathlib import Path

from front_index import table
from front_reference import in_cell

from folovllm.entrypoints.field_comments import field_comments
from folovllm.entrypoints.openai.refusals import REFUSALS
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.metrics.prometheus import COUNTERS, GAUGES, HISTOGRAMS


def server_options(folder: Path) -> str:
    """The options of the server itself. Those of the engine are in the quick reference."""
    meanings = field_comments(ServerOptions)
    rows = []
    for field in dataclasses.fields(ServerOptions):
        default = "" if field.default in (None, (), "") else f"`{field.default}`"
        rows.append((f"`--{field.name.replace('_', '-')}`", default, in_cell(meanings[field.name])))
    return table("option | default | meaning", rows)


def server_refusals(folder: Path) -> str:
    """The fields of a request that are refused, with what to do instead."""
    return table("field | instead", ((f"`{name}`", in_cell(refusal.instead)) for name, refusal in REFUSALS.items()))


def server_metrics(folder: Path) -> str:
    """What GET /metrics has about the engine."""
    kinds = (("gauge", GAUGES, ""), ("counter", COUNTERS, "_total"), ("histogram", HISTOGRAMS, "_bucket"))
    rows = [
        (f"`vllm:{name}{ending}`", kind, in_cell(text)) for kind, metrics, ending in kinds for name, text, _ in metrics
    ]
    return table("metric | kind | meaning", rows)
