"""The commands of `folovllm`, one file each. `cli.py` puts them together (milestone M1).

Nothing here imports torch, transformers or rich before a command runs. `folovllm --help` must answer at once, and the
time to the first token is counted from the start of the process.
"""
