"""ParallelConfig: over how many processes a model is divided. ModelShard: the part that one of them computes.

Milestone: M9. vLLM counterparts: ParallelConfig (vllm/config/parallel.py) and get_pp_indices
(vllm/distributed/utils.py).
Left out: expert and context parallelism, ranks on several machines without Ray.

Row 0: plain data, no torch. A *rank* is one process of a model, and the ranks are counted through the stages of the
pipeline. E.g. tensor_parallel_size 2, pipeline_parallel_size 2:

    rank 0: stage 0, half 0      rank 1: stage 0, half 1
    rank 2: stage 1, half 0      rank 3: stage 1, half 1
"""

import dataclasses
from dataclasses import dataclass

from folovllm.checks import check_choice, check_int, check_number, check_type
from folovllm.hf_config import ModelArchitecture

MAX_RANKS = 1024
MISSED_HEARTBEATS = 6  # in a row, and an engine's process is taken for dead
EXECUTOR_BACKENDS = ("uni", "mp", "ray")


@dataclass(frozen=True)
class ParallelConfig:
    """How many processes compute one model, and how many copies of the model serve."""

    tensor_parallel_size: int = 1  # every layer is divided among so many processes
    pipeline_parallel_size: int = 1  # the layers are divided into so many stages, one after another
    distributed_executor_backend: str | None = None  # "uni", "mp" or "ray"; None: "mp" with several processes
    data_parallel_size: int = 1  # so many engines with all weights share the requests of a server
    data_parallel_backend: str = "mp"  # or "ray": the engines are actors, which may be on other machines
    data_parallel_heartbeat_timeout: float = 60.0  # seconds without a beat until "mp" restarts an engine; 0: never
    data_parallel_rank: int = 0  # which of these engines this is; filled in by the client that starts them
    ray_address: str | None = None  # the Ray cluster to join, such as "auto" or "host:6379"; None: one is started here

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            check_int(name, getattr(self, name), low=1, high=MAX_RANKS)
        backend = self.distributed_executor_backend
        if backend is not None:
            check_choice("distributed_executor_backend", backend, EXECUTOR_BACKENDS)
        if backend == "uni" and self.world_size > 1:
            raise ValueError(
                f"distributed_executor_backend='uni' is one process, and tensor_parallel_size="
                f"{self.tensor_parallel_size} x pipeline_parallel_size={self.pipeline_parallel_size} are "
                f"{self.world_size}: use 'mp' or 'ray'"
            )
        check_choice("data_parallel_backend", self.data_parallel_backend, ("mp", "ray"))
        check_number("data_parallel_heartbeat_timeout", self.data_parallel_heartbeat_timeout, low=0.0, high=86400.0)
        if self.ray_address is not None:
            check_type("ray_address", self.ray_address, str)
            if not self.ray_address:
                raise ValueError("ray_address must not be empty: give 'auto' or 'host:6379', or leave it out")

    @property
    def world_size(self) -> int:
        """How many ranks compute one model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def answering_rank(self) -> int:
        """The rank whose tokens the engine takes. All ranks of the last stage sample the same; this is the first."""
        return self.world_size - self.tensor_parallel_size

    @property
    def num_local_engines(self) -> int:
        """How many engines share this machine, with its cores and its memory. Ray gives each its own share."""
        return self.data_parallel_size if self.data_parallel_backend == "mp" else 1

    @property
    def heartbeat_seconds(self) -> float | None:
        """How often each of several engines says that it lives. None: a single one, which nothing could replace."""
        seconds = self.data_parallel_heartbeat_timeout / MISSED_HEARTBEATS
        return seconds if seconds and self.data_parallel_size > 1 else None

    @property
    def first_device(self) -> int:
        """The GPU of rank 0 of this engine; rank r has the r-th one after it. On Ray each rank sees its own only."""
        return self.data_parallel_rank * self.world_size if self.data_parallel_backend == "mp" else 0

    @property
    def executor_backend(self) -> str:
        """The executor that runs: "uni" for one rank unless another is asked for."""
        return self.distributed_executor_backend or ("uni" if self.world_size == 1 else "mp")

    def describe_ranks(self, device: str) -> str:
        """For people to read, e.g. "2 x 2 ranks (tensor x pipeline parallel), gloo"."""
        sizes = f"{self.tensor_parallel_size} x {self.pipeline_parallel_size}"
        return f"{sizes} ranks (tensor x pipeline parallel), {'nccl' if device == 'cuda' else 'gloo'}"

    def check(self, arch: ModelArchitecture, is_packed: bool = False) -> None:
        """Raises ValueError with the numbers if `arch` cannot be divided so.

        `is_packed` says that the weights of a GPTQ checkpoint stay packed: then each part must fill whole words.
        """
        tp, pp = self.tensor_parallel_size, self.pipeline_parallel_size
        reason = _why_not_divided(arch, tp, is_packed)
        if reason is not None:
            heads = arch.num_attention_heads
            sizes = [n for n in range(1, heads + 1) if _why_not_divided(arch, n, is_packed) is None]
            raise ValueError(f"tensor_parallel_size={tp} {reason}: use {_any_of(sizes)}")
        if pp > arch.num_hidden_layers:
            raise ValueError(
                f"pipeline_parallel_size={pp} is more than the model's {arch.num_hidden_layers} layers, and each "
                f"stage needs one: use at most {arch.num_hidden_layers}"
            )

    def largest_attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        """`arch` as seen by the rank whose KV cache is largest, which is one of the stage with the most layers.

        All ranks have the same number of blocks, because one scheduler hands the blocks out for all of them.
        """
        archs = [self.shard(rank).attention_arch(arch) for rank in range(self.world_size)]
        return max(archs, key=lambda part: part.num_hidden_layers)

    def shard(self, rank: int) -> "ModelShard":
        """The part of the model that `rank` computes."""
        assert 0 <= rank < self.world_size
        stage, part = divmod(rank, self.tensor_parallel_size)
        return ModelShard(part, self.tensor_parallel_size, stage, self.pipeline_parallel_size)


@dataclass(frozen=True)
class ModelShard:
    """The part of a model that one rank computes: part `tp_rank` of each layer of stage `pp_rank`."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def layers(self, num_hidden_layers: int) -> range:
        """The layers of this stage. What does not divide goes to the stages before the last, from the back.

        E.g. 6 layers in 4 stages: 1, 2, 2, 1. The first and the last stage have the embedding and the head as well.
        """
        size, rest = divmod(num_hidden_layers, self.pp_size)
        sizes = [size] * self.pp_size
        for i in range(rest):
            sizes[-2 - i] += 1
        start = sum(sizes[: self.pp_rank])
        return range(start, start + sizes[self.pp_rank])

    def num_kv_heads(self, total: int) -> int:
        """How many KV heads this rank has: at least one. With more ranks than heads, several ranks hold the same."""
        return max(total // self.tp_size, 1)

    def attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        """`arch` as this rank's attention and KV cache see it: its own heads, and the layers of its stage."""
        return dataclasses.replace(
            arch,
            num_attention_heads=arch.num_attention_heads // self.tp_size,
            num_key_value_heads=self.num_kv_heads(arch.num_key_value_heads),
            num_hidden_layers=len(self.layers(arch.num_hidden_layers)),
        )


WHOLE_MODEL = ModelShard()


def _why_not_divided(arch: ModelArchitecture, tp_size: int, is_packed: bool) -> str | None:
    """Why `tp_size` ranks cannot share the layers of `arch`, or None if they can."""
    heads, kv_heads = arch.num_attention_heads, arch.num_key_value_heads
    if heads % tp_size:
        return f"does not divide the model's {heads} query heads"
    if kv_heads % tp_size and tp_size % kv_heads:
        return f"neither divides the model's {kv_heads} KV heads nor is a multiple of them"
    if arch.intermediate_size % tp_size:
        return f"does not divide the model's intermediate size of {arch.intermediate_size}"
    if is_packed and tp_size > 1 and arch.quantization is not None:
        return _why_not_packed(arch, tp_size, arch.quantization.bits, arch.quantization.pack_unit)
    return None


def _why_not_packed(arch: ModelArchitecture, tp_size: int, bits: int, unit: int) -> str | None:
    kv_heads = ModelShard(tp_size=tp_size).num_kv_heads(arch.num_key_value_heads)
    sizes = {
        "query features": (arch.q_size // tp_size, arch.q_size),
        "key features": (kv_heads * arch.head_dim, arch.kv_size),
        "MLP features": (arch.intermediate_size // tp_size, arch.intermediate_size),
    }
    for name, (size, total) in sizes.items():
        if size % unit:
            packed = f"{bits}-bit weights are packed in units of {unit}, unless quantization='dequantize'"
            return f"gives a rank {size} of {total} {name}, and {packed}"
    if arch.quantization is not None and arch.quantization.lm_head and arch.vocab_size % (tp_size * unit):
        return f"does not divide the quantised head of {arch.vocab_size} tokens into units of {unit}"
    return None


def _any_of(numbers: list[int]) -> str:
    """E.g. [1, 3, 9] -> "1, 3 or 9"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
