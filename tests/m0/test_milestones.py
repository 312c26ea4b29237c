"""The ladder: what each preset is, what `without` takes away, and that rungs not built yet say so."""

import dataclasses
from itertools import chain, combinations, pairwise
from typing import Any

import pytest

from folovllm import milestones
from folovllm.benchmarks.arms import ablation_arms, default_arms
from folovllm.config import EngineConfig, engine_arg_names
from folovllm.milestones import LADDER, RUNG_IDS, RungNotBuiltError, fold, get_rung, top_rung

pytestmark = pytest.mark.m0

M4_OFF = {
    "attention_backend": "torch_naive",
    "linear_backend": "torch",
    "fused_ops": False,
    "fused_mlp": False,
    "decoder_stack": False,
    "sampler_backend": "torch",
    "huge_pages": False,
    "touch_kv_pages": False,
    "keep_freed_memory": False,
}
OFF = M4_OFF | {
    "enable_chunked_prefill": False,
    "enable_prefix_caching": False,
    "quantization": "dequantize",
}
# The switches as the milestone pages document them.
PRESETS: dict[str, dict[str, Any]] = {
    "m1": OFF | {"max_num_seqs": 1, "batching": "static", "block_size": "max_model_len"},
    "m2": OFF | {"max_num_seqs": None, "batching": "continuous", "block_size": "max_model_len"},
    "m3": OFF | {"max_num_seqs": None, "batching": "continuous", "block_size": 16},
}
WHERE = engine_arg_names()


def switches(config: EngineConfig, names: Any) -> dict[str, Any]:
    return {name: getattr(getattr(config, WHERE[name]), name) for name in names}


# ---- the ladder itself


def test_the_rungs_are_m0_upwards() -> None:
    assert tuple(f"m{i}" for i in range(len(LADDER))) == RUNG_IDS
    assert {"m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "m9", "m10"} <= set(RUNG_IDS)


def test_built_rungs_come_first() -> None:
    built = [rung.built for rung in LADDER]
    assert built == sorted(built, reverse=True) and built[:4] == [True] * 4


@pytest.mark.parametrize("rung", LADDER, ids=lambda rung: rung.id)
def test_a_rung_switches_engine_arguments_that_exist(rung: milestones.Rung) -> None:
    assert set(rung.on) <= set(WHERE) and set(rung.off) <= set(rung.on)
    assert not rung.off or rung.on != rung.off
    assert rung.title and rung.adds


def test_a_rung_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LADDER[1].built = False  # type: ignore[misc]


# ---- presets


@pytest.mark.parametrize("preset", PRESETS)
def test_the_switches_of_a_preset(preset: str) -> None:
    assert fold(preset) == PRESETS[preset]
    assert switches(EngineConfig.preset(preset), PRESETS[preset]) == PRESETS[preset]


def test_without_a_preset_the_top_of_the_ladder_runs() -> None:
    assert EngineConfig.from_args() == EngineConfig.preset(top_rung().id)


def test_a_rung_adds_only_its_own_switches() -> None:
    built = [rung for rung in LADDER[1:] if rung.built]
    for lower, upper in pairwise(built):
        before, after = fold(lower.id), fold(upper.id)
        assert {name for name in after if after[name] != before[name]} <= set(upper.on)


BUILT = [rung.id for rung in LADDER if rung.built and rung.off]


@pytest.mark.parametrize("rung", BUILT)
def test_a_rung_turns_on_what_it_names_and_nothing_else(rung: str) -> None:
    """Without it the ladder is the one below. m2 is apart: its off-state is the static batch of many."""
    below = fold(RUNG_IDS[RUNG_IDS.index(rung) - 1])
    assert fold(rung, without=[rung]) == (below if rung != "m2" else below | {"max_num_seqs": None})


def test_m4_alone_leaves_plain_torch() -> None:
    on = get_rung("m4").on
    assert get_rung("m4").off == M4_OFF and all(on[name] != off for name, off in M4_OFF.items())
    assert not any(set(rung.on) & set(M4_OFF) for rung in LADDER if rung.id != "m4")


@pytest.mark.m8
def test_m8_switches_nothing() -> None:
    """The server stands around the engine, so that the engine as of m8 is that of m7."""
    assert fold("m8") == fold("m7") and EngineConfig.preset("m8") == EngineConfig.preset("m7")
    assert get_rung("m8").built and top_rung().id == "m7"
    assert fold("m8", without=["m2", "m6"]) == fold("m7", without=["m2", "m6"])


@pytest.mark.m9
@pytest.mark.m10
def test_m9_and_m10_switch_nothing() -> None:
    """Several processes compute the same engine, and several engines are each the same: no argument of a rung."""
    assert fold("m10") == fold("m9") == fold("m7") and EngineConfig.preset("m10") == EngineConfig.preset("m7")
    assert get_rung("m9").built and get_rung("m10").built and top_rung().id == "m7"


@pytest.mark.m8
def test_only_rungs_that_switch_something_are_engines_of_their_own() -> None:
    """Benchmarks, ablations and the tests of every preset go through these, and so measure no engine twice."""
    ids = [rung.id for rung in milestones.engine_rungs()]
    assert ids == ["m1", "m2", "m3", "m4", "m5", "m6", "m7"]
    assert default_arms() == ids and ablation_arms() == ["m7", *(f"m7-{rung}" for rung in ids[1:])]


@pytest.mark.m8
def test_what_switches_nothing_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="without='m8': m8 switches nothing in the engine; drop it from without"):
        EngineConfig.from_args(preset="m8", without=["m8"])
    with pytest.raises(ValueError, match="without='m1': m1 is the ground the others stand on"):
        EngineConfig.from_args(without=["m1"])


