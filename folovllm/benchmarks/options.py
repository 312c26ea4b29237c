"""The benchmark's command line, checked before anything runs.

Milestone: M1. vLLM counterpart: `add_cli_args` in vllm/benchmarks/throughput.py. No torch.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from folovllm.benchmarks.arms import BASELINE, ablation_arms, default_arms, parse_arm
from folovllm.benchmarks.machine import usable_cores
from folovllm.benchmarks.workloads import WORKLOADS, make_workload
from folovllm.config import DEFAULT_MODEL, DEVICES, DTYPE_BYTES
from folovllm.core.kv_cache_utils import GIB
from folovllm.model_shapes import SHAPES, shape_config

DEFAULT_MAX_MODEL_LEN = 2048  # and more where the workload needs it
DEFAULT_FIT_PAGES = 2
DEFAULT_SWEEP = "1,2,4,8,16,32"
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DESCRIPTION = """\
Measure milestones of FoloVLLM and HuggingFace generate on the same requests, in one run: throughput, latency, KV cache,
memory, and whether the tokens are equal. Prints tables; writes JSON and PNG files to --output.

Machines are noisy: every arm runs in a fresh process, once per repeat, the arms in turn; medians are shown. Compare
within one run, and quote ratios."""


@dataclass(frozen=True)
class BenchOptions:
    """What was asked for. `arms` are names that `parse_arm` reads; `baseline` is "hf" or None."""

    model: str
    random_weights: str | None  # a shape, instead of the model
    arms: tuple[str, ...]
    baseline: str | None
    device: str
    dtype: str
    workload: str
    num_requests: int | None
    hit_rates: tuple[int, ...]
    ablate: bool  # the first of `arms` has everything on, every other one has a rung off
    repeats: int
    threads: int
    max_model_len: int
    kv_cache_memory: int  # bytes
    batch_sizes: tuple[int, ...]
    fit_pages: int | None
    output: Path
    timeout: float  # seconds
    bandwidth_bytes: int
    plot_only: Path | None  # a result file: draw its pictures again and measure nothing

    @property
    def model_name(self) -> str:
        return f"{self.random_weights} (random weights)" if self.random_weights else self.model


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_perf.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--random-weights", metavar="SHAPE",
        help="instead of a model: random weights in a public shape, the same for all arms, written once to the cache; "
        f"no download, no tokenizer: {', '.join(SHAPES)}")  # fmt: skip
    add("--milestones", dest="arms", type=names, default=[], metavar="m1,m2,...",
        help='presets to measure; "m3-m2" leaves m2 out, "m5+budget=256" sets max_num_batched_tokens (any engine '
        "argument by its name) (default: all built that the workload is about)")  # fmt: skip
    add("--ablate", action="store_true",
        help="measure the top milestone (or the one of --milestones) with all on, then each rung off")  # fmt: skip
    add("--baseline", choices=[BASELINE, "none"], help="HuggingFace generate, or none (default: hf if it can)")
    add("--device", choices=DEVICES, default="auto", help="default: cuda where there is one")
    add("--hit-rates", type=percentages, default=(), metavar="0,25,...",
        help="of shared-prefix: percent of the prompt that is shared (default: 0,25,50,75,95)")  # fmt: skip
    add("--batch-sizes", type=numbers, nargs="?", const=DEFAULT_SWEEP, default=(), metavar="1,2,...",
        help=f"also throughput against the number of requests sent at once (alone: {DEFAULT_SWEEP})")  # fmt: skip
    add("--fit", dest="fit_pages", type=positive, nargs="?", const=DEFAULT_FIT_PAGES, metavar="PAGES",
        help="also how many requests run at the same time in KV bytes that hold PAGES requests of full length "
        f"(alone: {DEFAULT_FIT_PAGES})")  # fmt: skip
    add_run_options(parser, repeats=3, timeout=3600)
    return parser


def add_run_options(
    parser: argparse.ArgumentParser,
    repeats: int,
    timeout: int,
    workloads: Sequence[str] = tuple(WORKLOADS),
    dtypes: Sequence[str] = tuple(DTYPE_BYTES),
) -> None:
    """The options that scripts/compare_peers.py has too: what to run, how often and where the files go."""
    add = parser.add_argument
    about = "; ".join(f"{name}: {WORKLOADS[name].about}" for name in workloads)
    add("--model", help=f"alias, HuggingFace folder or id (default: {DEFAULT_MODEL})")
    add("--dtype", choices=dtypes, default="bfloat16", help="default: %(default)s")
    add("--workload", choices=workloads, default="A", help=about)
    add("--num-requests", type=positive, metavar="N", help="only the first N requests (or more than the default)")
    add("--repeats", type=positive, default=repeats, metavar="N", help="fresh processes per arm (default: %(default)s)")
    add("--threads", type=positive, default=usable_cores(), metavar="N", help="CPU threads (default: %(default)s)")
    add("--max-model-len", type=positive, metavar="N",
        help=f"default: {DEFAULT_MAX_MODEL_LEN}, or what the workload needs")  # fmt: skip
    add("--kv-cache-memory", type=byte_size, default=GIB, metavar="SIZE", help="the same for all arms (default: 1GiB)")
    add("--output", type=Path, default=Path("bench_results"), metavar="DIR", help="default: %(default)s")
    add("--plot-only", type=Path, metavar="FILE",
        help="draw the pictures of a result file again, beside it, and measure nothing")  # fmt: skip
    add("--timeout", type=positive, default=timeout, metavar="S",
        help="seconds one process may take (default: %(default)s)")  # fmt: skip
    add("--bandwidth-memory", dest="bandwidth_bytes", type=byte_size, default=GIB, help=argparse.SUPPRESS)


def parse_options(argv: list[str]) -> BenchOptions:
    """Options from arguments; a mistake ends the program with a message (exit status 2), as argparse does."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        return check_options(args)
    except ValueError as error:
        parser.error(str(error))


