#!/usr/bin/env python3
"""Write measured tables into Markdown pages, from committed result files, so that no figure is typed by hand.

A page says where a table goes and from which file (paths from the repository root):

    <!-- results: milestones/m3/results/compare_perf_A_cpu.json -->
    ... written by this script ...
    <!-- /results -->

After the file name, `running=32` keeps only the rows of that value, `seq_len=512,8192` those of one of them, and
`columns=case,forward_ms` only these columns, in this order, with `_` for a space (for files with a list of
`results`); `arms=m2,m3` keeps only those arms (for a compare_perf file).
`view=ladder` writes the table of the rungs with one measured column (for a compare_perf file); `view=gptq` writes
the speeds of a bench_gptq file with the range of each ratio; `view=frontend` writes the arms of a bench_frontend file;
`view=sim table=splits` writes one table of a sim_scale file (docs/scale.md, docs/scale_replicas.md).

A block whose file does not exist yet says which script will write it, if `by=bench_frontend` names one in scripts/dev
or scripts.

    python scripts/dev/fill_results.py            rewrite all pages
    python scripts/dev/fill_results.py --check    exit code 1 if a page is not what its result file says
"""

import argparse
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for scripts.peers

from folovllm.benchmarks.arms import in_words
from scripts.peers.report import markdown, markdown_table

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- results: (\S+)((?: \w+=[\w,/%]+)*) -->\n).*?(<!-- /results -->)", re.DOTALL)
PAGES = ("README.md", "docs/**/*.md", "milestones/**/*.md")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; say which pages are out of date")
    check = parser.parse_args().check
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        filled = fill(text, page.parent)
        if filled != text:
            stale.append(page.relative_to(ROOT))
            if not check:
                page.write_text(filled, encoding="utf-8")
    print(
        "\n".join(f"{'out of date' if check else 'rewritten'}: {page}" for page in stale) or "all pages are up to date"
    )
    return 1 if check and stale else 0


def pages() -> Iterator[Path]:
    for pattern in PAGES:
        yield from sorted(ROOT.glob(pattern))


def fill(text: str, folder: Path) -> str:
    """`text` of a page in `folder` with every results block rewritten from the file it names."""

    def block(match: re.Match[str]) -> str:
        file = ROOT / match[2]
        link = os.path.relpath(file, folder)
        wanted = dict(item.split("=") for item in match[3].split())
        writer, view = wanted.pop("by", None), wanted.pop("view", None)
        if writer and not file.exists():
            return f"{match[1]}{not_measured_yet(writer)}\n{match[4]}"
        result = json.loads(file.read_text(encoding="utf-8"))
        if view == "ladder":
            table = ladder_table(result, link, folder)
        elif view == "gptq":
            table = gptq_table(result, link)
        elif view == "frontend":
            table = frontend_table(result, link)
        elif view == "sim":
            table = sim_table(result, link, wanted["table"])
        elif result.get("schema", "").startswith("folovllm.compare_peers/"):
            table = peers_table(result, link)
        else:
            table = plain_table(result, link, wanted) if "results" in result else table_of(result, link, **wanted)
        return match[1] + table + match[4]

    return BLOCK.sub(block, text)


def not_measured_yet(writer: str) -> str:
    """What stands in the place of a table whose file is still to be written by the script `writer`."""
    (script,) = (
        path
        for folder in ("scripts/dev", "scripts")
        if (path := Path(folder, f"{writer}.py")) and (ROOT / path).exists()
    )
    return f"Not measured yet: `python {script}` writes this table."


