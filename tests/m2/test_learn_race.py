"""The race of scheduling policies (R2.45): the four others, the learner's file, the leaderboard."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from folovllm.entrypoints.commands.learn_race import race as race_command
from folovllm.learn import race as races
from folovllm.learn.exercise import milestones_dir
from folovllm.learn.race import OTHERS, Leaderboard, Policy, Run, policy_of

pytestmark = pytest.mark.m2

TEMPLATE = milestones_dir() / "m2/race.py"
FCFS, SHORTEST, DECODE_FIRST, PREFILL_FIRST = OTHERS
RANKED = (
    "from folovllm.learn.race import RankedQueue\nclass Queue(RankedQueue):\n    def rank(self, request):\n        "
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workloads of a few requests, for which two seats are too few."""
    monkeypatch.setattr(races, "WORKLOADS", {"offline": (12, 0.0), "long-prompts": (12, 8.0)})
    monkeypatch.setitem(races.ENGINE, "max_num_seqs", 2)


def write(path: Path, rank: str) -> Path:
    path.write_text(RANKED + rank + "\n", encoding="utf-8")
    return path


@pytest.mark.usefixtures("small")
def test_the_file_to_begin_with_is_the_engine_s_own_policy() -> None:
    mine = policy_of(TEMPLATE)
    assert mine.name == "yours"
    for workload in races.WORKLOADS:
        own, fcfs = races.run(mine, workload, 0), races.run(FCFS, workload, 0)
        assert (own.num_good, own.seconds, own.problem) == (fcfs.num_good, fcfs.seconds, "")


@pytest.mark.usefixtures("small")
def test_the_shortest_job_first_serves_more_in_time() -> None:
    fcfs, shortest = (races.run(policy, "offline", 0) for policy in (FCFS, SHORTEST))
    assert shortest.num_good > fcfs.num_good > 0


def test_whole_steps_of_prompts_stop_the_running_requests() -> None:
    """On "long-prompts", requests that have to wait for every prompt break the SLO between two tokens."""
    fcfs, prefill, decode = (races.run(policy, "long-prompts", 0) for policy in (FCFS, PREFILL_FIRST, DECODE_FIRST))
    assert not (fcfs.problem or prefill.problem or decode.problem)
    assert prefill.num_good < fcfs.num_good and decode.num_good < fcfs.num_good


@pytest.mark.usefixtures("small")
def test_a_broken_policy_scores_nothing_and_disturbs_no_other(tmp_path: Path) -> None:
    runs = races.race(policy_of(write(tmp_path / "broken.py", "return request.no_such_attribute")))
    assert list(runs)[-1] == "yours" and races.score(runs["yours"]) == 0.0
    assert "no_such_attribute" in "\n".join(races.table(runs))
    assert all(races.score(runs[policy.name]) > 0 for policy in (FCFS, SHORTEST))


def test_a_policy_that_knows_the_length_of_the_answer_is_marked(tmp_path: Path) -> None:
    assert policy_of(write(tmp_path / "a.py", "return request.max_tokens")).name == "yours (oracle)"
    assert policy_of(write(tmp_path / "b.py", "return request.num_tokens  # not max_tokens")).name == "yours"
    assert policy_of(write(tmp_path / "c.py", "return getattr(request, 'max_tokens')")).name == "yours (oracle)"
    heir = write(tmp_path / "d.py", "return 0.0")
    heir.write_text(heir.read_text().replace("RankedQueue", "ShortestJobQueue"))
    assert policy_of(heir).name == "yours (oracle)"


def test_a_scheduler_and_a_queue_are_found_by_what_they_inherit_from(tmp_path: Path) -> None:
    path = tmp_path / "both.py"
    scheduler = "from folovllm.core.sched.scheduler import Scheduler\nclass Mine(Scheduler):\n    pass\n"
    path.write_text(scheduler + RANKED + "return 0.0\n", encoding="utf-8")
    assert policy_of(path).parts == {races.SCHEDULER: f"{path}:Mine", races.QUEUE: f"{path}:Queue"}
    path.write_text("class Queue:\n    pass\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no class that inherits from RankedQueue"):
        policy_of(path)


def test_the_leaderboard_keeps_each_version_once(tmp_path: Path) -> None:
    board, file = Leaderboard(tmp_path / "work/.race.jsonl"), tmp_path / "race.py"
    assert board.best(seed=0) == []
    policy = Policy("yours", str(file))
    for text, good, seed in (("1", 5, 0), ("2", 9, 0), ("2", 9, 0), ("3", 7, 1)):
        file.write_text(text, encoding="utf-8")
        board.add(file, [Run(policy, "chat", good, 2.0), Run(policy, "offline", good, 3.0)], seed)
    assert [entry["score"] for entry in board.best(seed=0)] == [18 / 5, 10 / 5]
    assert board.best(seed=0)[0]["goodput"] == {"chat": 4.5, "offline": 3.0}
    assert len(board.path.read_text(encoding="utf-8").splitlines()) == 4


def test_a_damaged_leaderboard_loses_only_its_bad_lines(tmp_path: Path) -> None:
    board, file = Leaderboard(tmp_path / "work/.race.jsonl"), tmp_path / "race.py"
    file.write_text("")
    board.add(file, [Run(Policy("yours", str(file)), "chat", 3, 2.0)], 0)
    with board.path.open("ab") as out:
        out.write(b'junk\n\xff\n[1]\n{"seed": 0, "hash": "x"}\n{"seed": 0')
    board.add(file, [Run(Policy("yours", str(file)), "chat", 4, 2.0)], 0)
    assert [entry["score"] for entry in board.best(seed=0)] == [2.0]


def test_a_policy_that_ends_the_program_scores_nothing(tmp_path: Path) -> None:
    result = races.run(policy_of(write(tmp_path / "ends.py", "raise SystemExit(0)")), "chat", 0)
    assert result.problem.startswith("SystemExit") or "SystemExit" in result.problem


@pytest.mark.usefixtures("small")
def test_the_command_creates_the_file_races_and_draws(tmp_path: Path) -> None:
    app = typer.Typer()

    @app.callback()
    def set_work(ctx: typer.Context) -> None:
        ctx.obj = tmp_path / "work"

    app.command("race")(race_command)
    result = CliRunner().invoke(app, ["race", "--plot", str(tmp_path / "race.png")], catch_exceptions=False)
    assert result.exit_code == 0 and "created" in result.output
    assert all(policy.name in result.output for policy in OTHERS)
    assert (tmp_path / "work/m2/race.py").read_text() == TEMPLATE.read_text()
    assert (tmp_path / "race.png").stat().st_size > 1_000
    assert "created" not in CliRunner().invoke(app, ["race"], catch_exceptions=False).output
