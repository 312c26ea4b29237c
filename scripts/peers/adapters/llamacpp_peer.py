"""llama.cpp as a peer, through the plain C functions of llama-cpp-python.

Milestone: M4. Stand-alone: runs in an environment with llama-cpp-python. Its own Python class answers one request at a
time, so the batch is driven here as llama.cpp's server does it: every step decodes one token of each running request
and fills what is left of the batch with waiting prompts; a prompt that does not fit is continued in the next step. The
greedy choice is numpy's argmax over the logits.
"""

from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from peer_process import Engine, Request, Task, Tokens, main

BATCH_TOKENS = 512
CONTEXT_UNIT = 256


@dataclass
class Sequence:
    """One request: how much of it is in the KV cache, and its answer so far."""

    index: int
    prompt: list[int]
    wanted: int
    computed: int = 0
    tokens: list[int] = field(default_factory=list)

    def next_items(self, room: int) -> list[tuple[int, int, int, bool]]:
        """What may be computed next: (token, position, sequence, whether its logits are wanted)."""
        known = self.prompt + self.tokens
        chosen = range(self.computed, min(len(known), self.computed + room))
        self.computed += len(chosen)
        return [(known[i], i, self.index, i == len(known) - 1) for i in chosen]

    @property
    def is_waiting(self) -> bool:
        """Whether a part of its prompt is still to be computed."""
        return self.computed < len(self.prompt)


class Session:
    """A context for up to `num_sequences` requests at once, each with its own part of the KV cache."""

    def __init__(self, lc: Any, numpy: Any, model: Any, threads: int, num_sequences: int, length: int) -> None:
        params = lc.llama_context_default_params()
        params.n_ctx = num_sequences * length
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = num_sequences
        params.n_threads = params.n_threads_batch = threads
        self.lc, self.numpy, self.num_sequences = lc, numpy, num_sequences
        self.context = lc.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context of {params.n_ctx} tokens")
        self.memory = lc.llama_get_memory(self.context)
        self.batch = lc.llama_batch_init(BATCH_TOKENS, 0, 1)
        self.vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))

    def run(self, requests: list[Request]) -> Tokens:
        self.lc.llama_memory_clear(self.memory, True)
        sequences = [Sequence(index, prompt, wanted) for index, (prompt, wanted) in enumerate(requests)]
        while unfinished := [s for s in sequences if len(s.tokens) < s.wanted]:
            items: list[tuple[int, int, int, bool]] = []
            for sequence in sorted(unfinished, key=lambda s: s.is_waiting):  # decodes first
                items += sequence.next_items(BATCH_TOKENS - len(items))
            rows = dict(self.decode(items))
            for sequence in unfinished:
                if sequence.index in rows:
                    sequence.tokens.append(self.argmax(rows[sequence.index]))
        return [s.tokens for s in sequences]

    def decode(self, items: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """One forward pass; (sequence, its place in the batch) where there are logits."""
        batch = self.batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        status = self.lc.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode answered {status}")
        return [(item[2], i) for i, item in enumerate(items) if item[3]]

    def argmax(self, row: int) -> int:
        pointer = self.lc.llama_get_logits_ith(self.context, row)
        return int(self.numpy.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).argmax())


def import_peer(task: Task) -> Any:
    import llama_cpp
    import numpy

    return llama_cpp, numpy


def load(imported: Any, task: Task) -> Engine:
    lc, numpy = imported
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(task["model"].encode(), lc.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp could not load {task['model']}")
    at_once = [task["warm_up"], task["modes"].get("batch", [])]
    alone = Session(lc, numpy, model, task["threads"], 1, context_length([*at_once, *task["modes"].values()]))
    together = Session(lc, numpy, model, task["threads"], max(map(len, at_once)), context_length(at_once))

    def generate(requests: list[Request]) -> Tokens:
        return (alone if len(requests) == 1 else together).run(requests)

    compiled_for = lc.llama_print_system_info().decode().strip(" |")
    settings = {"n_batch": BATCH_TOKENS, "n_threads": task["threads"], "compiled for": compiled_for}
    return Engine(generate, metadata.version("llama-cpp-python"), settings)


def context_length(groups: list[list[Request]]) -> int:
    """Room for the longest request."""
    longest = max(len(prompt) + count for group in groups for prompt, count in group)
    return -(-longest // CONTEXT_UNIT) * CONTEXT_UNIT


if __name__ == "__main__":
    raise SystemExit(main(import_peer, load))
