"""compare_peers under a condition: busy processes, an instruction set, prompts of a length, random weights.

No peer is installed. The measurements that a condition is about are in milestones/m4/results.
"""

import json
import os
import signal
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from folovllm.benchmarks.arms import ArmTask
from folovllm.benchmarks.workloads import make_workload, one_by_one, prompt_length
from scripts.peers import busy, catalog, environment, report
from scripts.peers.adapters import __file__ as adapters_file
from scripts.peers.bench import Bench
from scripts.peers.busy import busy_processes
from scripts.peers.catalog import NATIVE, OURS, PEERS, Environment, Peer, PeerError
from scripts.peers.comparison import PairRuns, summarise_peer
from scripts.peers.folder_to_gguf import main as folder_to_gguf
from scripts.peers.options import parse_options
from scripts.peers.plot import write_plot
from scripts.peers.weights import Model, find_weights
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

# An adapter that answers at once. Its settings say how many busy processes it saw, and what limits torch.
WITNESS = """
    import os, sys
    import psutil
    sys.path.insert(0, {adapters!r})
    from peer_process import Engine, main

    def load(imported, task):
        beside = psutil.Process({parent}).children(recursive=True)
        busy = sum("while True: pass" in process.cmdline()[-1] for process in beside if len(process.cmdline()) == 5)
        seen = {{"busy": busy, "aten": os.environ.get("ATEN_CPU_CAPABILITY"), "modes": list(task["modes"])}}
        return Engine(lambda requests: [[7] * count for _, count in requests], "1", seen)

    sys.exit(main(lambda task: None, load))
"""


def bench_of(folder: Path, modes: tuple[str, ...] = ("single",), **changes: object) -> Bench:
    """A bench whose peer "witness" has seen under what condition it was measured."""
    adapter = folder / "witness.py"
    text = textwrap.dedent(WITNESS).format(adapters=str(Path(adapters_file).parent), parent=os.getpid())
    adapter.write_text(text)
    peers = {"witness": Peer("witness", "Witness", catalog.FOLDER, "", adapter=adapter), **PEERS}
    task = ArmTask("m7-m6", "", 1000, "smoke", 1, modes, "cpu", "float32", 2, 2048, 2**30)
    return Bench(task, task.make_workload(), peers, {"witness": folder}, folder, timeout=60, **changes)


# --- busy processes


def test_busy_processes_run_beside_the_measurement_and_not_after_it(tmp_path):
    seen = bench_of(tmp_path, busy=2).measure("witness")["settings"]
    assert seen["busy"] == 2 and seen["aten"] is None
    assert bench_of(tmp_path).measure("witness")["settings"]["busy"] == 0, "none is left"


def test_a_busy_process_that_was_ended_voids_the_measurement():
    import psutil

    with pytest.raises(PeerError, match="measure again"):
        with busy_processes(1):
            for child in psutil.Process().children():
                if "while True: pass" in child.cmdline()[-1]:
                    child.send_signal(signal.SIGKILL)
                    child.wait(10)


def test_one_thread_is_our_arm_with_one_thread(tmp_path):
    command, text = bench_of(tmp_path).command_and_task("one-thread")
    ours_command, ours = bench_of(tmp_path).command_and_task(OURS)
    assert command == ours_command and json.loads(text) == json.loads(ours) | {"threads": 1}
    assert json.loads(bench_of(tmp_path).command_and_task("hf")[1])["arm"] == "hf"


def test_the_single_stream_can_be_shorter(tmp_path):
    assert parse_options(["--num-single", "1"]).num_single == 1 and parse_options([]).num_single is None
    task = replace(bench_of(tmp_path).task, num_requests=4, num_single=1)
    assert [len(task.make_workload().for_mode(mode)) for mode in ("single", "batch")] == [1, 4]


def test_the_result_says_whether_sessions_share_a_core_first(tmp_path, monkeypatch):
    monkeypatch.setattr(busy, "AUTOGROUP", tmp_path / "autogroup")
    assert busy.divides_by_session() is None
    for text, divides in (("1\n", True), ("0\n", False)):
        (tmp_path / "autogroup").write_text(text)
        assert busy.divides_by_session() is divides


# --- an instruction set


def test_a_limit_reaches_torch_by_variables_ours_by_an_argument_and_llama_cpp_by_its_environment(tmp_path):
    options = parse_options(["--cpu-isa", "avx2", "--peers-dir", str(tmp_path)])
    assert options.preset.endswith("+cpu_isa=avx2")
    assert [(peer.name, peer.environment) for peer in options.peers] == [
        ("hf", None),
        ("llamacpp", catalog.LLAMACPP_AVX2),
    ], "the default peers as far as they can be limited"
    bench = bench_of(tmp_path, variables=catalog.ISA_VARIABLES["avx2"])
    assert bench.measure("witness")["settings"]["aten"] == "avx2"


def test_a_peer_that_cannot_be_limited_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--cpu-isa", "avx2", "--peers", "llamacpp,vllm"])
    assert "vllm cannot be limited to it; --peers can be hf, one-thread, llamacpp" in capsys.readouterr().err
    assert catalog.limited(PEERS["vllm"], NATIVE) is PEERS["vllm"]


