"""complete: the answers to all prompts of a data set, on `concurrency` engines in a Ray cluster.

Milestone: M10. vLLM counterpart: none; Ray has its own for vLLM, ray.data.llm.build_processor.
Left out: stages for tokens and templates on other machines, images, remote folders for the output.

    from folovllm.data import complete

    report = complete("prompts.jsonl", output="answers", model="smollm2-135m", sampling_params={"max_tokens": 64})
    for row in report.results().to_pylist():
        print(row["id"], row["text"] or row["error"])

A run that was interrupted is started again with the same arguments: what is in the folder of the output is skipped.
A bad row does not end the run. It gets a row with its error, or, without an id, a line among the rejected ones.
"""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from folovllm.checks import check_int
from folovllm.config import DEFAULT_MODEL, EngineConfig
from folovllm.data.completer import Completer, Counts, Job, Starts
from folovllm.data.results import read_rejected, read_results, written_ids
from folovllm.data.rows import BadRow, Columns, is_id, parse_line
from folovllm.distributed.ray_cluster import ENGINE_ALONE, bundle_of, import_ray, join_cluster
from folovllm.engine.core_loop import describe
from folovllm.entrypoints.start import find_model_files
from folovllm.sampling_params import SamplingParams

LINES, TABLES = (".jsonl", ".ndjson", ".json"), (".parquet",)
ROWS_TO_LOOK_AT = 100  # the first of them that has an id tells whether ids are numbers or texts
READING_CPUS = 1  # of the cluster, for Ray Data's own tasks
MAX_RESTARTS = 3  # of engines in a run: a prompt that kills its engine's process must not do so without end


@dataclass(frozen=True)
class Source:
    """Where the rows come from."""

    rows: Any  # a ray.data.Dataset
    is_lines: bool  # each row is a line of a JSONL file
    id_kind: type  # int or str


@dataclass(frozen=True)
class Report:
    """What became of the rows of a run."""

    output: Path
    num_completed: int
    num_failed: int  # rows of the results with an error
    num_rejected: int  # rows without a usable id, see `rejected`
    num_skipped: int  # rows that had a result before this run

    def results(self) -> Any:
        """All results of the folder as a `pyarrow.Table`, in the order of their ids."""
        return read_results(self.output)

    def rejected(self) -> list[dict[str, Any]]:
        """The rows that had no usable id, each with its "error"."""
        return read_rejected(self.output)


def complete(
    dataset: Any,
    *,
    output: str | Path,
    model: str = DEFAULT_MODEL,
    preset: str | None = None,
    without: Iterable[str] = (),
    sampling_params: SamplingParams | Mapping[str, Any] | None = None,
    prompt_column: str = "prompt",
    id_column: str = "id",
    concurrency: int = 1,
    batch_size: int = 32,
    batches_at_once: int = 4,
    **engine_args: Any,
) -> Report:
    """Completes the prompts of `dataset` and writes the results to the folder `output`.

    `dataset` is a Parquet or JSONL file, a folder of such files, or a `ray.data.Dataset`. Each row has an id of its
    own and a prompt (see folovllm.data.rows). `concurrency` is the number of engines. Each of them works on
    `batches_at_once` batches of `batch_size` rows, so these two together should be more than max_num_seqs. A batch is
    written when all of its rows are done. `sampling_params` as a dict go over the model's own defaults.

    Raises ValueError for bad arguments, and RuntimeError if an engine dies again and again: then what has been written
    stays, and the next run goes on from there.
    """
    ray = import_ray("folovllm.data")
    check_int("concurrency", concurrency, low=1)
    check_int("batch_size", batch_size, low=1)
    check_int("batches_at_once", batches_at_once, low=1)
    config = EngineConfig.from_args(preset=preset, without=without, model=model, **engine_args)
    find_model_files(config)  # a name that is wrong is told here and not by an actor
    sampling = _as_mapping(sampling_params)
    SamplingParams.from_dict(sampling)
    join_cluster(config.parallel_config.ray_address, concurrency * _least_cpus(config), READING_CPUS)
    options = _actor_options(ray, config, concurrency)
    source = _open(dataset, id_column)
    folder = Path(output).expanduser().absolute()
    job = Job(
        output=folder,
        engine_args={"model": model, **engine_args},
        preset=preset,
        without=tuple(without),
        sampling=sampling,
        columns=Columns(prompt_column, id_column),
        id_kind=source.id_kind,
        is_lines=source.is_lines,
        seed=config.model_config.seed,
        written=frozenset(written_ids(folder)),
    )
    counts = _run(source.rows, job, concurrency, batch_size, batches_at_once, options)
    return Report(folder, counts.completed, counts.failed, counts.rejected, counts.skipped)


def _as_mapping(params: SamplingParams | Mapping[str, Any] | None) -> dict[str, Any]:
    return dict(vars(params)) if isinstance(params, SamplingParams) else dict(params or {})


