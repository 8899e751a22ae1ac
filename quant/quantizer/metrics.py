"""The distance between two tensors."""

import torch


def relative_error(estimate, exact):
    """‖estimate - exact‖ / ‖exact‖ (Frobenius) as a float; 0 if both are zero."""
    return float((estimate - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))
