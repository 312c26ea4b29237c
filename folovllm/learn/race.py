"""The race: a scheduling policy of the learner against four others, on five workloads, in simulated time.

Milestone: M2. vLLM counterpart: none.

Every run is the real scheduler and the real KV cache on the roofline model of a GPU (folovllm/sim), so a race takes
seconds and gives the same figures on every machine. The score is the goodput: requests per second that were served
within the SLO. Requests that get their first token too late, or whose tokens stop for too long, count as not served.
"""

import ast
import contextlib
import hashlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folovllm.core.sched.request_queue import FCFSRequestQueue, RequestQueue
from folovllm.core.sched.scheduler import Scheduler
from folovllm.core.sched.step import Step
from folovllm.learn.exercise import milestones_dir
from folovllm.learn.files import append_record, friendly_os_errors, read_records
from folovllm.learn.grade import TimeLimit, time_limit
from folovllm.parts import load_file
from folovllm.request import Request, RequestStatus
from folovllm.sim.metrics import SLO
from folovllm.sim.simulate import simulate
from folovllm.sim.workloads import make_sim_workload

MODEL, GPU = "qwen3-8b", "a100"
# Workload -> (requests, users that come per second): more than the machine can serve in time.
WORKLOADS = {
    "chat": (240, 40.0),
    "long-prompts": (64, 8.0),
    "shared-prefix": (64, 8.0),
    "offline": (64, 0.0),
    "memory-pressure": (64, 2.0),
}
RACE_SLO = SLO(ttft=1.0, itl=0.1)
ENGINE: dict[str, Any] = {"preset": "m5", "max_num_seqs": 24, "max_num_batched_tokens": 1_024}
SECONDS = 60.0  # of real time, for one policy on one workload
QUEUE, SCHEDULER = "core.request_queue.fcfs", "core.scheduler"


# ---- policies


class RankedQueue(FCFSRequestQueue):
    """Admits the waiting request with the smallest `rank` first. Among equals, the queue's own order decides."""

    def rank(self, request: Request) -> float:
        return 0.0

    def peek_request(self) -> Request:
        return min(self._requests, key=self.rank)

    def pop_request(self) -> Request:
        request = self.peek_request()
        self._requests.remove(request)
        return request

    def __iter__(self) -> Iterator[Request]:
        return iter(sorted(self._requests, key=self.rank))


class ShortestJobQueue(RankedQueue):
    """Admits the request with the least work left. Only an oracle knows how long an answer will be."""

    def rank(self, request: Request) -> float:
        return request.num_tokens + request.max_tokens - request.num_output_tokens


class PrefillFirstScheduler(Scheduler):
    """Computes prompts alone; requests generate only in a step without a prompt, as in vLLM's V0 engine."""

    _only_prompts = False

    def schedule_running(self, step: Step) -> None:
        self._only_prompts = True
        super().schedule_running(step)  # prompts that have begun
        if not step.preempted:
            self.schedule_waiting(step)
        self._only_prompts = False
        if not step.num_scheduled_tokens:
            super().schedule_running(step)

    def num_tokens_to_compute(self, request: Request, num_computed_tokens: int, token_budget: int) -> int:
        generates = request.status == RequestStatus.RUNNING and request.num_tokens - num_computed_tokens == 1
        if self._only_prompts and generates:
            return 0
        return super().num_tokens_to_compute(request, num_computed_tokens, token_budget)


@dataclass(frozen=True)
class Policy:
    """A name, what it does, and the engine arguments that make it."""

    name: str
    about: str
    parts: dict[str, str] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)


OTHERS = (
    Policy("fcfs", "the engine's own: running requests first, then the queue in order of arrival"),
    Policy("shortest job", "the same, the least work first; it knows how long each answer will be",
           {QUEUE: f"{__name__}:ShortestJobQueue"}),
    Policy("decode first", "no prompt starts while a request generates (static batching)", {}, {"batching": "static"}),
    Policy("prefill first", "no request generates while a prompt can be computed",
           {SCHEDULER: f"{__name__}:PrefillFirstScheduler"}),
)  # fmt: skip


def policy_of(path: Path) -> Policy:
    """The policy in a learner's file: its class of a queue, its class of a scheduler, or both.

    Raises ValueError if there is neither. A policy that reads `max_tokens` or builds on ShortestJobQueue is marked: in
    the race, `max_tokens` is the length of the answer, which no real server knows.
    """
    module = load_file(path)
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    parts = {SCHEDULER if issubclass(c, Scheduler) else QUEUE: f"{path}:{c.__name__}"
             for c in own if issubclass(c, RequestQueue | Scheduler)}  # fmt: skip
    if not parts:
        raise ValueError(f"{path} has no class that inherits from RankedQueue, a RequestQueue or Scheduler; write one")
    words = {getattr(node, "attr", getattr(node, "value", None)) for node in ast.walk(ast.parse(path.read_bytes()))
             if isinstance(node, ast.Attribute | ast.Constant)}  # fmt: skip
    is_oracle = "max_tokens" in words or any(issubclass(c, ShortestJobQueue) for c in own)
    return Policy("yours (oracle)" if is_oracle else "yours", str(path), parts)


