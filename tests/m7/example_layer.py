"""The layer that docs/learn/07 and notebook 08 quantise by hand: 8 inputs, 8 outputs, 12 calibration tokens.

Milestone: M7. The numbers were drawn once and frozen. Inputs 0 to 3 follow one signal (input 3 against it), 4 and 5
another, 6 is nearly noise, and 7 follows both and is the largest: what the inputs of a real layer are like.
"""

import torch

from folovllm.quantize.gptq import Hessian

TOKENS = [
    [-1, 1, -1, 0, -1, -1, 1, 0],
    [0, 0, 1, -1, 0, 0, -1, 2],
    [3, 3, 1, -3, -3, -2, -1, 3],
    [1, 0, -1, 0, 0, -2, 1, 0],
    [2, 2, 1, 0, -1, -2, -1, 0],
    [2, 3, 2, -1, -3, -2, 0, 1],
    [1, 1, 1, -1, 1, 3, -1, 4],
    [-1, 0, -1, 0, 3, 2, 1, 0],
    [-1, -3, -3, 2, -1, -3, -1, -5],
    [-2, -2, -2, 1, -1, -3, 0, -5],
    [-1, 1, 1, 1, -2, -1, 0, -2],
    [0, 1, 2, -1, 2, 2, 0, 1],
]
WEIGHT = [
    [0.41, 0.36, -0.65, -0.70, -0.65, 0.59, -0.17, 0.14],
    [0.31, -0.70, -0.38, 0.02, -0.59, 0.58, 0.44, -0.57],
    [0.46, -0.50, -0.10, 0.32, -0.70, 0.00, -0.15, 0.28],
    [0.63, 0.19, 0.58, -0.70, -0.13, -0.33, 0.29, 0.26],
    [-0.70, 0.65, 0.03, -0.18, 0.59, 0.21, -0.50, -0.60],
    [-0.26, -0.47, -0.70, 0.09, -0.15, 0.15, -0.12, 0.57],
    [0.59, -0.65, -0.70, -0.55, 0.40, -0.16, -0.19, 0.23],
    [-0.30, 0.46, -0.70, 0.37, -0.30, -0.21, -0.37, -0.43],
]


def example_layer() -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [8 outputs, 8 inputs], hessian [8, 8])."""
    hessian = Hessian(8)
    hessian.add(torch.tensor(TOKENS))
    return torch.tensor(WEIGHT), hessian.matrix
