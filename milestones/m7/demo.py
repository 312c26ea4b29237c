"""Milestone M7 without weights: a layer of 256 inputs rounded to nearest and by GPTQ, packed, unpacked, multiplied.

Run: python milestones/m7/demo.py
"""

import torch
import torch.nn.functional as F

from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.layers.linear import ColumnParallelLinear
from folovllm.model_executor.layers.quantization.gptq import GPTQQuantization
from folovllm.model_executor.layers.quantization.quantized_linear import unpack_linear
from folovllm.quantize.gptq import GPTQ, Hessian, output_error, rtn_quantize

INPUTS, OUTPUTS, TOKENS = 256, 64, 2000
generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


# Inputs as layers have them: some strong, most weak, and many of them saying nearly the same.
signals, mixing = random(TOKENS, 32), random(32, INPUTS)
strengths = torch.linspace(0.2, 3, INPUTS)[torch.randperm(INPUTS, generator=generator)]
x = (signals @ mixing + 4 * random(TOKENS, INPUTS)) * strengths
weight = random(OUTPUTS, INPUTS)
hessian = Hessian(INPUTS)
hessian.add(x)

print("share of the squared output that is lost, in percent; groups of 64\n")
print("bits   nearest    GPTQ   GPTQ, act-order")
lost = {}
for bits in (8, 4, 3, 2):
    plain, ordered = GPTQConfig(bits, 64), GPTQConfig(bits, 64, desc_act=True)
    found = [rtn_quantize(weight, plain)] + [GPTQ(c).quantize(weight, hessian.matrix) for c in (plain, ordered)]
    lost[bits] = [100 * output_error(weight, quantized.dequantize(), hessian.matrix) for quantized in found]
    print(f"{bits:4}" + "".join(f"{percent:10.4f}" for percent in lost[bits]))

config = GPTQConfig(4, 64, desc_act=True)
quantized = GPTQ(config).quantize(weight, hessian.matrix)
tensors = quantized.pack(config)
size = sum(tensor.nbytes for tensor in tensors.values())
print(f"\nfour tensors, {size:,} bytes, not {2 * weight.numel():,}; {8 * size / weight.numel():.2f} bits per weight:")
for name, tensor in tensors.items():
    print(f"    {name:8} {tensor.dtype!s:13} {list(tensor.shape)}")

layer = ColumnParallelLinear(INPUTS, OUTPUTS, bias=False, quant_config=GPTQQuantization(config), prefix="demo")
for name, tensor in tensors.items():
    getattr(layer, name).weight_loader(getattr(layer, name), tensor)
layer.quant_method.process_weights_after_loading(layer)
difference = float((layer(x[:4]) - F.linear(x[:4], quantized.dequantize())).abs().max())
print(f"\na layer with them against a plain one with the dequantised weights: largest difference {difference:.1e}")

assert torch.equal(unpack_linear(tensors, config).levels, quantized.levels), "the levels come back"
assert difference < 1e-3, "running a quantised layer loses nothing more"
assert all(gptq < nearest for nearest, gptq, _ in lost.values()), "GPTQ is nearer in what counts, the outputs"
