"""Ray: the import that may fail, the cluster of this process, and places for actors in it.

Milestone: M10. vLLM counterpart: vllm/executor/ray_utils.py.
Left out: compiled graphs, runtime environments, bundles chosen by hand, clusters that grow.

Ray starts processes, on this machine or on others, and an *actor* is a Python object in such a process: its methods are
called from here. A *placement group* reserves CPUs and GPUs for several actors at once: all of them, or none.

A process joins one cluster, and all its engines use that one:

    ray.init(...) was called before   the cluster that it chose
    inside an actor                   the cluster of the actor
    ray_address="host:port", "auto"   the cluster there; "auto" is the one that runs on this machine
    otherwise                         a cluster of its own on this machine, until this process ends or ray.shutdown()

Imports no torch.
"""

import contextlib
import importlib.util
import os
import queue
import re
import socket
import threading
from collections.abc import Sequence
from typing import Any

from folovllm.config import EngineConfig

KNOCK_SECONDS = 10.0  # for the answer of a cluster's address
PLACEMENT_SECONDS = 60.0  # how long CPUs and GPUs may take to become free
OBJECT_STORE_BYTES = 256 * 2**20  # of a cluster that is started here: the messages are small
Bundle = dict[str, float]  # what one actor needs, e.g. {"CPU": 1, "GPU": 1}
ENGINE_ALONE: Bundle = {"CPU": 1}  # an engine whose ranks have places of their own

_QUIET = {"log_to_driver": False, "logging_level": "error"}  # what Ray prints in this process
_joining = threading.Lock()  # several engines start at once, and the process joins once


def import_ray(purpose: str) -> Any:
    """The package ray. Raises ValueError if it is not installed; `purpose` names what needs it."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(f"{purpose} needs Ray: pip install 'folovllm[ray]'")
    import ray

    return ray


def join_cluster(address: str | None, num_cpus: float, reserved: int = 0) -> None:
    """Connects this process to a Ray cluster, unless it is connected.

    A cluster that is started here counts at least `num_cpus` CPUs, or those of the machine if it has more, and
    `reserved` ones for tasks that hardly compute. They are for Ray's bookkeeping, and no limit.
    Raises ValueError if there is no cluster at `address`.
    """
    ray = import_ray("a Ray cluster")
    with _joining:
        if ray.is_initialized():
            return
        if address is None:
            _start_cluster(ray, max(num_cpus, os.cpu_count() or 1) + reserved)
            return
        try:
            _knock(address)
            ray.init(address=address, **_QUIET)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"ray_address={address!r}: {error}; start a cluster with: ray start --head") from None


def _knock(address: str) -> None:
    """Raises OSError if nothing listens at an address like "host:6379". Ray itself would try for 13 minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def _start_cluster(ray: Any, num_cpus: float) -> None:
    """Starts a cluster on this machine, without the dashboard, which would be a page for everyone on the network.

    The servers of Ray are children of the thread that starts them, and Linux kills them when this thread ends. So it
    is a thread that never ends. For the same reason they do not outlive this process, however that ends.
    """
    started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def start() -> None:
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **_QUIET,
            )
        except Exception as error:
            started.put(error)
            return
        started.put(None)
        threading.Event().wait()

    threading.Thread(target=start, name="folovllm-ray", daemon=True).start()
    if (error := started.get()) is not None:
        raise error


def bundle_of(
    ray: Any, config: EngineConfig, num_ranks: int = 1, num_engines: int | None = None, reserved: int = 0
) -> Bundle:
    """What an actor needs that computes `num_ranks` ranks: a GPU each, or on CPUs the threads of each.

    Without cpu_threads, `num_engines` engines (data_parallel_size) share the CPUs of the cluster, except `reserved`
    ones, which other tasks need. Ray tells torch how many threads that is.
    """
    parallel = config.parallel_config
    num_gpus = ray.cluster_resources().get("GPU", 0)
    if config.device == "cuda" or (config.device == "auto" and num_gpus >= num_ranks):
        return {"CPU": 1, "GPU": num_ranks}
    if config.cpu_threads is not None:
        return {"CPU": num_ranks * config.cpu_threads}
    num_engines = num_engines or parallel.data_parallel_size
    cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if not cpus:
        raise RuntimeError("no machine of the Ray cluster is alive any more")
    loops = num_engines if parallel.executor_backend == "ray" else 0  # engines beside the ranks, see ENGINE_ALONE
    share = min((sum(cpus) - loops - reserved) // (num_engines * parallel.world_size), min(cpus) // num_ranks)
    return {"CPU": num_ranks * max(1, int(share))}


class Place:
    """CPUs and GPUs of the cluster that are reserved for some actors, one bundle each, until `close`."""

    def __init__(self, ray: Any, bundles: Sequence[Bundle]) -> None:
        """Waits for the bundles. Raises ValueError if the cluster has no room for all of them in PLACEMENT_SECONDS.

        Ray puts them on as few machines as it can ("PACK"), because ranks talk to each other in every layer.
        """
        self._ray, self.bundles = ray, list(bundles)
        self._group = ray.util.placement_group(self.bundles, strategy="PACK")
        if not self._group.wait(timeout_seconds=PLACEMENT_SECONDS):
            self.close()
            raise ValueError(self._why_not())

    def _why_not(self) -> str:
        wanted = {name: sum(bundle.get(name, 0) for bundle in self.bundles) for name in ("CPU", "GPU")}
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        counts = ", ".join(
            f"{count:g} {name} ({total.get(name, 0):g} in the cluster, {free.get(name, 0):g} free)"
            for name, count in wanted.items()
            if count
        )
        return (
            f"the Ray cluster had no room for {counts} within {PLACEMENT_SECONDS:g} s: add machines, stop what runs "
            "there, or ask for less (tensor_parallel_size, pipeline_parallel_size, data_parallel_size, cpu_threads)"
        )

    def start_actor(self, index: int, actor_class: type, *args: Any, **options: Any) -> Any:
        """An actor in the bundle `index`. It is never restarted by Ray: its owner decides what a death means."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = self.bundles[index]
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        remote = self._ray.remote(actor_class).options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=strategy,
            max_restarts=0,
            **options,
        )
        return remote.remote(*args)

    def close(self) -> None:
        """Gives the reservation back, and kills what still runs in it. Idempotent."""
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._ray.util.remove_placement_group(self._group)


def num_cpus_of(config: EngineConfig) -> int:
    """How many CPUs a cluster of its own must count for `config`: a thread each, and one for each engine's own loop."""
    parallel = config.parallel_config
    return parallel.data_parallel_size * (1 + parallel.world_size * (config.cpu_threads or 1))


def cause_of(error: Exception) -> str:
    """What an exception of Ray says about the end of an actor, in a sentence. It says much more than that."""
    text = " ".join(str(error).split())
    detail = re.search(r"exit detail: (.*?)(?: Some common causes|$)", text)
    if detail is not None:
        reason = detail.group(1).rstrip(".")
        hint = "; if the machine ran out of memory, its kernel's log says so" if "connection error" in reason else ""
        return f"its process has ended ({reason}){hint}"
    return text or type(error).__name__
