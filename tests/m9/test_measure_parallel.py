"""scripts/dev/measure_parallel.py and the guard that it shares, and whether docs/learn/09 says what its tables show."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from folovllm.model_shapes import shape_architecture
from tests.script_loader import load_script

pytestmark = pytest.mark.m9

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "milestones/m9/results/parallel_cpu.json"
PAGE = ROOT / "docs/learn/09_tensor_parallel.md"
quiet_machine: Any = load_script("quiet_machine")


# ---- the guard


def test_the_share_of_others_is_that_of_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 s on 2 cores, 6 s busy, of which 1 s was ours: 5 of 20 s."""
    monkeypatch.setattr(quiet_machine.os, "cpu_count", lambda: 2)
    assert quiet_machine.others_share((100.0, 50.0, 3.0), (110.0, 56.0, 4.0)) == 0.25
    assert quiet_machine.others_share((0.0, 0.0, 0.0), (1.0, 0.5, 0.6)) == 0.0, "the clocks differ a little"


def test_this_process_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    began = quiet_machine.processor_times()
    while quiet_machine.processor_times()[2] - began[2] < 0.3:
        pass
    seconds, busy, own = (b - a for a, b in zip(began, quiet_machine.processor_times(), strict=True))
    assert own >= 0.3 and busy >= own - 0.1 and seconds > 0


@pytest.mark.parametrize("share", [0.02, 0.6])
def test_a_busy_machine_is_refused(share: float, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The tables of docs/learn/09 once held time slices of a machine that others used, taken for bandwidth."""
    monkeypatch.setattr(quiet_machine, "others_share", lambda began, ended: share)
    if share > quiet_machine.MOST:
        with pytest.raises(SystemExit, match="other programs take 60% of the cores"):
            quiet_machine.QuietMachine(allow_busy=False, seconds=0)
    quiet = quiet_machine.QuietMachine(allow_busy=True, seconds=0)
    assert quiet.facts() == {"others_before": share, "others_during": share}
    assert ("do not publish" in capsys.readouterr().err) == (share > quiet_machine.MOST)


# ---- what the page says of its tables


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads(RESULT.read_text(encoding="utf-8"))["results"]
    return results


def says(words: str) -> None:
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", PAGE.read_text(encoding="utf-8"))  # without links
    assert words in text, f"docs/learn/09 does not say {words!r} any more"


def test_small_all_reduces_are_latency_and_large_ones_bandwidth(rows: list[dict[str, Any]]) -> None:
    two, three = (
        {row["tokens"]: row["us_p50"] for row in rows if row["table"] == "all_reduce" and row["ranks"] == ranks}
        for ranks in (2, 3)
    )
    says("From 1 to 32 tokens the bytes grow 32 times and the median (p50) hardly changes")
    assert all(0.5 < median[32] / median[1] < 2 for median in (two, three))
    says("From 128 to 2,048 tokens the median of three ranks grows")
    assert three[2048] > 2 * three[128]
    says("A time of about 4 or 8 ms is neither, and with two ranks the medians from 512 tokens on are such times")
    assert all(min(abs(two[tokens] - slice_us) for slice_us in (4000, 8000)) < 500 for tokens in (512, 2048))


def test_ranks_on_one_machine_lose_as_the_page_says(rows: list[dict[str, Any]]) -> None:
    engine = {row["arm"]: row for row in rows if row["table"] == "engine"}
    two, one = engine["one process, 2 threads"], engine["one process, 1 thread"]
    layers, tp, pp = engine["one process, 1 thread, layer by layer"], engine["TP 3"], engine["PP 2"]
    says("tensor parallelism *must* lose")
    assert all(tp[f"{mode}_tok_per_s"] < layers[f"{mode}_tok_per_s"] for mode in ("single", "batch"))
    says("one process with one thread is the best that it can reach")
    assert pp["single_tok_per_s"] < one["single_tok_per_s"]
    says("which read all weights twice, where one process with two threads reads them once")
    assert pp["batch_tok_per_s"] < two["batch_tok_per_s"]


def test_stages_gain_where_a_prompt_has_several_chunks(rows: list[dict[str, Any]]) -> None:
    says("In *prompt* the stages can work on two chunks at the same time; with one chunk they gain nothing")
    engine = {row["arm"]: row for row in rows if row["table"] == "engine"}
    one, pp = engine["one process, 1 thread"], engine["PP 2"]
    gain = pp["prompt_tok_per_s"] / one["prompt_tok_per_s"]
    assert gain > 1.2 if pp["chunks"] > 3 else gain < 1.1


def test_an_all_reduce_in_the_engine_waits_for_the_last_rank(rows: list[dict[str, Any]]) -> None:
    says("An all-reduce takes longer here than in the table above")
    (engine,) = (row for row in rows if row.get("arm") == "TP 3")
    (bare,) = (row for row in rows if row["table"] == "all_reduce" and (row["ranks"], row["tokens"]) == (3, 1))
    assert engine["all_reduce_us"] > bare["us_p50"]


def test_a_message_is_cheap_beside_a_step(rows: list[dict[str, Any]]) -> None:
    says("without a step to compute, is cheap")
    (one,) = (row for row in rows if row.get("arm") == "one process, 1 thread")
    trips = [row["us_p50"] for row in rows if row["table"] == "round_trip"]
    assert len(trips) == 2 and max(trips) < 0.1 * 1e6 / one["single_tok_per_s"]


def test_a_chunk_divides_the_prompt_that_is_measured() -> None:
    script: Any = load_script("measure_parallel")
    assert script.LONG_PROMPT == script.CHUNK * script.NUM_CHUNKS and script.NUM_CHUNKS >= 4
    assert script.SIZES[0] == 1 and {32, 128, 2048} < set(script.SIZES)


def test_the_head_of_the_small_model_is_eight_layers() -> None:
    says("LM head costs as much as 8 of its layers")
    arch = shape_architecture("smollm2-135m")
    head = arch.vocab_size * arch.hidden_size
    layer = (arch.num_parameters() - head) / arch.num_hidden_layers
    assert round(head / layer) == 8
