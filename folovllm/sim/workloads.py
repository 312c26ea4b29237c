"""What users send to simulated engines, and when: six workloads from a seed, with Poisson arrivals.

Milestone: M5. vLLM counterpart: vllm/benchmarks/datasets.py. Left out: recorded conversations of real users.

Row 1: no torch. Prompts are random token ids: a scheduler sees only how long they are and which begin alike.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from folovllm.utils import unknown_name_message

FIRST_ID, LAST_ID = 100, 30_000  # token ids that every model has


@dataclass(frozen=True)
class SimRequest:
    """One request: a prompt, how many tokens come out, and when it arrives (seconds).

    If it follows the request with index `follows`, it arrives `arrival` seconds after that one finished, and its
    prompt comes behind that one's whole text.
    """

    arrival: float
    prompt: Sequence[int]
    output_len: int
    follows: int | None = None


@dataclass(frozen=True)
class SimWorkload:
    """Requests, and the engine arguments that make the workload what it is (a small KV cache, for example)."""

    name: str
    requests: Sequence[SimRequest] = field(repr=False)
    kv_tokens: int | None = None  # at most so many tokens fit into the cache

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output together."""
        totals: list[int] = []
        for request in self.requests:
            before = 0 if request.follows is None else totals[request.follows]
            totals.append(before + len(request.prompt) + request.output_len)
        return max(totals)


@dataclass(frozen=True)
class Recipe:
    """What a workload is made of. `rate` users per second come (0: all at once); each sends `turns` requests."""

    about: str
    rate: float
    prompt: tuple[int, int]  # tokens that the user sends, from..to
    output: tuple[int, int]  # tokens of the answer
    turns: int = 1  # every later turn comes behind all that was said before
    document: tuple[int, int] | None = None  # tokens of the prompt of every sixth user
    system_prompt: int = 0  # tokens before every prompt of one of `services`
    services: int = 3  # each with a system prompt of its own
    hot_share: float = 0.0  # of the users; they all come to the first service, and the others to any
    kv_tokens: int | None = None  # the size of the KV cache; None: what fits


SIM_WORKLOADS: dict[str, Recipe] = {
    "chat": Recipe("conversations of four turns", 2.0, (30, 200), (60, 250), turns=4),
    "long-prompts": Recipe("one user in six brings a document", 8.0, (50, 300), (50, 200), document=(4_000, 8_000)),
    "shared-prefix": Recipe("questions to three services", 12.0, (20, 120), (30, 150), system_prompt=1_500),
    "offline": Recipe("a file of prompts, all there from the beginning", 0.0, (100, 1_000), (20, 400)),
    "memory-pressure": Recipe("long answers, a small cache", 4.0, (50, 300), (300, 900), kv_tokens=8_000),
    "agents": Recipe(
        "tasks of six turns behind one of 32 long system prompts", 2.0, (100, 400), (50, 150), turns=6,
        system_prompt=4_000, services=32,
    ),
}  # fmt: skip
THINKING = (2.0, 10.0)  # seconds between an answer and the user's next turn


def make_sim_workload(name: str, num_requests: int = 64, rate: float | None = None, seed: int = 0) -> SimWorkload:
    """The workload called `name`, the same for the same seed. Raises ValueError for a name or number that is wrong."""
    if name not in SIM_WORKLOADS:
        raise ValueError(unknown_name_message("workload", name, SIM_WORKLOADS))
    recipe = SIM_WORKLOADS[name]
    return follow_recipe(replace(recipe, rate=recipe.rate if rate is None else rate), name, num_requests, seed)


def follow_recipe(recipe: Recipe, name: str, num_requests: int, seed: int = 0) -> SimWorkload:
    """A workload made as `recipe` says. E.g. follow_recipe(Recipe("two at once", 0.0, (5, 9), (3, 3)), "two", 2)."""
    if num_requests < 1:
        raise ValueError(f"num_requests must be at least 1; got {num_requests}")
    if not 0 <= recipe.rate < math.inf:
        raise ValueError(f"rate must be at least 0 (0: all at once); got {recipe.rate:g}")
    rng, rate = random.Random(f"{name} {seed}"), recipe.rate
    systems = [_ids(rng, recipe.system_prompt, recipe.system_prompt) for _ in range(recipe.services)]
    requests: list[SimRequest] = []
    now, user = 0.0, 0
    while len(requests) < num_requests:
        now += rng.expovariate(rate) if rate else 0.0  # a Poisson process: the users know nothing of each other
        length = recipe.document if recipe.document and user % 6 == 5 else recipe.prompt
        for turn in range(min(recipe.turns, num_requests - len(requests))):
            follows, arrival = (len(requests) - 1, rng.uniform(*THINKING)) if turn else (None, now)
            prompt = ([] if turn else _system_prompt(rng, systems, recipe.hot_share)) + _ids(rng, *length)
            requests.append(SimRequest(arrival, prompt, rng.randint(*recipe.output), follows))
        user += 1
    return SimWorkload(name, requests, recipe.kv_tokens)


def _system_prompt(rng: random.Random, systems: Sequence[list[int]], hot_share: float) -> list[int]:
    return systems[0] if hot_share and rng.random() < hot_share else rng.choice(systems)


def _ids(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(rng.randint(low, high))]