def begin(path: Path) -> bool:
    """Creates the learner's file unless it is there. Returns whether it did."""
    if path.exists():
        return False
    with friendly_os_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((milestones_dir() / "m2/race.py").read_text(encoding="utf-8"), encoding="utf-8")
    return True


# ---- the race


@dataclass(frozen=True)
class Run:
    """One policy on one workload. `problem` says why it did not finish; then its goodput is 0."""

    policy: Policy
    workload: str
    num_good: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def goodput(self) -> float:
        return self.num_good / self.seconds if self.seconds else 0.0


def run(policy: Policy, workload: str, seed: int) -> Run:
    try:
        with time_limit(SECONDS):
            metrics = simulate(
                make_sim_workload(workload, *WORKLOADS[workload], seed), MODEL, GPU,
                parts=policy.parts, slo=RACE_SLO, **ENGINE | policy.engine_args,
            )  # fmt: skip
    except TimeLimit:
        return Run(policy, workload, problem=f"not done after {SECONDS:.0f} seconds")
    except (Exception, SystemExit) as error:
        return Run(policy, workload, problem=f"{type(error).__name__}: {error}")
    return Run(policy, workload, round(metrics["good_share"] * metrics["num_requests"]), metrics["seconds"])


def race(mine: Policy, seed: int = 0, told: Callable[[Run], None] = lambda run: None) -> dict[str, list[Run]]:
    """Runs all policies on all workloads. Returns the runs by the policy's name, best score first.

    `told` is called after each run.
    """
    runs: dict[str, list[Run]] = {}
    for policy in (mine, *OTHERS):
        for workload in WORKLOADS:
            runs.setdefault(policy.name, []).append(run(policy, workload, seed))
            told(runs[policy.name][-1])
    return dict(sorted(runs.items(), key=lambda item: -score(item[1])))


def score(runs: list[Run]) -> float:
    """The goodput over all workloads: requests served within the SLO, divided by the seconds of all runs.

    A policy that did not finish one of them scores 0.
    """
    seconds = sum(one.seconds for one in runs)
    return 0.0 if any(one.problem for one in runs) else sum(one.num_good for one in runs) / seconds


def table(runs: dict[str, list[Run]]) -> list[str]:
    """Lines of text: a row per policy, a column per workload, and the score."""
    width = max(map(len, runs))
    lines = [f"{'':{width}}  " + "".join(f"{name:>16}" for name in WORKLOADS) + f"{'score':>9}"]
    for name, own in runs.items():
        cells = "".join(f"{'-' if one.problem else f'{one.goodput:.2f}':>16}" for one in own)
        lines.append(f"{name:{width}}  {cells}{score(own):>9.3f}")
    problems = [
        f"{one.policy.name} on {one.workload}: {one.problem}" for own in runs.values() for one in own if one.problem
    ]
    return lines + problems


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """Writes the table as bars."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4))
    for i, (name, own) in enumerate(runs.items()):
        axes.bar([x + i * 0.16 for x in range(len(own))], [one.goodput for one in own], 0.15, label=name)
    axes.set_xticks([x + 0.32 for x in range(len(WORKLOADS))], list(WORKLOADS))
    axes.set_ylabel("goodput (requests per second)")
    axes.set_title(
        f"Served within TTFT {RACE_SLO.ttft:g} s and ITL {RACE_SLO.itl * 1e3:g} ms, {MODEL} on {GPU}, simulated"
    )
    axes.legend()
    figure.tight_layout()
    with friendly_os_errors():
        figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- the leaderboard


@dataclass(frozen=True)
class Leaderboard:
    """Scores of a learner's own policies, in a file that only grows: one line of JSON per race."""

    path: Path

    def add(self, file: Path, runs: list[Run], seed: int) -> None:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        entry = {"time": time.strftime("%Y-%m-%d %H:%M"), "file": str(file), "hash": digest, "seed": seed}
        entry |= {"name": runs[0].policy.name, "score": score(runs)}
        entry |= {"goodput": {one.workload: one.goodput for one in runs}}
        append_record(self.path, entry)

    def best(self, seed: int, count: int = 5) -> list[dict[str, Any]]:
        """The best entries of a seed, each version of a file once, best first. Lines that are no entry do not count."""
        versions = {}
        for entry in read_records(self.path)[0]:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if entry["seed"] == seed and all(key in entry for key in ("name", "file", "time")):
                    versions[entry["hash"]] = entry | {"score": float(entry["score"])}
        return sorted(versions.values(), key=lambda entry: -entry["score"])[:count]