def _actor_options(ray: Any, config: EngineConfig, concurrency: int) -> dict[str, float]:
    """CPUs and GPUs of one engine. Raises ValueError if the cluster can never run all of them: Ray would wait."""
    parallel = config.parallel_config
    bundles = [bundle_of(ray, config, parallel.world_size, concurrency, READING_CPUS)]
    if parallel.executor_backend == "ray":  # the ranks are actors, with places of their own
        bundles = [ENGINE_ALONE] + [bundle_of(ray, config, 1, concurrency, READING_CPUS)] * parallel.world_size
    total = ray.cluster_resources()
    for name, reserved in (("CPU", READING_CPUS), ("GPU", 0)):
        each = sum(bundle.get(name, 0) for bundle in bundles)
        if each and concurrency * each + reserved > total.get(name, 0):
            raise ValueError(_no_room(config, concurrency, name, each, reserved, total.get(name, 0)))
    return {"num_cpus": bundles[0].get("CPU", 0), "num_gpus": bundles[0].get("GPU", 0)}


def _no_room(config: EngineConfig, concurrency: int, name: str, each: float, reserved: int, total: float) -> str:
    """What to change, so that the engines fit into the `total` CPUs or GPUs of the cluster."""
    reader = f" and {reserved} to read the rows" if reserved else ""
    wanted = f"concurrency={concurrency} takes {concurrency * each:g} {name}s{reader}"
    fixes = ["add machines to it"]
    if (most := int((total - reserved) // each)) > 0:
        fixes.insert(0, f"set concurrency={most}")
    parallel = config.parallel_config
    loop = parallel.executor_backend == "ray"  # a CPU of each engine beside its ranks, see ENGINE_ALONE
    threads = int(((total - reserved) / concurrency - loop) // parallel.world_size)
    if name == "CPU" and 0 < threads < (config.cpu_threads or 1):
        fixes.insert(0, f"set cpu_threads={threads}")
    return f"{wanted}, and the Ray cluster has {total:g}: {', or '.join(fixes)}"


def _least_cpus(config: EngineConfig) -> int:
    """How many CPUs of a cluster one engine takes at least."""
    parallel = config.parallel_config
    return (parallel.executor_backend == "ray") + parallel.world_size * (config.cpu_threads or 1)


def _open(dataset: Any, id_column: str) -> Source:
    """Finds out what the rows are. Raises ValueError if `dataset` is none, or if its first rows have no ids."""
    import ray.data

    if isinstance(dataset, ray.data.Dataset):
        first: Any = dataset.take_batch(ROWS_TO_LOOK_AT, batch_format="pyarrow")
        return Source(dataset, False, _id_kind(first.to_pylist(), id_column))
    if not isinstance(dataset, (str, os.PathLike)):
        raise ValueError(f"dataset must be a path or a ray.data.Dataset, got {type(dataset).__name__}")
    files = _files(Path(dataset).expanduser())
    suffixes = {file.suffix for file in files}
    names = [str(file) for file in files]
    if suffixes <= set(TABLES):
        return Source(ray.data.read_parquet(names), False, _id_kind(_first_of_table(files[0]), id_column))
    if suffixes <= set(LINES):
        kind = _id_kind(_first_of_lines(files[0]), id_column)
        return Source(ray.data.read_text(names, encoding="latin-1"), True, kind)
    raise ValueError(f"{dataset} has {', '.join(sorted(suffixes))} files: give Parquet files or JSONL files, not both")


def _files(path: Path) -> list[Path]:
    """The file, or the data files of the folder. Raises ValueError if there is none."""
    found = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in LINES + TABLES)
    if not found:
        raise ValueError(f"{path} is neither a Parquet or JSONL file nor a folder with some: correct the path")
    return found


def _first_of_table(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches(ROWS_TO_LOOK_AT)
        return [row for batch in itertools.islice(batches, 1) for row in batch.to_pylist()]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from None


def _first_of_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="latin-1", newline="\n") as file:
        for line in itertools.islice(file, ROWS_TO_LOOK_AT):
            with contextlib.suppress(BadRow):
                yield parse_line(line)


def _id_kind(rows: Iterable[dict[str, Any]], id_column: str) -> type:
    """int or str: what the first id is. Raises ValueError if none of the rows has one."""
    for row in rows:
        value = row.get(id_column)
        if is_id(value):
            return type(value)
    raise ValueError(
        f"none of the first rows has an id in column {id_column!r}: give each row a number or a text of its own there, "
        "or name another column with id_column. By its id a result is found, and skipped by the next run"
    )


def _run(
    rows: Any, job: Job, concurrency: int, batch_size: int, batches_at_once: int, options: Mapping[str, float]
) -> Counts:
    """Runs all batches through the engines. One block of Ray Data is one batch, so any engine can take the next one."""
    import ray
    from ray.data import ActorPoolStrategy

    pool = ActorPoolStrategy(
        size=concurrency,
        max_tasks_in_flight_per_actor=batches_at_once,
        max_concurrent_calls_per_actor=batches_at_once,
    )
    starts = ray.remote(num_cpus=0)(Starts).remote(concurrency + MAX_RESTARTS)
    batches = rows.repartition(target_num_rows_per_block=batch_size).map_batches(
        Completer,
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=pool,
        fn_constructor_args=(job, starts),
        **options,
    )
    total = Counts()
    try:
        for row in batches.iter_rows():
            for field in fields(Counts):
                setattr(total, field.name, getattr(total, field.name) + row[field.name])
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"the run has failed: {_root_cause(error)}. What is in {job.output} stays, and the next run goes on there"
        ) from error
    return total


def _root_cause(error: BaseException) -> str:
    """What an actor's code raised, behind what Ray has wrapped around it."""
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return describe(error)
