"""Random weights for a family's tensors."""

import torch


def random_tensors(shapes, dtype=torch.bfloat16, seed=0):
    """{name: tensor} for {name: shape}: matrices that keep activations at order one, small biases, norms near one."""
    g = torch.Generator().manual_seed(seed)

    def tensor(name, shape):
        if len(shape) == 2:
            return torch.randn(shape, generator=g) / shape[1] ** 0.5
        if name.endswith(".bias"):
            return torch.randn(shape, generator=g) * 0.02
        return 1 + 0.1 * torch.randn(shape, generator=g)

    return {name: tensor(name, shape).to(dtype) for name, shape in shapes.items()}
