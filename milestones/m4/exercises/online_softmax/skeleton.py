"""m4/online_softmax: the softmax that never sees its whole row."""

import torch

from folovllm.attention.backends.torch_flash import SoftmaxState, TorchFlashBackend


class OnlineSoftmaxBackend(TorchFlashBackend):
    """The backend torch_flash with your softmax."""

    def start_softmax(self, q: torch.Tensor) -> SoftmaxState:
        """Returns the state of the queries `q` [num_kv_heads, rows, head_size] before the first key."""
        raise NotImplementedError("m4/online_softmax: start_softmax")

    def update_softmax(self, state: SoftmaxState, scores: torch.Tensor, value: torch.Tensor) -> SoftmaxState:
        """Returns the state after one more tile of keys: SoftmaxState(row_max, row_sum, acc).

        scores   [num_kv_heads, rows, tile], -inf where a row does not see a key; it may be overwritten
        value    [num_kv_heads, tile, head_size]
        """
        raise NotImplementedError("m4/online_softmax: update_softmax")

    def finish_softmax(self, state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (out [num_kv_heads, rows, head_size], lse [num_kv_heads, rows]).

        A row that saw no key gets out 0 and lse -inf.
        """
        raise NotImplementedError("m4/online_softmax: finish_softmax")
