"""Milestone M10: to be written."""

from folovllm.milestones import get_rung

rung = get_rung("m10")
print(f"{rung.title}: {rung.adds}")
assert rung.built
