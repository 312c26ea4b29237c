"""The command line of compare_peers, checked before anything runs.

Milestone: M4. vLLM counterpart: none. No torch. What the benchmark has too is an option of the benchmark.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from folovllm import milestones
from folovllm.benchmarks.arms import parse_arm
from folovllm.benchmarks.options import BenchOptions, add_run_options, check_options, names, refuse_duplicates
from folovllm.benchmarks.workloads import MODES
from scripts.peers.catalog import DEFAULT_PEERS, PEERS, Peer, get_peers
from scripts.peers.environment import default_peers_dir

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
    """What was asked for. `bench` has what compare_perf has too, and our arm as the only one of its arms."""

    bench: BenchOptions
    peers: tuple[Peer, ...]
    modes: tuple[str, ...]
    gguf: Path | None
    peers_dir: Path
    setup_only: bool
    list_only: bool

    @property
    def preset(self) -> str:
        return self.bench.arms[0]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_peers.py",
        description=DESCRIPTION,
        epilog="peers:\n" + "\n".join(f"  {peer.name:14} {peer.label}: {peer.about}" for peer in PEERS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--peers", type=names, default=list(DEFAULT_PEERS), metavar="NAME,...",
        help=f"the engines to measure beside ours (default: {','.join(DEFAULT_PEERS)})")  # fmt: skip
    add("--modes", type=names, default=list(MODES), metavar="single,batch", help="default: both")
    add("--preset", metavar="mN",
        help="the milestone that stands for us (default: the newest). Prefix caching is switched off everywhere: the "
        "batch repeats the requests of the single stream")  # fmt: skip
    add("--gguf", type=Path, metavar="FILE", help="the same model as GGUF (default: the one the alias is made from)")
    add("--setup-only", action="store_true", help="make the environments and the weight files, measure nothing")
    add("--list", action="store_true", help="show the peers and which of them are installed, do nothing")
    add("--peers-dir", type=Path, default=default_peers_dir(), metavar="DIR",
        help="where the environments are (default: %(default)s)")  # fmt: skip
    add_run_options(parser, repeats=5, timeout=1800, workloads=("A", "smoke"), dtypes=("bfloat16", "float32"))
    # What compare_perf has besides.
    parser.set_defaults(random_weights=None, ablate=False, baseline="none", device="cpu")
    parser.set_defaults(hit_rates=(), batch_sizes=(), fit_pages=None)
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
    """The name of our arm: the preset, without prefix caching. E.g. "m5" -> "m5", "m7" -> "m7-m6"."""
    arm = preset or milestones.top_rung().id
    spec = parse_arm(arm)
    caches = milestones.fold(spec.preset, spec.without)["enable_prefix_caching"]
    return f"{arm}-{PREFIX_CACHING}" if caches else arm


def _checked(args: argparse.Namespace) -> PeerOptions:
    unknown = [mode for mode in args.modes if mode not in MODES]
    if unknown:
        raise ValueError(f"--modes: unknown mode {unknown[0]!r}; there are {', '.join(MODES)}")
    refuse_duplicates("--peers", args.peers)
    refuse_duplicates("--modes", args.modes)
    if args.gguf is not None and not args.gguf.is_file():
        raise ValueError(f"--gguf {args.gguf}: there is no such file")
    args.arms = [ours(args.preset)]
    return PeerOptions(
        bench=check_options(args),
        peers=tuple(get_peers(args.peers)),
        modes=tuple(mode for mode in MODES if mode in args.modes),
        gguf=args.gguf.absolute() if args.gguf else None,
        peers_dir=args.peers_dir.expanduser().absolute(),
        setup_only=args.setup_only,
        list_only=args.list,
    )
