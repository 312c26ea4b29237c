"""Whole data sets on Ray Data: the same answers as `LLM`, bad rows, runs that are interrupted, engines that die."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.config import EngineConfig
from folovllm.data import Report, complete, read_results
from folovllm.data.complete import _actor_options
from tests.m10.conftest import kill, wait_for

pytestmark = [pytest.mark.m10, pytest.mark.ray]
ROOT = Path(__file__).parents[2]
ARGS: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "cpu_threads": 1}
PROMPTS = [f"the {'other ' * (i % 7)}thing {i}" for i in range(40)]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[[str], Path]) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def expected(model: str) -> list[str]:
    """The answers of `LLM`."""
    from folovllm import LLM, SamplingParams

    llm = LLM(model, **ARGS)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def run(dataset: Any, output: Path, model: str, **args: Any) -> Report:
    sampling = {"temperature": 0.0, "max_tokens": 8}
    return complete(dataset, output=output, model=model, sampling_params=sampling, **ARGS | {"batch_size": 4} | args)


def texts(report: Report) -> dict[Any, str]:
    return {row["id"]: row["text"] for row in report.results().to_pylist()}


def test_lines_are_completed_as_llm_does_and_bad_ones_are_reported(ray_cluster, tmp_path, model, expected):
    """Results come in the order of the ids, whatever the order of the input and of the answers."""
    rows: list[Any] = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)][::-1]
    rows[5:5] = ["{no json\n", "\n", {"prompt": "no id"}, {"id": "text", "prompt": "another kind of id"}]
    rows += [
        {"id": 100},
        {"id": 101, "prompt": ["a", "b"]},
        {"id": 102, "prompt": "x " * 500},
        {"id": 103, "prompt": "the", "sampling_params": {"temperature": -1}},
        {"id": 104, "prompt": "the", "sampling_params": {"max_tokens": 3}},
        {"id": 105, "prompt": [{"role": "user", "content": "Hi"}]},
        {"id": 106, "prompt": [5, 6, 7]},
    ]
    path = write_lines(tmp_path / "prompts.jsonl", rows)
    with path.open("ab") as file:
        file.write(b'{"id": 107, "prompt": "\xff\xfe"}\n')
    report = run(path, tmp_path / "answers", model)

    results = list(report.results().to_pylist())
    assert [row["id"] for row in results] == [*range(len(PROMPTS)), *range(100, 107)]
    assert [row["text"] for row in results[: len(PROMPTS)]] == expected
    errors = {row["id"]: row["error"] for row in results if row["error"] is not None}
    assert set(errors) == {100, 101, 102, 103}
    assert "column 'prompt'" in errors[100] and "temperature" in errors[103]
    assert len(results[-3]["token_ids"]) == 3 and all(row["finish_reason"] for row in results)
    assert (report.num_completed, report.num_failed, report.num_skipped) == (len(PROMPTS) + 3, 4, 0)
    assert report.num_rejected == len(report.rejected()) == 4  # no JSON, no id, another kind, no UTF-8


def test_a_second_run_goes_on_where_the_first_one_ended(ray_cluster, tmp_path, model, expected):
    """Half of the rows from Parquet, by two engines; then all of them from a JSONL file, by one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [f"r{i:02d}" for i in range(len(PROMPTS))]
    table = pa.table({"key": ids, "question": PROMPTS})
    pq.write_table(table.slice(0, 20), tmp_path / "prompts.parquet")
    columns = {"id_column": "key", "prompt_column": "question"}
    first = run(tmp_path / "prompts.parquet", tmp_path / "answers", model, concurrency=2, **columns)
    assert (first.num_completed, first.num_skipped) == (20, 0)
    lines = write_lines(tmp_path / "prompts.jsonl", table.to_pylist())
    second = run(lines, tmp_path / "answers", model, **columns)
    assert (second.num_completed, second.num_skipped) == (20, 20)
    assert list(texts(second).items()) == list(zip(ids, expected, strict=True))


def test_an_engine_that_is_killed_loses_no_row(ray_cluster, tmp_path, model):
    """Ray starts the actor again, and what it had not written is computed again: no row twice, none missing."""
    import psutil

    rows = [{"id": i, "prompt": prompt, "sampling_params": {"max_tokens": 60}} for i, prompt in enumerate(PROMPTS * 3)]
    path, output = write_lines(tmp_path / "prompts.jsonl", rows), tmp_path / "answers"
    killed = list[int]()

    def kill_the_engine() -> None:
        wait_for(lambda: list(output.glob("part-*")), "the first batch was not written")
        for process in psutil.Process().children(recursive=True):
            if "Completer" in " ".join(process.cmdline()):
                killed.append(process.pid)
                kill(process.pid)

    thread = threading.Thread(target=kill_the_engine)
    thread.start()
    report = run(path, output, model)
    thread.join()
    assert killed
    assert [row["id"] for row in report.results().to_pylist()] == list(range(len(rows)))
    again = run(path, output, model)
    assert (again.num_completed, again.num_skipped) == (0, len(rows))