def test_m0_has_no_engine() -> None:
    with pytest.raises(ValueError, match="there is no engine before m1; use preset='m1'"):
        EngineConfig.preset("m0")


# ---- without


@pytest.mark.parametrize(
    ("without", "changes"),
    [
        ("m2", {"batching": "static"}),
        (["m3"], {"block_size": "max_model_len"}),
        (("m2", "m3"), {"batching": "static", "block_size": "max_model_len"}),
        ((), {}),
        (["m3", "m3"], {"block_size": "max_model_len"}),
    ],
)
def test_without_turns_a_rung_off(without: Any, changes: dict[str, Any]) -> None:
    assert fold("m3", without) == PRESETS["m3"] | changes
    assert switches(EngineConfig.preset("m3", without=without), changes) == changes


def test_every_ablation_of_the_top_is_a_valid_config() -> None:
    removable = [rung.id for rung in LADDER if rung.built and rung.off]
    subsets = chain.from_iterable(combinations(removable, n) for n in range(len(removable) + 1))
    folded = [fold(top_rung().id, subset) for subset in subsets]
    assert all(switches(EngineConfig.from_args(**args), args) == args for args in folded)
    assert len({repr(args) for args in folded}) == 2 ** len(removable)  # each is an engine of its own


# ---- what is not there


@pytest.fixture
def m3_unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ladder on which m3 and all above are still to come, whatever the real one has reached."""
    ladder = tuple(dataclasses.replace(rung, built=milestones.rung_number(rung.id) < 3) for rung in LADDER)
    monkeypatch.setattr(milestones, "LADDER", ladder)


@pytest.mark.usefixtures("m3_unbuilt")
def test_a_preset_that_is_not_built_yet_says_so() -> None:
    assert EngineConfig.from_args() == EngineConfig.preset("m2")
    with pytest.raises(RungNotBuiltError, match=r"m3 \(Paged KV cache\) is not built yet; the highest built one is m2"):
        EngineConfig.preset("m3")


@pytest.mark.usefixtures("m3_unbuilt")
def test_a_switch_of_a_rung_that_is_not_built_yet_says_so() -> None:
    with pytest.raises(
        RungNotBuiltError, match=r"block_size=16 belongs to milestone m3.*use block_size='max_model_len'"
    ):
        EngineConfig.from_args(block_size=16)
    assert EngineConfig.from_args(block_size="max_model_len").cache_config.block_size == "max_model_len"


@pytest.mark.usefixtures("m3_unbuilt")
def test_a_rung_that_is_not_built_yet_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="without='m3': the preset 'm2' does not include it"):
        EngineConfig.from_args(without="m3")


@pytest.mark.usefixtures("m3_unbuilt")
def test_every_rung_above_the_top_is_refused() -> None:
    assert [rung.id for rung in milestones.rungs_above_top()] == ["m3", "m4", "m5", "m6", "m7", "m8", "m9", "m10"]
    for rung in milestones.rungs_above_top():
        with pytest.raises(RungNotBuiltError, match=rf"{rung.id} \({rung.title}\) is not built yet"):
            EngineConfig.preset(rung.id)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("M3", "m3"), ("3", "m3"), (2, "m2"), ("m-1", "m1"), ("paged cache", "m3"), ("continuos batching", "m2")],
)
def test_an_unknown_milestone_finds_the_nearest(typed: Any, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown milestone .*the ladder has m0, .*did you mean '{meant}'\?"):
        get_rung(typed)


def test_nothing_near_suggests_nothing() -> None:
    with pytest.raises(ValueError, match=f"unknown milestone 'fast'; the ladder has {', '.join(RUNG_IDS)}$"):
        get_rung("fast")