def check_options(args: argparse.Namespace) -> BenchOptions:
    """Options from parsed arguments. Raises ValueError for arguments that do not go together."""
    recipe = WORKLOADS[args.workload]
    arms = _arms(args)
    refuse_duplicates("--milestones", arms)
    refuse_duplicates("--batch-sizes", args.batch_sizes)
    refuse_duplicates("--hit-rates", args.hit_rates)
    if args.model and args.random_weights:
        raise ValueError("--random-weights stands instead of --model: give one of the two")
    if args.random_weights:
        shape_config(args.random_weights)
    if args.hit_rates and not recipe.hit_rates:
        raise ValueError(f"--hit-rates belongs to --workload shared-prefix, {args.workload!r} has none")
    if recipe.has_arrivals and args.baseline == BASELINE:
        raise ValueError(f"HuggingFace generate takes no arrivals, which {args.workload!r} is about: --baseline none")
    if (args.batch_sizes or args.fit_pages) and ("batch" not in recipe.modes or recipe.has_arrivals):
        raise ValueError(f"--batch-sizes and --fit send requests at once, workload {args.workload!r} does not; use A")
    count = args.num_requests or recipe.default_count
    if args.batch_sizes and (most := max(args.batch_sizes)) > count:
        raise ValueError(f"--batch-sizes {most}: the workload has {count} requests; add --num-requests")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; give a folder")
    baseline = args.baseline or ("none" if recipe.has_arrivals else BASELINE)
    known = {option.name for option in dataclasses.fields(BenchOptions)}
    given = {name: value for name, value in vars(args).items() if name in known}
    settled = {
        "model": args.model or DEFAULT_MODEL,
        "arms": tuple(arms),
        "baseline": None if baseline == "none" else baseline,
        "max_model_len": args.max_model_len or room_for(args),
        "batch_sizes": tuple(sorted(args.batch_sizes)),
    }
    return BenchOptions(**given | settled)


def _arms(args: argparse.Namespace) -> list[str]:
    """The milestones to measure. Raises ValueError if there is no such milestone or argument."""
    asked: list[str] = args.arms
    for arm in asked:
        if arm == BASELINE:
            raise ValueError("--milestones: 'hf' is the baseline, not a milestone; use --baseline hf")
        parse_arm(arm)
    if not args.ablate:
        return asked or default_arms(args.workload)
    if len(asked) > 1 or any(arm not in default_arms() for arm in asked):
        raise ValueError(f"--ablate starts from one whole milestone, not {','.join(asked)}; e.g. --milestones m5")
    return ablation_arms(*asked)


def room_for(args: argparse.Namespace) -> int:
    """The default max_model_len, or what the longest request needs, in steps of 256 tokens."""
    some_vocabulary = 1000  # lengths do not depend on it
    longest = make_workload(args.workload, some_vocabulary, args.num_requests, args.hit_rates).longest
    return max(DEFAULT_MAX_MODEL_LEN, 256 * math.ceil(longest / 256))


def refuse_duplicates(option: str, values: Sequence[str] | Sequence[int]) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{option} names something twice: {', '.join(map(str, values))}")


def names(text: str) -> list[str]:
    """E.g. "m1, m2" -> ["m1", "m2"]."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError("expected names with commas between them, e.g. m1,m2")
    return found


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """E.g. "1,2,4" -> (1, 2, 4)."""
    return tuple(positive(part.strip()) for part in text.split(","))


def percentages(text: str) -> tuple[int, ...]:
    """E.g. "0,50,95" -> (0, 50, 95)."""
    parts = [part.strip().removesuffix("%") for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < 100 for part in parts):
        raise argparse.ArgumentTypeError(f"expected percentages from 0 to 99 like 0,25,95, got {text!r}")
    return tuple(map(int, parts))


def byte_size(text: str) -> int:
    """E.g. "512MiB" -> 536870912; a bare number is bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *(|KiB|MiB|GiB)", text.strip())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected bytes like 1GiB, 512MiB or 1073741824, got {text!r}")
    return size
