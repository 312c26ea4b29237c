"""GPTQ: round one input column after the other, and let the remaining columns compensate for the error.

Milestone: M7. vLLM counterpart: none. Left out: MSE-optimal grids.
Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization", algorithm 1; it is the OBQ update of Frantar &
Alistarh 2022 with the same column order for every row, and OBQ is LeCun's and Hassibi's OBS with rounding for pruning.

Rounding W [output_size, input_size] to Q should disturb the outputs W X as little as possible: minimise |(W - Q) X|^2.
Its curvature is H = X X^T, the same for every row of W. If column i is fixed at its rounded value, the best response of
the columns F that are still free is

    W_F -= (W_i - Q_i) / [H_F^-1]_ii * [H_F^-1]_iF            (W_i is column i; here i itself belongs to F)

and the H_F^-1 of all steps are contained in one triangular matrix. With U^T U = H^-1, U upper triangular,

    [H_F^-1]_iF / [H_F^-1]_ii  =  U[i, F] / U[i, i]
"""

import torch

from folovllm.gptq_config import PER_CHANNEL, GPTQConfig
from folovllm.model_executor.layers.quantization.quantized_linear import QuantizedLinear
from folovllm.quantize.clock import COLUMNS, INVERSE, PartClock
from folovllm.quantize.grid import Grid

BLOCK_SIZE = 128  # columns whose effect on the rest is applied in one matmul
_DAMP_STEPS = 6  # how often damping is raised tenfold before the quantiser gives up


class Hessian:
    """H = X X^T over all calibration tokens, in fp32, and the number of these tokens."""

    def __init__(self, input_size: int, device: torch.device | None = None) -> None:
        self.matrix = torch.zeros(input_size, input_size, dtype=torch.float32, device=device)
        self.num_tokens = 0

    def add(self, x: torch.Tensor) -> None:
        """Adds the tokens `x` [num_tokens, input_size], in any dtype."""
        x = x.float()
        self.matrix.addmm_(x.t(), x)
        self.num_tokens += x.shape[0]


