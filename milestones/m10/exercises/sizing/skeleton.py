"""m10/sizing: how many tokens an engine holds on several GPUs, and how many engines a number of GPUs makes."""

from folovllm.sim.executor import WEIGHTS_AND_CACHE  # noqa: F401 - 0.9; you will need it
from folovllm.sim.sizing import Sizing as Reference


class Sizing(Reference):
    """Inherited: arch, hardware, weight_bits, dtype_bytes and divides_heads(tp_size)."""

    def kv_tokens(self, tp_size: int) -> int:
        """Returns how many tokens the KV cache of one engine of `tp_size` GPUs holds."""
        raise NotImplementedError("m10/sizing: kv_tokens")

    def split(self, num_gpus: int, tokens: int) -> tuple[int, int]:
        """Returns (tensor_parallel_size, number of engines), or raises ValueError if no engine is large enough."""
        raise NotImplementedError("m10/sizing: split")
