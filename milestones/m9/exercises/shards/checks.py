"""Checks of m9/shards."""

import dataclasses
from typing import Any

from folovllm.learn.check import Mine, check
from folovllm.model_shapes import shape_architecture
from folovllm.parallel import ModelShard


def prediction() -> str:
    sizes = ", ".join(str(len(layers)) for layers in stages(ModelShard, 32, 6))
    return f"{sizes}\n5 for each, and the 2 that are left over go to the stages before the last."


def stages(cls: Any, num_layers: int, pp_size: int) -> list[range]:
    """The layers of every stage."""
    found = [cls(pp_rank=stage, pp_size=pp_size).layers(num_layers) for stage in range(pp_size)]
    wrong = next((layers for layers in found if not isinstance(layers, range)), None)
    assert wrong is None, f"layers({num_layers}) returned {wrong!r}, expected a range"
    return found


@check("unit", spec="R9.1", hint=2)
def six_layers_in_four_stages(mine: Mine) -> None:
    """What is left over goes to the stages before the last, from the back."""
    for num_layers, pp_size, wanted in (
        (6, 4, [1, 2, 2, 1]),
        (7, 4, [2, 2, 2, 1]),
        (5, 4, [1, 1, 2, 1]),
        (5, 2, [3, 2]),
    ):
        sizes = [len(layers) for layers in stages(mine.cls, num_layers, pp_size)]
        assert sizes == wanted, (
            f"{num_layers} layers in {pp_size} stages have the sizes {sizes}, expected {wanted}: the last stage has "
            "the head as well, so the ones before it take what is left over"
        )


@check("unit", spec="R9.1", hint=1)
def the_whole_model_is_one_stage(mine: Mine) -> None:
    """With one stage, the rank has all layers."""
    found = mine.cls().layers(30)
    assert found == range(30), f"one stage of 30 layers has {found!r}, expected range(0, 30)"


@check("unit", spec="R9.2", hint=3)
def a_rank_has_at_least_one_kv_head(mine: Mine) -> None:
    """The KV heads are divided; with more ranks than heads, each rank still needs one to attend to."""
    for total, tp_size, wanted in ((8, 1, 8), (8, 4, 2), (3, 3, 1), (2, 4, 1), (1, 8, 1)):
        for rank in range(tp_size):
            found = mine.cls(tp_rank=rank, tp_size=tp_size).num_kv_heads(total)
            assert found == wanted, f"rank {rank} of {tp_size} holds {found} of {total} KV heads, expected {wanted}"


@check("unit", spec="R9.2", hint=3)
def the_attention_of_a_rank(mine: Mine) -> None:
    """SmolLM2 on 3 parts and 2 stages: a third of the heads, half of the layers, and nothing else changes."""
    whole = shape_architecture("smollm2-135m")
    for rank, (part, stage) in enumerate((part, stage) for stage in range(2) for part in range(3)):
        found = mine.cls(part, 3, stage, 2).attention_arch(whole)
        wanted = dataclasses.replace(whole, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=15)
        differs = [
            f"{field.name} is {getattr(found, field.name)!r}, expected {getattr(wanted, field.name)!r}"
            for field in dataclasses.fields(wanted)
            if getattr(found, field.name, None) != getattr(wanted, field.name)
        ]
        assert not differs, f"attention_arch of rank {rank} of 3 x 2: {'; '.join(differs)}"
    assert whole == shape_architecture("smollm2-135m"), "attention_arch has changed the architecture that it was given"


@check("property", spec="R9.1", hint=2)
def the_stages_have_every_layer_once(mine: Mine) -> None:
    """Any number of layers and stages: complete, in order, as equal as possible, the last stage not the longest."""
    for pp_size in range(1, 9):
        for num_layers in range(pp_size, 40):
            found = stages(mine.cls, num_layers, pp_size)
            held = [layer for layers in found for layer in layers]
            case = f"{num_layers} layers in {pp_size} stages: {found}"
            assert held == list(range(num_layers)), f"{case}: not every layer once, in order"
            sizes = [len(layers) for layers in found]
            assert max(sizes) - min(sizes) <= 1, f"{case}: the sizes {sizes} differ by more than one"
            assert sizes[-1] == min(sizes), f"{case}: the last stage has a layer more than another one, and the head"
            middle = sizes[:-1]
            assert middle == sorted(middle), (
                f"{case}: an earlier stage has more layers than a later one before the last"
            )


@check("property", spec="R9.2", hint=3)
def the_kv_cache_is_divided(mine: Mine) -> None:
    """All ranks together hold K and V of every layer once, or as often as a KV head is copied."""
    for name in ("smollm2-135m", "qwen3-8b"):
        whole = shape_architecture(name)
        heads, kv_heads = whole.num_attention_heads, whole.num_key_value_heads
        sizes = [tp for tp in range(1, 33) if heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)]
        for tp_size in sizes:
            for pp_size in (1, 2, 5):
                ranks = [mine.cls(p, tp_size, s, pp_size) for s in range(pp_size) for p in range(tp_size)]
                held = sum(rank.attention_arch(whole).kv_bytes_per_token(2) for rank in ranks)
                wanted = whole.kv_bytes_per_token(2) * max(tp_size // kv_heads, 1)
                assert held == wanted, (
                    f"{name} on {tp_size} parts and {pp_size} stages: the ranks hold {held:,} bytes of K and V per "
                    f"token together, expected {wanted:,}"
                )
