"""fp8 with a scale for every token and every output channel, and fast accumulation, as torchao runs a linear after
quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())). The quantization is plain PyTorch, for torch.compile."""

import torch

FP8_MAX = 448.0


def quantized(x):
    """(M, K) -> its codes (M, K) in float8_e4m3fn, float32 scales (M, 1)"""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def product(codes, scale, weight, weight_scale, bias):
    """(M, N) in bf16. codes, scale: quantized's of (M, K); weight: codes (N, K); weight_scale: (1, N); bias: (N,) in bf16."""
    return torch._scaled_mm(codes, weight.t(), scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


class Linear(torch.nn.Module):
    """An ordinary linear in fp8. Its inputs and its bias are in bf16."""

    def __init__(self, linear):
        super().__init__()
        codes, scale = quantized(linear.weight)
        self.weight, self.weight_scale = (torch.nn.Parameter(tensor, requires_grad=False) for tensor in (codes, scale.t().contiguous()))
        self.bias = linear.bias

    def forward(self, x):
        return product(*quantized(x.flatten(0, -2)), self.weight, self.weight_scale, self.bias).unflatten(0, x.shape[:-1])
