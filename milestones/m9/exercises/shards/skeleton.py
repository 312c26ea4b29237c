"""m9/shards: which layers and heads a rank holds."""

import dataclasses  # noqa: F401 - dataclasses.replace makes a changed copy of an architecture

from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import ModelShard as _Real


class ModelShard(_Real):
    """Part `tp_rank` of `tp_size` of each layer of stage `pp_rank` of `pp_size`."""

    def layers(self, num_hidden_layers: int) -> range:
        """Returns the layers of this stage."""
        raise NotImplementedError("m9/shards: layers")

    def num_kv_heads(self, total: int) -> int:
        """Returns how many of `total` KV heads this rank holds: at least one."""
        raise NotImplementedError("m9/shards: num_kv_heads")

    def attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        """Returns `arch` with the heads and the number of layers that this rank has."""
        raise NotImplementedError("m9/shards: attention_arch")
