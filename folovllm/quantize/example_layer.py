"""A layer small enough to quantise by hand: 8 inputs, 8 outputs, 12 calibration tokens.

Milestone: M7. vLLM counterpart: none. docs/learn/07, its pictures and notebook 08 use it. The numbers were drawn once
and frozen. Inputs 0 to 3 follow one signal (input 3 with the opposite sign), inputs 4 and 5 follow another, input 6 is
nearly noise, and input 7 follows both signals and is the strongest. The inputs of a real layer are similar: most of
them repeat what others say, and a few are much stronger than the rest.
"""

import torch

from folovllm.quantize.gptq import Hessian

TOKENS = [  # [num_tokens, input_size]
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
WEIGHT = [  # [output_size, input_size]
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
    """Returns (weight [output_size 8, input_size 8], hessian [8, 8]), both fp32."""
    hessian = Hessian(8)
    hessian.add(torch.tensor(TOKENS))
    return torch.tensor(WEIGHT), hessian.matrix