class GPTQ:
    """Quantises layers, each by its weight and its Hessian.

    `damp` times the mean of H's diagonal is added to the diagonal. With `config.desc_act` the columns are taken in the
    order of falling H_ii, so that those that matter most are rounded while most others can still compensate.

    As in the paper, the grid of a group is fixed when its first column is reached. By then the weights have compensated
    for others and so have grown, and with 2 or 3 bits their grids become coarse. `static_groups` fixes all grids before
    the first step, which is better for few bits. Groups then consist of neighbouring columns in any order of rounding,
    so act-order costs nothing when the model runs. But if a few inputs are far stronger than the rest, the compensating
    weights must leave their old range, and with static grids they cannot.
    """

    def __init__(
        self,
        config: GPTQConfig,
        damp: float = 0.01,
        block_size: int = BLOCK_SIZE,
        static_groups: bool = False,
        grid: type[Grid] = Grid,
        clock: PartClock | None = None,
    ) -> None:
        self.config, self.damp, self.static_groups, self.grid = config, damp, static_groups, grid
        self.block_size, self.clock = _aligned(block_size, config), clock or PartClock()

    def quantize(self, weight: torch.Tensor, hessian: torch.Tensor) -> QuantizedLinear:
        """Quantises `weight` [output_size, input_size] for inputs with `hessian` [input_size, input_size]."""
        work, hessian = weight.float().clone(), hessian.float().clone()
        _silence_dead_inputs(work, hessian)
        length = self.config.group_length(weight.shape[1])
        groups = torch.arange(weight.shape[1], device=weight.device) // length  # [input_size]
        grids = _grids_of(work, self.config, self.grid) if self.static_groups else None
        order = self.column_order(hessian)  # [input_size]
        back = torch.argsort(order)  # the columns' first places
        g_idx = groups if self.static_groups else groups[back]
        work, hessian = work[:, order], hessian[order][:, order]
        with self.clock.part(INVERSE):
            root = self.damped_root(hessian)
        with self.clock.part(COLUMNS):
            levels, grids = self._quantize_columns(work, root, g_idx[order].tolist(), grids)
        scales, zeros = _stack(grids)
        return QuantizedLinear(levels[:, back], scales, zeros, g_idx.to(torch.int32))

    def column_order(self, hessian: torch.Tensor) -> torch.Tensor:
        """Returns the order in which the columns are rounded [input_size]: the k-th step takes column order[k].

        With act-order (`config.desc_act`) the strongest inputs come first; of equal ones, the first. Without it the
        columns are taken as they come.
        """
        if self.config.desc_act:
            return torch.argsort(hessian.diagonal(), descending=True, stable=True)
        return torch.arange(hessian.shape[0], device=hessian.device)

    def damped_root(self, hessian: torch.Tensor) -> torch.Tensor:
        """Returns `inverse_root` of H with damping, fp32 [input_size, input_size].

        While H is not positive definite, as with fewer tokens than inputs, the damping is raised.
        """
        damp, mean = self.damp, float(hessian.diagonal().mean())
        eye = torch.eye(hessian.shape[0], dtype=torch.float64, device=hessian.device)
        for raised in range(_DAMP_STEPS):
            root = self.inverse_root(hessian.double() + eye * (damp * 10**raised * mean))
            if root is not None:
                return root.float()
            damp = max(damp, 1e-6)  # zero would stay zero
        raise ValueError("the inputs of a layer hold NaN or infinity: check the model and the calibration text")

    def inverse_root(self, hessian: torch.Tensor) -> torch.Tensor | None:
        """Returns U, upper triangular with U^T U = H^-1, for H in fp64 [input_size, input_size].

        Returns None if H is not positive definite.
        """
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            return None
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        return None if failed else upper

    def step(self, weight: torch.Tensor, column: int, rounded: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        """Fixes `column` of `weight` at `rounded` [output_size] and updates the later columns, in place.

        weight [output_size, n] and root [n, n] (the same rows and columns of U). Returns the error divided by U's
        diagonal element [output_size], which the columns outside of these n will need.
        """
        error = (weight[:, column] - rounded) / root[column, column]  # [output_size]
        # At `column` itself this subtracts the error whole.
        weight[:, column:] -= torch.outer(error, root[column, column:])
        return error

    def _quantize_columns(
        self, work: torch.Tensor, root: torch.Tensor, group_of_step: list[int], static: list[Grid] | None
    ) -> tuple[torch.Tensor, list[Grid]]:
        """Quantises all columns in blocks. Each step updates only its block; the rest follows in one matmul per block.

        Nothing is approximated: a column is first read when its own block begins, and by then it has received all
        updates.
        """
        input_size, length = work.shape[1], self.config.group_length(work.shape[1])
        levels = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
        grids = [] if static is None else static
        for start in range(0, input_size, self.block_size):
            end = min(start + self.block_size, input_size)
            block, block_root = work[:, start:end].contiguous(), root[start:end, start:end]
            errors = torch.empty_like(block)  # [output_size, columns of the block]
            for i in range(end - start):
                if static is None and (start + i) % length == 0:
                    # As a group begins, its grid is fixed, from the weights as they are now.
                    group = block[:, i : i + length] if length <= self.block_size else work[:, start : start + length]
                    grids.append(self.grid.find(group, self.config))
                grid = grids[group_of_step[start + i]]
                level = grid.levels(block[:, i])  # [output_size]
                levels[:, start + i] = level.to(torch.uint8)
                errors[:, i] = self.step(block, i, grid.values(level), block_root)
            work[:, end:] -= errors @ root[start:end, end:]
        return levels, grids


def rtn_quantize(weight: torch.Tensor, config: GPTQConfig, grid: type[Grid] = Grid) -> QuantizedLinear:
    """Rounds to nearest, group by group. This is the baseline: no column compensates for the error of another."""
    input_size = weight.shape[1]
    length = config.group_length(input_size)
    grids, groups = _grids_of(weight.float(), config, grid), weight.float().split(length, dim=1)
    levels = torch.cat([found.levels(group) for found, group in zip(grids, groups, strict=True)], dim=1)
    scales, zeros = _stack(grids)
    g_idx = (torch.arange(input_size, device=weight.device) // length).to(torch.int32)
    return QuantizedLinear(levels.to(torch.uint8), scales, zeros, g_idx)


def _grids_of(weight: torch.Tensor, config: GPTQConfig, grid: type[Grid]) -> list[Grid]:
    """Returns the grid of each group for the present weights."""
    return [grid.find(group, config) for group in weight.split(config.group_length(weight.shape[1]), dim=1)]


def _stack(grids: list[Grid]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (scales fp32, zeros int32), each [num_groups, output_size]."""
    return torch.stack([grid.scale for grid in grids]), torch.stack([grid.zero for grid in grids]).to(torch.int32)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """Returns |(W - Q) X|^2 / |W X|^2 for weights [output_size, input_size]: how much of the output
    rounding disturbs.
    """
    difference = weight.float() - quantized.float()
    disturbed = (difference @ hessian * difference).sum()
    total = (weight.float() @ hessian * weight.float()).sum()
    return float(disturbed / total) if total > 0 else 0.0


def _silence_dead_inputs(weight: torch.Tensor, hessian: torch.Tensor) -> None:
    """Sets the weights of inputs that were always zero to zero, since any weight would do, and keeps H invertible."""
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    weight[:, dead] = 0.0


def _aligned(block_size: int, config: GPTQConfig) -> int:
    """Returns a block size such that every group lies within one block or begins with one.

    Otherwise the grid of a group would be fixed on weights of which only some are up to date.
    """
    if config.group_size == PER_CHANNEL:
        return block_size
    return config.group_size * max(1, block_size // config.group_size)