def test_several_batches_are_in_the_engine_at_once(ray_cluster, tmp_path, model):
    """The engine's batch is larger than one batch of rows."""
    rows = [{"id": i, "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    path, trace = write_lines(tmp_path / "prompts.jsonl", rows), tmp_path / "steps.jsonl"
    run(path, tmp_path / "answers", model, batch_size=2, batches_at_once=4, trace=str(trace))
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert max(len(step.get("sched", ())) for step in steps) > 2


@pytest.mark.parametrize(
    "rows, args, message",
    [
        ([{"id": 1, "prompt": "x"}], {"concurrency": 0}, "concurrency must be at least 1"),
        (
            [{"id": 1, "prompt": "x"}],
            {"concurrency": 50},
            r"concurrency=50 takes 50 CPUs and 1 to read .* has 4: set concurrency=3",
        ),
        ([{"id": 1, "prompt": "x"}], {"sampling_params": {"max_token": 1}}, "max_token"),
        ([{"id": 1, "prompt": "x"}], {"block_sise": 1}, "block_size"),
        ([{"key": 1, "prompt": "x"}], {}, "none of the first rows has an id in column 'id'"),
        ([], {}, "none of the first rows"),
    ],
)
def test_bad_arguments_are_told_before_an_engine_starts(ray_cluster, tmp_path, model, rows, args, message):
    path = write_lines(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        complete(path, output=tmp_path / "answers", model=model, **ARGS | args)


DEFAULTS = """
import sys
from folovllm.data import complete

report = complete(sys.argv[1], output=sys.argv[2], model=sys.argv[3])
print("completed", report.num_completed)
"""


def test_the_default_arguments_fit_a_cluster_of_its_own(tmp_path, model):
    """docs/learn/10 shows this call. On a machine with two CPUs the engine took both, and the reader found none."""
    path = write_lines(tmp_path / "prompts.jsonl", [{"id": 7, "prompt": "the"}])
    args = [sys.executable, "-c", DEFAULTS, str(path), str(tmp_path / "answers"), model]
    done = subprocess.run(args, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["completed 1"], done.stderr


ON_RAY = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}


class Cluster:
    """What is asked of the package ray."""

    def __init__(self, **resources: float) -> None:
        self.resources = resources

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.resources}]


@pytest.mark.parametrize(
    "args, concurrency, resources, options",
    [
        ({}, 1, {"CPU": 2}, {"num_cpus": 1, "num_gpus": 0}),  # and one to read the rows
        ({}, 2, {"CPU": 16}, {"num_cpus": 7, "num_gpus": 0}),
        ({"tensor_parallel_size": 3}, 1, {"CPU": 8}, {"num_cpus": 6, "num_gpus": 0}),
        ({"tensor_parallel_size": 2}, 2, {"CPU": 8, "GPU": 4}, {"num_cpus": 1, "num_gpus": 2}),
        (ON_RAY, 1, {"CPU": 8}, {"num_cpus": 1, "num_gpus": 0}),
    ],
)
def test_an_engine_and_its_reader_fit_the_cluster(args, concurrency, resources, options):
    config = EngineConfig.from_args(**args)
    assert _actor_options(Cluster(**resources), config, concurrency) == options


@pytest.mark.parametrize(
    "args, concurrency, resources, fixes",
    [
        ({}, 1, {"CPU": 1}, "has 1: add machines to it$"),
        ({"cpu_threads": 4}, 1, {"CPU": 3}, "has 3: set cpu_threads=2, or add machines to it"),
        ({"cpu_threads": 2}, 3, {"CPU": 5}, "has 5: set cpu_threads=1, or set concurrency=2, or add machines to it"),
        ({"device": "cuda", "tensor_parallel_size": 2}, 3, {"CPU": 9, "GPU": 4}, "has 4: set concurrency=2, or add"),
    ],
)
def test_no_room_names_what_would_fit(args, concurrency, resources, fixes):
    """It said "lower concurrency", also if that was 1."""
    with pytest.raises(ValueError, match=fixes):
        _actor_options(Cluster(**resources), EngineConfig.from_args(**args), concurrency)


def test_bad_paths_name_the_path(ray_cluster, tmp_path, model):
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.jsonl").touch()
    for dataset, message in ((tmp_path / "none.jsonl", "none.jsonl is neither"), (tmp_path, "not both"), (5, "int")):
        with pytest.raises(ValueError, match=message):
            complete(dataset, output=tmp_path / "answers", model=model, **ARGS)
    with pytest.raises(ValueError, match="no results yet"):
        read_results(tmp_path)