def test_what_is_compiled_with_flags_does_not_come_from_pips_cache(tmp_path, monkeypatch):
    """pip's cache knows a wheel by its version: llama.cpp for AVX2 would have been the one with AVX-512."""
    commands: list[list[str]] = []
    monkeypatch.setattr(environment, "_run", lambda command, *rest: commands.append(command))
    monkeypatch.setattr(environment, "_works", lambda *rest: True)
    for compiled in (True, False):
        made = Environment("made", ("package==1",), "pass", "", needs_compiler=compiled)
        environment._install_packages(made.requirements, made, tmp_path, tmp_path / "log", print)
    assert ["--no-cache-dir" in command for command in commands] == [True, False]
    assert catalog.LLAMACPP.needs_compiler and catalog.LLAMACPP_AVX2.needs_compiler


# --- prompts of a length


def test_prompt_modes_send_prompts_of_that_length_one_after_another():
    workload = make_workload("smoke", vocab_size=1000)
    short, long = workload.for_mode("prompt256"), workload.for_mode("prompt4000")
    assert [len(r.prompt_token_ids) for r in short] == [256] * 8 and [len(r.prompt_token_ids) for r in long] == [4000]
    assert {r.output_len for r in short + long} == {1} and max(max(r.prompt_token_ids) for r in short) < 1000
    assert short == make_workload("A", vocab_size=1000).for_mode("prompt256"), "whatever the workload is"
    assert short[0].prompt_token_ids != short[1].prompt_token_ids
    assert [prompt_length(m) for m in ("prompt8000", "prompt0", "prompt", "batch")] == [8000, None, None, None]
    assert [one_by_one(m) for m in ("single", "prompt256", "batch", "warm")] == [True, True, False, False]


def test_the_speed_of_a_prompt_mode_counts_the_tokens_of_the_prompts(tmp_path):
    result = bench_of(tmp_path, modes=("batch", "prompt256")).measure("witness")
    assert result["settings"]["modes"] == ["batch", "prompt256"]
    prompt, batch = result["modes"]["prompt256"], result["modes"]["batch"]
    assert prompt["prompt_tok_per_s"] == pytest.approx(8 * 256 / prompt["seconds"])
    assert "prompt_tok_per_s" not in batch and batch["output_tok_per_s"] > 0


def test_modes_run_from_short_to_long_and_the_engine_has_room_for_them(capsys):
    options = parse_options(["--modes", "prompts,batch,single"])
    lengths = ("prompt256", "prompt512", "prompt1000", "prompt2000", "prompt4000", "prompt8000")
    assert options.modes == ("single", "batch", *lengths) and options.bench.max_model_len == 8192
    assert parse_options(["--modes", "prompt100"]).bench.max_model_len == 2048
    for argv in (["--modes", "prompt0"], ["--modes", "prompt900", "--max-model-len", "900"], ["--busy", "-1"]):
        with pytest.raises(SystemExit):
            parse_options(argv)
    said = capsys.readouterr().err
    assert "unknown mode 'prompt0'" in said and "its answer take 901" in said and "--busy -1" in said


def test_llama_cpp_gets_a_long_prompt_in_parts_after_the_decodes_of_the_others():
    sys.path.insert(0, str(Path(adapters_file).parent))
    try:
        import llamacpp_peer
    finally:
        sys.path.pop(0)

    class Recorder(llamacpp_peer.Session):
        def __init__(self) -> None:
            self.lc, self.memory, self.steps = type("LC", (), {"llama_memory_clear": print}), None, []

        def decode(self, items):
            self.steps.append([(sequence, position) for _, position, sequence, _ in items])
            return [(item[2], i) for i, item in enumerate(items) if item[3]]

        def argmax(self, row):
            return row

    session = Recorder()
    answers = session.run([[[5, 6], 4], [list(range(1000)), 2]])
    assert [len(answer) for answer in answers] == [4, 2]
    assert [len(step) for step in session.steps] == [512, 1 + 490, 2, 1]
    assert session.steps[1][:2] == [(0, 2), (1, 510)], "the decode first, then the rest of the prompt"
    assert [step[-1] for step in session.steps[1:3]] == [(1, 999), (1, 1000)]


# --- random weights


def test_random_weights_become_the_gguf_file_of_a_peer(tiny_model_dir, tmp_path):
    import torch
    from safetensors.torch import load_file

    folder, said = tiny_model_dir("qwen3"), []
    model = Model("org/name", folder, "bfloat16", is_random=True)
    path = find_weights(catalog.CONVERTED, model, PEERS["llamacpp"], tmp_path, said.append)
    assert find_weights(catalog.CONVERTED, model, PEERS["llamacpp"], tmp_path, said.append) == path and len(said) == 1
    reader = gguf.GGUFReader(path)
    found, wanted = {tensor.name: tensor for tensor in reader.tensors}, load_file(folder / "model.safetensors")
    assert len(found) == len(wanted)
    matrix = torch.from_numpy(found["blk.1.attn_q.weight"].data.copy()).view(torch.bfloat16)  # [q_size, hidden_size]
    assert torch.equal(matrix, wanted["model.layers.1.self_attn.q_proj.weight"].bfloat16())
    norm = torch.from_numpy(found["blk.0.attn_k_norm.weight"].data.copy())  # [head_dim]
    assert torch.equal(norm, wanted["model.layers.0.self_attn.k_norm.weight"].float())
    assert reader.fields["qwen3.vocab_size"].contents() == wanted["model.embed_tokens.weight"].shape[0]


