"""Finding the largest of 50,000 numbers per row without sorting, or even visiting, all of them.

Milestone: M4. vLLM counterpart: none (its GPU kernels are FlashInfer's; its CPU build sorts).
Left out: a fused kernel of our own; these are compositions of torch operators, and run on every device.

Both functions rest on one observation. Cut a row into blocks and take each block's maximum, which is the cheapest thing
a CPU can do with a row. The largest element lies in the block with the largest maximum; the k largest lie in the k
blocks with the largest maxima (an element of any other block has k elements, those maxima, that are at least as large).
So the expensive search runs on a few hundred or thousand numbers.
"""

from typing import Any

import torch

_CPP_DTYPES = (torch.float32, torch.bfloat16)
_BLOCK_WIDTHS = (1024, 512, 256, 128, 64)  # `first_argmax`: wide enough for a fast maximum, narrow enough to search
_STRIPES = 16  # `largest`: elements per block


def first_argmax(values: torch.Tensor, ops: Any | None = None) -> torch.Tensor:
    """Returns `values.argmax(dim=-1)`, the lowest index among equals, several times faster on a CPU. `[R, V]` to `[R]`.

    A NaN counts as the largest, as in torch. `ops` are our C++ operators, which need one pass.
    """
    if ops is not None and values.device.type == "cpu" and values.dtype in _CPP_DTYPES:
        place: torch.Tensor = ops.argmax(values)
        return place
    num_rows, size = values.shape
    width = next((w for w in _BLOCK_WIDTHS if size % w == 0), None)
    if width is None:
        # On a CPU the same index as argmax, which is slow in bf16; elsewhere max may name any of several equals.
        return values.max(dim=-1).indices if values.device.type == "cpu" else values.argmax(dim=-1)
    blocks = values.view(num_rows, size // width, width)  # [R, V / width, width]
    block = blocks.amax(dim=-1).argmax(dim=-1)  # [R], the first block that has the maximum
    inside = blocks[torch.arange(num_rows, device=values.device), block].argmax(dim=-1)  # [R], the first place in it
    return block * width + inside


def largest(values: torch.Tensor, k: int, in_order: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k largest entries of each row, like `values.topk(k)`: values `[R, k]` and their ids `[R, k]`.

    The values descend if `in_order`. As with topk, it is not specified which of several entries that equal the k-th are
    among them. A block is a comb of columns, not a run of neighbours, so that its maximum is a maximum of 16 long
    contiguous stripes, which is vectorised:

        V = 12, 4 blocks of 3:   0 1 2 3 | 4 5 6 7 | 8 9 10 11      block 1 holds 1, 5, 9
    """
    num_rows, size = values.shape
    if size % _STRIPES or k * _STRIPES * 2 > size:
        return values.topk(k, dim=-1, sorted=in_order)  # two levels would visit almost as much
    num_blocks = size // _STRIPES
    maxima = values.view(num_rows, _STRIPES, num_blocks).amax(dim=1)  # [R, num_blocks]
    blocks = maxima.topk(k, dim=-1, sorted=False).indices  # [R, k]
    first_ids = torch.arange(0, size, num_blocks, device=values.device)  # [16], where each stripe starts
    ids = (blocks.unsqueeze(1) + first_ids.unsqueeze(1)).flatten(1)  # [R, 16 * k]
    top, place = values.gather(1, ids).topk(k, dim=-1, sorted=in_order)  # [R, k], [R, k]
    return top, ids.gather(1, place)
