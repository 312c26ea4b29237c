"""The command line of compare_peers, checked before anything runs.

Milestone: M4. vLLM counterpart: none. No torch.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from folovllm import milestones
from folovllm.benchmarks.options import DEFAULT_MAX_MODEL_LEN, byte_size, names, positive, usable_cores
from folovllm.benchmarks.task import split_arm
from folovllm.benchmarks.workloads import MODES
from folovllm.config import DEFAULT_MODEL
from folovllm.core.kv_cache_utils import GIB
from scripts.peers.catalog import DEFAULT_PEERS, PEERS, Peer, get_peers
from scripts.peers.environment import default_peers_dir

DTYPES = ("bfloat16", "float32")
WORKLOAD_NAMES = ("A", "smoke")
PREFIX_CACHING = "m6"
DESCRIPTION = """\
Measure FoloVLLM beside other engines on the same requests, on this machine's CPU, in one run: output tokens per second,
prompts included, for 8 requests one after another ("single") and for all 32 at once ("batch").

Each peer gets a virtual environment of its own in the cache, made on first use; llama.cpp compiles for minutes then.
Every measurement is a fresh process. A peer is measured in pairs with ours, one directly after the other and in the
other order every second time; the ratio is the median over the pairs. Leave the machine alone meanwhile.

Writes JSON, a Markdown table and a picture to --output."""


@dataclass(frozen=True)
class PeerOptions:
    """What was asked for."""

    peers: tuple[Peer, ...]
    preset: str
    model: str
    gguf: Path | None
    dtype: str
    workload: str
    num_requests: int | None
    modes: tuple[str, ...]
    repeats: int
    threads: int
    max_model_len: int
    kv_cache_memory: int  # bytes
    output: Path
    peers_dir: Path
    timeout: float
    bandwidth_bytes: int
    setup_only: bool
    list_only: bool


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_peers.py",
        description=DESCRIPTION,
        epilog="peers:\n" + "\n".join(f"  {peer.name:14} {peer.label}: {peer.about}" for peer in PEERS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--peers", type=names, default=list(DEFAULT_PEERS), metavar="NAME,...",
        help=f"whom to measure beside ours (default: {','.join(DEFAULT_PEERS)})")  # fmt: skip
    add("--repeats", type=positive, default=5, metavar="N", help="pairs per peer (default: %(default)s)")
    add("--modes", type=names, default=list(MODES), metavar="single,batch", help="default: both")
    add("--threads", type=positive, default=usable_cores(), metavar="N",
        help="CPU threads of every engine (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, default=Path("bench_results"), metavar="DIR", help="default: %(default)s")
    add("--setup-only", action="store_true", help="make the environments and the weight files, measure nothing")
    add("--list", action="store_true", help="show the peers and which of them are installed, do nothing")
    add("--preset", metavar="mN",
        help="the milestone that stands for us (default: the newest). Prefix caching is switched off for everybody: "
        "the batch repeats the requests of the single stream")  # fmt: skip
    add("--dtype", choices=DTYPES, default="bfloat16", help="of weights that are not 4-bit (default: %(default)s)")
    add("--model", default=DEFAULT_MODEL, help="alias, HuggingFace folder or id (default: %(default)s)")
    add("--gguf", type=Path, metavar="FILE", help="the same model as GGUF (default: the one the alias is made from)")
    add("--workload", choices=WORKLOAD_NAMES, default="A", help="smoke: does it run? (default: %(default)s)")
    add("--num-requests", type=positive, metavar="N", help="only the first N requests (or more than the default)")
    add("--max-model-len", type=positive, default=DEFAULT_MAX_MODEL_LEN, metavar="N", help="default: %(default)s")
    add("--kv-cache-memory", type=byte_size, default=GIB, metavar="SIZE",
        help="for ours; vLLM and OpenVINO take it in whole GiB (default: 1GiB)")  # fmt: skip
    add("--peers-dir", type=Path, default=default_peers_dir(), metavar="DIR",
        help="where the environments are (default: %(default)s)")  # fmt: skip
    add("--timeout", type=positive, default=1800, metavar="S",
        help="seconds one measurement may take (default: %(default)s)")  # fmt: skip
    add("--bandwidth-memory", type=byte_size, default=GIB, metavar="SIZE", help=argparse.SUPPRESS)
    return parser


def parse_options(argv: list[str]) -> PeerOptions:
    """Options from arguments; a mistake ends the program with a message (exit status 2), as argparse does."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        return _checked(args)
    except ValueError as error:
        parser.error(str(error))


def ours(preset: str | None) -> str:
    """The name of our arm: the preset, without prefix caching. E.g. None -> "m5", "m7" -> "m7-m6"."""
    arm = preset or milestones.top_rung().id
    rung, without = split_arm(arm)
    return f"{arm}-{PREFIX_CACHING}" if milestones.fold(rung, without)["enable_prefix_caching"] else arm


def _checked(args: argparse.Namespace) -> PeerOptions:
    unknown = [mode for mode in args.modes if mode not in MODES]
    if unknown:
        raise ValueError(f"--modes: unknown mode {unknown[0]!r}; there are {', '.join(MODES)}")
    for option, values in (("--peers", args.peers), ("--modes", args.modes)):
        if len(set(values)) != len(values):
            raise ValueError(f"{option} names something twice: {', '.join(values)}")
    if args.gguf is not None and not args.gguf.is_file():
        raise ValueError(f"--gguf {args.gguf}: there is no such file")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; give a folder")
    return PeerOptions(
        peers=tuple(get_peers(args.peers)),
        preset=ours(args.preset),
        model=args.model,
        gguf=args.gguf.absolute() if args.gguf else None,
        dtype=args.dtype,
        workload=args.workload,
        num_requests=args.num_requests,
        modes=tuple(mode for mode in MODES if mode in args.modes),
        repeats=args.repeats,
        threads=args.threads,
        max_model_len=args.max_model_len,
        kv_cache_memory=args.kv_cache_memory,
        output=args.output,
        peers_dir=args.peers_dir.expanduser().absolute(),
        timeout=float(args.timeout),
        bandwidth_bytes=args.bandwidth_memory,
        setup_only=args.setup_only,
        list_only=args.list,
    )
