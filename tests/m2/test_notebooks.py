"""The notebooks of M1 to M3 and the last one: each runs, checks itself and its tasks, and is what its source builds.

Milestone: M2. vLLM counterpart: none. What is checked: tests/notebook_checks.py. Later milestones test their own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import notebook_checks

MILESTONE = {
    "00": pytest.mark.m1,
    "01": pytest.mark.m1,
    "03": pytest.mark.m2,
    "04": pytest.mark.m3,
    "09": pytest.mark.m7,
}
NOTEBOOKS = [
    pytest.param(source, id=source.stem, marks=MILESTONE[source.stem[:2]])
    for source in notebook_checks.sources(*MILESTONE)
]
# A right answer to each task: what follows a line that ends in a colon, or takes the place of "None".
ANSWERS = {
    "00": {
        "def my_flat_batch(requests, block_size):": """
    places = [(p, table) for computed, new, table in requests for p in range(computed, computed + new)]
    return {
        "positions": [p for p, _ in places],
        "slots": [table[p // block_size] * block_size + p % block_size for p, table in places],
        "query_start_loc": [sum(new for _, new, _ in requests[:i]) for i in range(len(requests) + 1)],
        "seq_lens": [computed + new for computed, new, _ in requests],
    }
""",
        "def my_weights(q, keys):": """
    powers = ((keys * q).sum(dim=1) / len(q) ** 0.5).exp()
    return powers / powers.sum()
""",
        "def my_counts(prompt, output):": """
    return [prompt + output - 1, output * prompt + output * (output - 1) // 2]
""",
    },
    "01": {
        "def my_top_p(probs, p):": """
    return next(n for n in range(1, len(probs) + 1) if sum(probs[:n]) >= p)
""",
        "def my_penalised(logit, in_prompt, count, repetition, frequency, presence):": """
    if in_prompt or count > 0:
        logit = min(logit / repetition, logit * repetition)
    return logit - frequency * count - presence * min(count, 1)
""",
        "def my_draw(probs, noise):": """
    return min((q / p, i) for i, (p, q) in enumerate(zip(probs, noise)) if p > 0)[1]
""",
    },
    "03": {
        "def my_gap(known, computed, budget, chunked):": """
    gap = known - computed
    return min(gap, budget) if chunked else gap if gap <= budget else 0
""",
        "def my_static_steps(outputs, seats):": """
    return sum(max(outputs[i : i + seats]) for i in range(0, len(outputs), seats))
""",
        "my_num_kv_blocks = None": 9,
    },
    "04": {
        "def position_of(table, slot, block_size):": """
    block, offset = slot // block_size, slot % block_size
    return table.index(block) * block_size + offset if block in table else -1
""",
        "def allocate(owned, free, num_slots, block_size):": """
    num_new = (num_slots + block_size - 1) // block_size - len(owned)
    if num_new > len(free):
        return None
    new, free[:num_new] = free[:num_new], []
    owned.extend(new)
    return new
""",
        "queue_after_step_5 = None": [8, 4, 3, 7, 6, 5, 2, 1, 9],
    },
    "09": {
        "my_suspects = None": {"X": "m3", "Y": "m6", "Z": "m7"},
        "my_three = None": ["m6", "m3", "m4"],
        "class ShortestFirst(FCFSRequestQueue):\n    def add_request(self, request):": """
        self._requests.append(request)
        self._requests = type(self._requests)(sorted(self._requests, key=lambda r: r.num_prompt_tokens))
        return
""",
    },
}


@pytest.fixture(autouse=True)
def pictures_go_nowhere() -> Iterator[None]:
    with notebook_checks.pictures_go_nowhere():
        yield


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_runs_and_its_tasks_can_be_done(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ANSWERS[source.stem[:2]]
    done = {
        place: place + answer if isinstance(answer, str) else place.replace("None", repr(answer))
        for place, answer in answers.items()
    }
    notebook_checks.check_tasks(source, monkeypatch, done)


@pytest.mark.parametrize(("source", "turn"), notebook_checks.turns_of(*MILESTONE, marks=MILESTONE))
def test_no_other_value_of_a_knob_breaks_it(
    source: Path, turn: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook_checks.check_turned(source, turn, monkeypatch)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_the_committed_notebook_is_its_source(source: Path) -> None:
    notebook_checks.check_committed(source)


@pytest.mark.parametrize("source", NOTEBOOKS)
def test_a_notebook_asks_and_checks(source: Path) -> None:
    notebook_checks.check_asks(source)
