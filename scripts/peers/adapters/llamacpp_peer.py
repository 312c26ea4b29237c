"""llama.cpp as a peer, through the plain C functions of llama-cpp-python.

Milestone: M4. Stand-alone: runs in an environment with llama-cpp-python. Its own Python class answers one request at a
time, so the batch is driven here as llama.cpp's server does it: every step decodes one token of each running request
and fills what is left of the batch with waiting prompts. The greedy choice is numpy's argmax over the logits.
"""

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from peer_process import Engine, Request, Task, Tokens, main

BATCH_TOKENS = 512
CONTEXT_UNIT = 256


@dataclass
class Sequence:
    """One running request: its answer so far, and where its newest token goes."""

    index: int
    position: int
    wanted: int
    tokens: list[int]


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
        answers: Tokens = [[] for _ in requests]
        waiting = list(enumerate(requests))
        running: list[Sequence] = []
        while waiting or running:
            # (token, position, sequence, whether its logits are wanted)
            items = [(s.tokens[-1], s.position, s.index, True) for s in running]
            while waiting and len(items) + len(waiting[0][1][0]) <= BATCH_TOKENS:
                index, (prompt, wanted) = waiting.pop(0)
                items += [(token, i, index, i == len(prompt) - 1) for i, token in enumerate(prompt)]
                running.append(Sequence(index, len(prompt) - 1, wanted, answers[index]))
            rows = self.decode(items)
            for sequence, row in zip(running, rows, strict=True):
                sequence.tokens.append(self.argmax(row))
                sequence.position += 1
            running = [s for s in running if len(s.tokens) < s.wanted]
        return answers

    def decode(self, items: list[tuple[int, int, int, bool]]) -> list[int]:
        """One forward pass; the places in the batch that have logits."""
        batch = self.batch
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        status = self.lc.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode answered {status}")
        return [i for i, item in enumerate(items) if item[3]]

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
    requests = [request for group in (task["warm_up"], *task["modes"].values()) for request in group]
    longest = max(len(prompt) + count for prompt, count in requests)
    if max(len(prompt) for prompt, _ in requests) > BATCH_TOKENS:
        raise RuntimeError(f"this adapter sends a prompt whole: {BATCH_TOKENS} tokens at most")
    length = -(-longest // CONTEXT_UNIT) * CONTEXT_UNIT
    most = max(map(len, (task["warm_up"], *task["modes"].values())))
    alone = Session(lc, numpy, model, task["threads"], 1, length)
    together = Session(lc, numpy, model, task["threads"], most, length)

    def generate(requests: list[Request]) -> Tokens:
        return (alone if len(requests) == 1 else together).run(requests)

    settings = {"n_batch": BATCH_TOKENS, "n_threads": task["threads"], "tokens per sequence": length}
    return Engine(generate, metadata.version("llama-cpp-python"), settings)


if __name__ == "__main__":
    raise SystemExit(main(import_peer, load))
