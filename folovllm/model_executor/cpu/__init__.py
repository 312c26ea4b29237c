"""What replaces parts of the model on a CPU, in one place (milestone M4; the int4 kernel: M7).

`accelerate` (accelerate.py) is called once, after the model is loaded; every other file here is something it puts in.
vLLM counterpart: none as a folder; its CPU paths stand inside the layers and in csrc/cpu.
"""
