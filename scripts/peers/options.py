"""The command line of compare_peers, checked before anything runs.

Milestone: M4. vLLM counterpart: none. No torch. What the benchmark has too is an option of the benchmark.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from folovllm import milestones
from folovllm.benchmarks.arms import parse_arm
from folovllm.benchmarks.options import (
    BenchOptions,
    add_run_options,
    check_options,
    names,
    positive,
    refuse_duplicates,
    room_for,
)
from folovllm.benchmarks.workloads import MODES, PROMPT_LENGTHS, prompt_length
from folovllm.model_shapes import SHAPES
from scripts.peers.catalog import (
    DEFAULT_PEERS,
    ISA_VARIABLES,
    NATIVE,
    PEERS,
    Peer,
    can_be_limited,
    get_peers,
    limited,
)
from scripts.peers.environment import default_peers_dir

PREFIX_CACHING = "m6"
ALL_PROMPTS = "prompts"  # short for the prompt modes of all lengths
DESCRIPTION = """\
Measure FoloVLLM beside other engines on the same requests, on this machine's CPU, in one run: output tokens per second,
prompts included, for 8 requests one after another ("single") and for all 32 at once ("batch"); or prompt tokens per
second for prompts of a length ("prompt1000"; "prompts" is all lengths from 256 to 8000).

--busy N measures every engine beside N busy processes. --cpu-isa avx2 limits every engine to AVX2: ours and torch by
settings, llama.cpp by an environment of its own, compiled without AVX-512.

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
    busy: int
    cpu_isa: str
    num_single: int | None
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
    add("--peers", type=names, metavar="NAME,...",
        help=f"the engines to measure beside ours (default: {','.join(DEFAULT_PEERS)}, as far as --cpu-isa can limit "
        "them)")  # fmt: skip
    add("--modes", type=names, default=list(MODES), metavar="single,batch,prompt1000",
        help=f"default: {','.join(MODES)}")  # fmt: skip
    add("--busy", type=int, default=0, metavar="N",
        help="busy processes beside every measurement, e.g. a browser or a build (default: %(default)s)")  # fmt: skip
    add("--num-single", type=positive, metavar="N",
        help="requests of the single stream (default: 8): an engine may be slow beside busy processes")  # fmt: skip
    add("--cpu-isa", choices=(NATIVE, *ISA_VARIABLES), default=NATIVE,
        help="the instruction set to which all engines are limited (default: %(default)s)")  # fmt: skip
    add("--random-weights", metavar="SHAPE",
        help="instead of a model: random weights in a public shape, the same for all engines, written once to the "
        f"cache: {', '.join(SHAPES)}")  # fmt: skip
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
    parser.set_defaults(ablate=False, baseline="none", device="cpu")
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


def ours(preset: str | None, cpu_isa: str = NATIVE) -> str:
    """The name of our arm: the preset, without prefix caching. E.g. "m5" -> "m5", "m7" -> "m7-m6"."""
    arm = preset or milestones.top_rung().id
    spec = parse_arm(arm)
    caches = milestones.fold(spec.preset, spec.without)["enable_prefix_caching"]
    arm = f"{arm}-{PREFIX_CACHING}" if caches else arm
    return arm if cpu_isa == NATIVE else f"{arm}+cpu_isa={cpu_isa}"


def _checked(args: argparse.Namespace) -> PeerOptions:
    args.modes = _modes(args.modes)
    args.max_model_len = _room(args)
    peers = args.peers or [name for name in DEFAULT_PEERS if can_be_limited(PEERS[name], args.cpu_isa)]
    refuse_duplicates("--peers", peers)
    if args.busy < 0:
        raise ValueError(f"--busy {args.busy}: expected a number of processes, 0 or more")
    if args.gguf is not None and not args.gguf.is_file():
        raise ValueError(f"--gguf {args.gguf}: there is no such file")
    args.arms = [ours(args.preset, args.cpu_isa)]
    return PeerOptions(
        bench=check_options(args),
        peers=tuple(limited(peer, args.cpu_isa) for peer in get_peers(peers)),
        modes=tuple(args.modes),
        gguf=args.gguf.absolute() if args.gguf else None,
        peers_dir=args.peers_dir.expanduser().absolute(),
        busy=args.busy,
        cpu_isa=args.cpu_isa,
        num_single=args.num_single,
        setup_only=args.setup_only,
        list_only=args.list,
    )


def _modes(asked: list[str]) -> list[str]:
    """The modes in the order in which they run: single, batch, then prompts from short to long."""
    prompts = [f"prompt{length}" for length in PROMPT_LENGTHS]
    found = [mode for name in asked for mode in (prompts if name == ALL_PROMPTS else [name])]
    for mode in found:
        if mode not in MODES and not prompt_length(mode):
            raise ValueError(f"--modes: unknown mode {mode!r}; there are {', '.join(MODES)}, prompt1000, {ALL_PROMPTS}")
    refuse_duplicates("--modes", found)
    return sorted(found, key=lambda mode: (prompt_length(mode) or 0, MODES.index(mode) if mode in MODES else 0))


def _room(args: argparse.Namespace) -> int:
    """The max_model_len that was asked for, or what the workload and the prompt modes need, in steps of 256 tokens."""
    longest = max(prompt_length(mode) or 0 for mode in args.modes) + 1
    if args.max_model_len and args.max_model_len < longest:
        raise ValueError(f"--max-model-len {args.max_model_len}: the longest prompt and its answer take {longest}")
    return int(args.max_model_len or max(room_for(args), 256 * math.ceil(longest / 256)))
