"""The simulator: the real scheduler and KV cache on a modelled machine, whose steps take as long as a roofline says.

Milestone: M5. vLLM counterpart: none. Row 1: no torch. See docs/learn/simulator.md; `simulate` is the whole interface.
"""
