"""The ladder of milestones as data: what each rung adds, and which engine arguments switch it on or off.

Milestone: M0. vLLM counterpart: none, because vLLM has only its newest state. Here "the engine as of M2" always runs:
every optimisation is an engine argument, and a rung is a set of such arguments.

Row 0: plain data, no torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from folovllm.utils import nearest_name


class RungNotBuiltError(ValueError):
    """A milestone that the ladder names but that this version does not contain yet."""


@dataclass(frozen=True)
class Rung:
    """One milestone. `on` and `off` map engine argument names to values; a rung without `off` cannot be left out.

    A rung with neither adds something around the engine: m0 the ground it stands on, m8 the server, m9 the processes
    that share one model, m10 several engines. The engine as of m8 or later is therefore that of m7.
    """

    id: str
    title: str
    adds: str
    on: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] = field(default_factory=dict)
    built: bool = False


# None means that EngineConfig.resolve derives the value from the model and the device.
LADDER: tuple[Rung, ...] = (
    Rung("m0", "Setup", "configuration, loader, data classes", built=True),
    Rung(
        "m1",
        "Basic inference",
        "engine, model, sampler, one request at a time",
        on={"max_num_seqs": 1, "batching": "static"},
        built=True,
    ),
    Rung(
        "m2",
        "Continuous batching",
        "requests join and leave at every step",
        on={"max_num_seqs": None, "batching": "continuous"},
        off={"max_num_seqs": None, "batching": "static"},
        built=True,
    ),
    Rung(
        "m3",
        "Paged KV cache",
        "the cache in blocks of 16 tokens, found through block tables",
        on={"block_size": 16},
        off={"block_size": "max_model_len"},
        built=True,
    ),
    Rung(
        "m4",
        "Flash attention",
        "tiled attention backends and the fast CPU path; M1 to M3 run plain torch",
        on={
            "attention_backend": "auto",
            "linear_backend": "auto",
            "fused_ops": "auto",
            "fused_mlp": "auto",
            "decoder_stack": "auto",
            "sampler_backend": "auto",
            "huge_pages": True,
            "touch_kv_pages": True,
            "keep_freed_memory": True,
        },
        off={
            "attention_backend": "torch_naive",
            "linear_backend": "torch",
            "fused_ops": False,
            "fused_mlp": False,
            "decoder_stack": False,
            "sampler_backend": "torch",
            "huge_pages": False,
            "touch_kv_pages": False,
            "keep_freed_memory": False,
        },
        built=True,
    ),
    Rung(
        "m5",
        "Chunked prefill",
        "long prompts split over steps, mixed with decodes",
        on={"enable_chunked_prefill": True},
        off={"enable_chunked_prefill": False},
        built=True,
    ),
    Rung(
        "m6",
        "Prefix caching",
        "blocks of equal prompt prefixes shared between requests",
        on={"enable_prefix_caching": True},
        off={"enable_prefix_caching": False},
        built=True,
    ),
    Rung(
        "m7",
        "GPTQ",
        "4-bit weights",
        on={"quantization": "auto"},
        off={"quantization": "dequantize"},
        built=True,
    ),
    Rung("m8", "Serving", "the engine behind an OpenAI-compatible server", built=True),
    Rung(
        "m9",
        "Tensor and pipeline parallelism",
        "one model divided among several processes",
        built=True,
    ),
    Rung("m10", "Scale-out", "several engines behind one server, and Ray where they leave the machine", built=True),
)
RUNG_IDS = tuple(rung.id for rung in LADDER)


def rung_number(rung_id: str) -> int:
    """The place of a milestone on the ladder, for sorting: as text, "m10" would come before "m2"."""
    return RUNG_IDS.index(rung_id)


def get_rung(rung_id: str) -> Rung:
    """Returns the rung named `rung_id`. Raises ValueError with the known ids and the nearest one."""
    for rung in LADDER:
        if rung.id == rung_id:
            return rung
    raise ValueError(f"unknown milestone {rung_id!r}; the ladder has {', '.join(RUNG_IDS)}{_did_you_mean(rung_id)}")


def _did_you_mean(name: Any) -> str:
    """Returns, e.g. for "M3", "3" or "paged cache", "; did you mean 'm3'?"."""
    spellings = {spelling: rung.id for rung in LADDER for spelling in (rung.id, rung.id[1:], rung.title.lower())}
    near = nearest_name(str(name).lower(), spellings, cutoff=0.6)
    return f"; did you mean {spellings[near]!r}?" if near else ""


def engine_rungs() -> tuple[Rung, ...]:
    """Returns the built rungs that switch something: each of them is an engine of its own."""
    return tuple(rung for rung in LADDER if rung.built and rung.on)


def top_rung() -> Rung:
    """Returns the highest of the engine's rungs, which an engine without a preset runs."""
    return engine_rungs()[-1]


def fold(top: str, without: Iterable[str] = ()) -> dict[str, Any]:
    """Returns the engine arguments of "the engine as of `top`", with the rungs in `without` switched off.

    E.g. `fold("m3")` switches on m1 to m3, and `fold("m3", without=["m2"])` is the same with batching="static".
    """
    up_to = _buildable(top)
    left_out = _removable(without, up_to)
    args: dict[str, Any] = {}
    for rung in LADDER:
        args |= rung.off
    for rung in up_to:
        args |= rung.off if rung.id in left_out else rung.on
    return args


def rungs_above_top() -> tuple[Rung, ...]:
    """Returns the rungs that the ladder names but that are not built yet."""
    return tuple(rung for rung in LADDER if not rung.built)


def _buildable(top: str) -> tuple[Rung, ...]:
    rung = get_rung(top)
    if rung.id == "m0":
        raise ValueError("preset 'm0' has no engine: there is no engine before m1; use preset='m1'")
    if not rung.built:
        raise RungNotBuiltError(
            f"milestone {rung.id} ({rung.title}) is not built yet; the highest built one is {top_rung().id}"
        )
    return LADDER[: LADDER.index(rung) + 1]


def _removable(without: Iterable[str], up_to: tuple[Rung, ...]) -> frozenset[str]:
    if isinstance(without, str):
        without = (without,)
    if not isinstance(without, Iterable):
        raise ValueError(f"without must be a list of milestones like ['m2'], got {without!r}; use () to leave out none")
    left_out = frozenset(get_rung(rung_id).id for rung_id in without)
    for rung_id in sorted(left_out):
        if not get_rung(rung_id).off:
            raise ValueError(f"without={rung_id!r}: {_why_it_stays(get_rung(rung_id))}; drop it from without")
        if rung_id not in {rung.id for rung in up_to}:
            raise ValueError(
                f"without={rung_id!r}: the preset {up_to[-1].id!r} does not include it; drop it from without"
            )
    return left_out


def _why_it_stays(rung: Rung) -> str:
    if not rung.on and rung.id != "m0":
        return f"{rung.id} switches nothing in the engine"
    return f"{rung.id} is the ground the others stand on"
