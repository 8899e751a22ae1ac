"""Synthetic FLUX-like linears: four kinds of layers with statistics like those of the transformer's.

adaln    normalized inputs, modulated by the timestep, with eight static outlier channels 6 to 25 times as large as the others
txt      stronger outliers (8 to 40 times), and massive activations on one token in 64
attnout  the output of attention, with few, mild outliers (3 to 8 times)
gelu     the output of a GELU: never below -0.17, mostly small

Channels are correlated with a falling spectrum; weights are Gaussian plus Student-t plus a planted low-rank part. With `mild`, outliers
are an eighth as strong and the planted part is smaller, which is closer to published figures of the real FLUX.
"""

from dataclasses import dataclass

import torch

KINDS = ("adaln", "txt", "attnout", "gelu")
OUTLIERS = {"adaln": (8, 6, 25), "txt": (8, 8, 40), "attnout": (6, 3, 8), "gelu": (0, 1, 1)}  # number, least and largest gain
CALIBRATION_TIMES = (0.05, 0.3, 0.55, 0.8)
HELD_OUT_TIMES = (0.15, 0.45, 0.7, 0.95)


@dataclass(eq=False)  # hashable, so that a recipe can cache its results for a layer
class Layer:
    """weight: (N, K); calibration, held_out: (M, K) inputs; unsigned: whether the inputs are a GELU's outputs. All float32."""

    kind: str
    weight: torch.Tensor
    calibration: torch.Tensor
    held_out: torch.Tensor
    unsigned: bool


def make(kind, k=1024, n=1024, tokens=8192, mild=False, seed=0, device="cpu"):
    """One Layer. It has half as many held-out tokens as calibration tokens, at other timesteps."""
    g = torch.Generator(device).manual_seed(1000 * seed + KINDS.index(kind))

    def randn(*shape):
        return torch.randn(*shape, generator=g, device=device)

    spectrum = torch.arange(1, k + 1, device=device).pow(-0.35)
    mixing = randn(k, k) * spectrum / spectrum.square().sum().sqrt()
    gain = torch.ones(k, device=device)
    count, low, high = OUTLIERS[kind]
    strengths = low + (high - low) * torch.rand(count, generator=g, device=device)
    gain[torch.randperm(k, generator=g, device=device)[:count]] = 1 + (0.12 if mild else 1.0) * (strengths - 1)
    drift, shift = 0.3 * randn(k), 0.1 * randn(k)

    def inputs(times):
        parts = []
        for t in times:
            x = randn(tokens // len(CALIBRATION_TIMES) // (1 if times is CALIBRATION_TIMES else 2), k) @ mixing.t()
            if kind == "gelu":
                x = torch.nn.functional.gelu(1.2 * x - 0.4 + shift, approximate="tanh")
            else:
                x = (x * (1 + drift * (t - 0.5)) + shift) * gain
            if kind == "txt":
                x[::64] *= 5 if mild else 12
            parts.append(x)
        return torch.cat(parts)

    planted = randn(n, 64) @ randn(64, k) / 8
    student = randn(n, k) / (randn(4, n, k).square().mean(0)).sqrt()  # Student-t with 4 degrees of freedom
    noise = 0.8 * randn(n, k) + 0.4 * student
    share = 0.30 if mild else 0.55
    weight = (1 - share**2) ** 0.5 * noise / noise.norm() + share * planted / planted.norm()
    weight = (weight * n**0.5).bfloat16().float()
    return Layer(kind, weight, inputs(CALIBRATION_TIMES), inputs(HELD_OUT_TIMES), kind == "gelu")