def table_of(result: dict[str, Any], link: str, arms: str = "") -> str:
    """One row per arm of a compare_perf file (or of `arms`), and the facts a reader of a number asks for first."""
    run, machine = result["run"], result["machine"]
    modes = run["workload"]["num_requests"]
    bandwidth = result["bandwidth"]["bytes_per_second"] / 1e9
    lines = [
        f"`python {run['command']}` on {machine['cpu']}, {run['threads']} threads, memory reads {bandwidth:.0f} GB/s, "
        f"{run['dtype']}, median of {run['repeats']}; KV cache {run['kv_cache_memory'] / 2**20:.0f} MiB for "
        f"every arm but HuggingFace's, max_model_len {run['max_model_len']} ([all figures]({link}), commit "
        f"{machine['git']['sha'][:10]}).",
        "",
        f"| | one by one ({modes['single']}) tok/s | | together ({modes['batch']}) tok/s | | ITL p50 / p99 ms | "
        "running at once | KV slots used | memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    shown = {name: result["arms"][name] for name in arms.split(",")} if arms else result["arms"]
    lines += [row(name, arm) for name, arm in shown.items() if "modes" in arm]
    return "\n".join(lines) + "\n"


def ladder_table(result: dict[str, Any], link: str, folder: Path) -> str:
    """One row per rung: what it adds, its switch, its tokens per second with all requests together, its page."""
    from folovllm.milestones import LADDER

    run, machine = result["run"], result["machine"]
    lines = [
        f"| | adds | switch | {run['workload']['num_requests']['batch']} requests together, tok/s | learn |",
        "|---|---|---|--:|---|",
        f"| | HuggingFace `generate`, for comparison | | {batch_speed(result, 'hf')} | |",
        *(ladder_row(rung, result, folder) for rung in LADDER if rung.built),
        "",
        f"Measured in {run['dtype']} on {machine['cpu']}, {run['threads']} threads ([all figures]({link}), commit "
        f"{machine['git']['sha'][:10]}).",
    ]
    return "\n".join(lines) + "\n"


def ladder_row(rung: Any, result: dict[str, Any], folder: Path) -> str:
    manifest = tomllib.loads((ROOT / "milestones/manifest.toml").read_text(encoding="utf-8"))
    page = Path(manifest[rung.id]["learn"])
    switches = [f"`{name}={value!r}`" for name, value in rung.on.items()]
    switch = ", ".join(switches[:2] + ["..."] * (len(switches) > 2))
    speed = int4_speed(folder) if rung.id == "m7" else batch_speed(result, rung.id)
    name = "project setup" if rung.id == "m0" else page.stem[:2]  # "00" is the page to start with
    link = f"[{name}]({os.path.relpath(ROOT / page, folder)})"
    return f"| {rung.id.upper()} {rung.title} | {rung.adds} | {switch or '-'} | {speed} | {link} |".replace("'", '"')


def batch_speed(result: dict[str, Any], arm: str) -> str:
    modes = result["arms"].get(arm, {}).get("modes")
    return f"{modes['batch']['output_tok_per_s']:.0f}" if modes else "-"


def int4_speed(folder: Path) -> str:
    """M7 changes the checkpoint, so its cell compares 4 bits with bf16: what one request gains, and what 32 lose."""
    file = ROOT / "milestones/m7/results/bench_gptq.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    memory, speed = (result["arms"][runtime] for runtime in ("memory", "speed"))
    one = f"one request {memory['single_ratio']:.2f}x ({ratios(result, 'memory', 'single')})"
    many = f"{result['settings']['batch']} together {memory['batch_ratio']:.2f}x"
    twice = f"or {speed['batch_ratio']:.2f}x with weights kept twice"
    return f"[another measurement]({os.path.relpath(file, folder)}), beside bf16: {one}, {many}, {twice}"


def gptq_table(result: dict[str, Any], link: str) -> str:
    """One row per way of holding the weights, for a bench_gptq file."""
    machine, settings = result["machine"], result["settings"]
    many, repeats = settings["batch"], settings["repeats"]
    lines = [
        f"`python {as_run_today(result['command'])}` on {machine['cpu']}, {result['threads']} threads; tokens per "
        f"second are medians of {repeats} repeats, and the ratios to bf16 are the lowest and the highest of the "
        f"repeats ([all figures]({link}), commit {machine['git']['sha'][:10]}).",
        "",
        f"| weights | 1 request, tokens/s | times bf16 | {many} requests, tokens/s | times bf16 | linear weights, MB | "
        "share of bf16 | uses 4 bits for steps of up to |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, arm in result["arms"].items():
        single, batch = (f"{arm[f'{mode}_tokens_per_second']:.1f}" for mode in ("single", "batch"))
        limit = {"bf16": "never", "memory": "any size"}.get(name, f"{arm['crossover']} tokens")
        lines.append(
            f"| `{name}` | {single} | {ratios(result, name, 'single')} | {batch} | {ratios(result, name, 'batch')} "
            f"| {arm['linear_bytes'] / 1e6:.0f} | {arm['linear_bytes_ratio']:.0%} | {limit} |"
        )
    return "\n".join(lines) + "\n"


def frontend_table(result: dict[str, Any], link: str) -> str:
    """One row per way to reach the engine, for a bench_frontend file; the figures are medians over its rounds."""
    machine, names = result["machine"], {"llm": "`LLM.generate`", "thread": "a thread", "process": "a process"}
    rows = []
    for arm, figures in result["medians"].items():
        shown = {key: value for key, value in figures.items() if key != "throughput_of_llm"}
        cells = {heading(key): text_of(value) for key, value in shown.items()}
        rows.append({"the engine in": names[arm], **cells, "of LLM's tok/s": f"{figures['throughput_of_llm']:.1%}"})
    where = f"{machine['cpu']}, {machine['cores']} cores, {result['engine']['dtype']}"
    facts = f"median of {len(result['rounds'])} rounds ([all figures]({link}), commit {machine['git']['sha'][:10]})"
    return f"`python {result['command']}` on {where}, {facts}.\n\n{markdown_table(rows)}"


def ratios(result: dict[str, Any], arm: str, mode: str) -> str:
    """E.g. "1.4x to 2.1x": an arm of a bench_gptq file against bf16, the lowest and the highest repeat."""
    pairs = zip(result["arms"][arm]["runs"][mode], result["arms"]["bf16"]["runs"][mode], strict=True)
    found = sorted(mine / base for mine, base in pairs)
    digits = 1 if mode == "single" else 2
    return "1" if arm == "bf16" else f"{found[0]:.{digits}f}x to {found[-1]:.{digits}f}x"


def peers_table(result: dict[str, Any], link: str) -> str:
    """One row per engine of a compare_peers file: the table that compare_peers itself writes beside it."""
    return markdown(result, link)


def plain_table(result: dict[str, Any], link: str, wanted: dict[str, str]) -> str:
    """A file with a list of `results`: their keys are the columns. The unit is one of time, or "logits"."""
    machine, wanted = result["machine"], dict(wanted)
    columns = wanted.pop("columns", "")
    rows = [r for r in result["results"] if all(str(r[key]) in values.split(",") for key, values in wanted.items())]
    digits = result.get("digits", 3)
    keys = {key.replace(" ", "_"): key for key in rows[0]}  # a page writes from_cache for "from cache"
    shown = [keys[name] for name in (columns.split(",") if columns else keys)]
    cells = [{heading(name): text_of(row[name], digits) for name in shown} for row in rows]
    facts = f"[all figures]({link}), commit {machine['git']['sha'][:10]}"
    has_times = result["unit"] != "logits" and (result["unit"] != "seconds" or any("seconds" in row for row in cells))
    what = f", times in {result['unit']}" if has_times else ""
    where = f"{machine['cpu']}, {machine['cores']} cores{what}"
    return f"`python {as_run_today(result['command'])}` on {where} ({facts}).\n\n{markdown_table(cells)}"


def sim_table(result: dict[str, Any], link: str, name: str) -> str:
    """One table of a sim_scale file, whose keys are the headings."""
    rows = result["tables"][name]
    texts = [key for key, value in rows[0].items() if isinstance(value, str)]
    cells = [{key: f"{v:,}" if isinstance(v, int) else text_of(v) for key, v in row.items()} for row in rows]
    facts = f"[all figures]({link}), commit {result['machine']['git']['sha'][:10]}"
    return f"Simulated by `python {result['command']}` ({facts}).\n\n{markdown_table(cells, left=len(texts))}"


def heading(name: str) -> str:
    """A key of a result file as the heading of its column. E.g. "itl_p50_ms" -> "ITL p50, ms"."""
    latency = re.sub(r"^(itl|ttft)_(\w+)_ms$", lambda match: f"{match[1].upper()} {match[2]}, ms", name)
    return latency.replace("_", " ").replace("tok per s", "tok/s")


def as_run_today(command: str) -> str:
    """The command of a result file with its script where it is now: the file records where it was.

    E.g. "scripts/bench_gptq.py --batch 32" -> "scripts/dev/bench_gptq.py --batch 32".
    """
    moved = re.sub(r"^scripts/(?=\w+\.py\b)", "scripts/dev/", command)
    return moved if (ROOT / moved.split()[0]).exists() else command


def text_of(value: Any, digits: int = 3) -> str:
    """Whole numbers from 100 on, below that three digits that count; arms in words; nothing for a missing value."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return in_words(str(value))
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def row(name: str, arm: dict[str, Any]) -> str:
    single, batch = arm["modes"]["single"], arm["modes"]["batch"]
    label = "HuggingFace" if name == "hf" else in_words(name)
    return (
        f"| {label} | {single['output_tok_per_s']:.1f} | {single['ratio']:.2f}x "
        f"| {batch['output_tok_per_s']:.1f} | {batch['ratio']:.2f}x "
        f"| {batch['itl_ms']['p50']:.0f} / {batch['itl_ms']['p99']:.0f} | {batch['max_running']:.0f} "
        f"| {batch['kv_utilisation']:.0%} | {arm['memory']['peak_rss_bytes'] / 2**20:.0f} MiB |"
    )


if __name__ == "__main__":
    sys.exit(main())
