"""Offline completion of whole data sets, on Ray Data: `from folovllm.data import complete`. Milestone: M10."""

from folovllm.data.complete import Report, complete
from folovllm.data.results import read_results

__all__ = ["Report", "complete", "read_results"]