def test_a_family_of_other_rows_is_not_turned_into_gguf(tiny_model_dir, tmp_path):
    with pytest.raises(SystemExit, match="type llama with default RoPE cannot"):
        folder_to_gguf(str(tiny_model_dir("llama")), str(tmp_path / "x.gguf"))


# --- what a reader sees


def result_of(modes: list[str], **run: object) -> dict:
    """A result in which ours is twice as fast as the peer in every mode."""
    names = {mode: "prompt_tok_per_s" if prompt_length(mode) else "output_tok_per_s" for mode in modes}

    def engine(speed: float) -> dict:
        measured = {mode: {names[mode]: speed * (i + 1), "tokens": [[1]]} for i, mode in enumerate(modes)}
        return {"load": {"load_seconds": 1.0}, "version": "1", "modes": measured}

    runs = PairRuns([{OURS: engine(200.0), "peer": engine(100.0)}])
    mine = {mode: {names[mode]: report_spread(200.0 * (i + 1))} for i, mode in enumerate(modes)}
    shared = {"weights": "bfloat16", "ok": True}
    described = {
        "modes": modes, "threads": 2, "repeats": 1, "command": "x", "model": "small", "dtype": "bfloat16",
        "workload": {"name": "A", "num_requests": dict.fromkeys(modes, 1)},
    }  # fmt: skip
    return {
        "date": "2026-11-30",
        "machine": {"cpu": "CPU", "git": None},
        "run": described | run,
        "bandwidth": {"bytes_per_second": 1e9, "floor_tok_per_s": 3.0},
        "arms": {
            OURS: {"label": "FoloVLLM m7", "load": {}, "version": "1", "modes": mine, **shared},
            "peer": summarise_peer(runs, "peer", modes) | {"label": "Peer", **shared},
        },
    }


def report_spread(value: float) -> dict:
    return {"median": value, "min": value, "max": value, "repeats": [value]}


def test_the_headline_names_the_condition():
    assert report.condition({}) == "", "as in files of before there were conditions"
    assert report.condition({"busy": 1, "cpu_isa": NATIVE}) == ", beside 1 busy process"
    assert report.condition({"busy": 2, "cpu_isa": "avx2"}) == ", beside 2 busy processes, limited to AVX2"
    shown = report.headline(result_of(["batch", "prompt1000"], busy=1, random_weights="small"))
    assert "CPU, small, 2 threads, beside 1 busy process, memory" in shown
    assert shown.endswith("output tokens per second with prompts and prompt tokens per second, one pair each")


def test_one_length_is_a_column_and_many_are_a_table_and_a_curve(tmp_path):
    few, many = result_of(["batch", "prompt1000"]), result_of(["batch", *(f"prompt{n}" for n in (256, 1000, 8000))])
    assert report.engine_rows(few)[1]["prompts of 1,000 (1) tok/s"] == "200" and report.prompt_rows(few) == []
    assert not any("prompts" in column for column in report.engine_rows(many)[0])
    assert report.prompt_rows(many)[1] == {
        "prompt tokens": "1,000",
        "FoloVLLM m7 tok/s": "600",
        "Peer tok/s": "300",
        "ours / Peer": "2.00x",
    }
    assert "| 8,000 | 800 | 400 | 2.00x |" in report.markdown(many, "x.json")
    for index, result in enumerate((few, many, result_of(["prompt256", "prompt512", "prompt1000"]))):
        (picture,) = write_plot(result, tmp_path / f"{index}.png")
        assert picture.stat().st_size > 5000


def test_the_readme_has_a_column_per_condition(tmp_path, monkeypatch):
    results = load_script("front_results")
    files = {
        "idle": result_of(["single", "batch"]),
        "busy": result_of(["single", "batch", "prompt1000"]),
    }
    for name, result in files.items():
        result["arms"]["llamacpp"] = result["arms"].pop("peer")
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    monkeypatch.setattr(results, "MILESTONES", tmp_path)
    monkeypatch.setattr(results, "CONDITIONS", {"idle": "idle.json", "AVX2": "absent.json", "busy": "busy.json"})
    lines = results.peers(tmp_path).splitlines()
    assert lines[0].endswith("| [idle](idle.json) | [busy](busy.json) |"), "a condition without a file has no column"
    assert lines[2] == "| FoloVLLM | 200, 400 | 200, 400 |"
    assert "| llama.cpp | 100, 200 (2.00x, 2.00x) | 100, 200 (2.00x, 2.00x) |" in lines
