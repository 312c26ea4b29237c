"""The one-way import rule and the torch-free rows (R0.1 to R0.4)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.m0

PACKAGE = Path(__file__).parents[2] / "folovllm"

# A module imports from its own row or a smaller one. The longest matching prefix decides.
ROWS = {
    "folovllm": 5,
    "folovllm.__main__": 5,
    "folovllm.milestones": 0,
    "folovllm.config": 0,
    "folovllm.hf_config": 0,
    "folovllm.hf_json": 0,
    "folovllm.hf_overrides": 0,
    "folovllm.rope_config": 0,
    "folovllm.generation_config": 0,
    "folovllm.checkpoint_files": 0,
    "folovllm.vllm_args": 0,
    "folovllm.gptq_config": 0,
    "folovllm.sampling_params": 0,
    "folovllm.request": 0,
    "folovllm.outputs": 0,
    "folovllm.parts": 0,
    "folovllm.parallel": 0,
    "folovllm.communication_plan": 0,
    "folovllm.model_shapes": 0,
    "folovllm.utils": 0,
    "folovllm.checks": 0,
    "folovllm.text_files": 0,
    "folovllm.interrupts": 0,
    "folovllm.cpus": 0,
    "folovllm.core": 1,
    "folovllm.trace": 1,
    "folovllm.sim": 1,
    "folovllm.executor": 1,
    "folovllm.engine": 3,
    "folovllm.engine.core": 1,
    "folovllm.engine.core_loop": 1,
    "folovllm.engine.fault_finder": 1,
    "folovllm.engine.messages": 1,
    "folovllm.engine.router": 1,
    "folovllm.engine.sent_requests": 1,
    "folovllm.engine.stats_sum": 1,
    "folovllm.forward_context": 2,
    "folovllm.transfers": 2,
    "folovllm.distributed": 2,
    "folovllm.platforms": 2,
    "folovllm.attention": 2,
    "folovllm.sample": 2,
    "folovllm.model_executor": 2,
    "folovllm.quantize": 2,
    "folovllm.csrc": 2,
    "folovllm.worker": 3,
    "folovllm.executor.uniproc": 3,
    "folovllm.executor.ray": 3,
    "folovllm.executor.select": 3,
    "folovllm.executor.multiproc": 3,
    "folovllm.executor.rank_messages": 3,
    "folovllm.executor.rank_processes": 3,
    "folovllm.executor.ranks": 3,
    "folovllm.metrics": 3,
    "folovllm.hub": 4,
    "folovllm.data": 5,
    "folovllm.viz": 5,
    "folovllm.entrypoints": 5,
    "folovllm.benchmarks": 5,
    "folovllm.learn": 5,
}
TORCH_FREE_ROWS = (0, 1)
TORCH_FREE_TOO = ("folovllm.learn",)


def module_name(path: Path) -> str:
    parts = ["folovllm", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def row_of(module: str) -> int:
    while module not in ROWS:
        module = module.rpartition(".")[0]
        assert module, "a module outside every row"
    return ROWS[module]


def imports_of(path: Path) -> set[str]:
    """Returns the FoloVLLM modules that a file imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module or "")
    return {name for name in found if name.split(".")[0] == "folovllm"}


def test_every_module_is_placed_in_a_row():
    """The entry of the package itself places nothing: a new folder or top-level module needs its own."""
    prefixes = [name for name in ROWS if name != "folovllm"]
    unplaced = [m for m in MODULES if not any(m == p or m.startswith(f"{p}.") for p in prefixes)]
    assert unplaced == ["folovllm"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    if module == "folovllm":
        return  # its imports are lazy names
    for imported in imports_of(MODULES[module]):
        assert row_of(imported) <= row_of(module), f"{module} (row {row_of(module)}) imports {imported}"


def test_imports_have_no_cycle():
    graph = {module: imports_of(path) - {module} for module, path in MODULES.items() if module != "folovllm"}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail, module])
        if module in graph and module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_rows_0_and_1_run_without_torch():
    modules = [m for m in MODULES if row_of(m) in TORCH_FREE_ROWS or m.startswith(TORCH_FREE_TOO)]
    assert "folovllm.core.sched.scheduler" in modules and "folovllm.executor.fake" in modules
    script = "import sys; sys.modules['torch'] = None\n" + "\n".join(f"import {m}" for m in modules)
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_parent_of_a_benchmark_runs_without_torch():
    """It would hold memory and threads beside the arms that it measures."""
    script = (
        "import sys, folovllm.benchmarks.command, folovllm.benchmarks.serve.command; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_front_end_of_the_server_runs_without_torch():
    """Its engine is another process. With torch it would start seconds later and hold 200 MB more."""
    script = "import sys, folovllm.entrypoints.start; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_engine_outweighs_what_measures_it():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    benchmarks = {path: count for path, count in lines.items() if path.is_relative_to(PACKAGE / "benchmarks")}
    # `folovllm bench serve` measures a server from outside: it shares hardly any code with the offline benchmark, and
    # the server that it measures is larger than the engine that the other one does.
    serve = {path: count for path, count in benchmarks.items() if path.is_relative_to(PACKAGE / "benchmarks" / "serve")}
    assert max(benchmarks.values()) <= 420 and sum(serve.values()) <= 1100
    assert sum(benchmarks.values()) - sum(serve.values()) <= 2650
    scripts = (PACKAGE.parent / "scripts").rglob("*.py")
    measuring = sum(benchmarks.values()) + sum(len(path.read_text(encoding="utf-8").splitlines()) for path in scripts)
    assert sum(lines.values()) - sum(benchmarks.values()) > measuring


def test_importing_the_package_is_cheap():
    script = "import sys, folovllm; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
