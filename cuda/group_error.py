"""Launch of kernels/group_error.cu: the rounding error of each group of a weight, the inner step of the search for scales."""

from . import kernel_loader, self_test, self_test_problems, targets
from .int4 import GROUP_SIZE

SOURCE, ENTRY = "group_error.cu", "group_error"
THREADS = 256  # threads per CTA, as in group_error.cu
CTAS = 8  # CTAs per SM


def variants():
    """Every (source, entry, defines) that `group_error` may compile."""
    return [(SOURCE, ENTRY, ())]


def available(weight):
    """Whether the kernel runs on weight's device, and runs right."""
    device = weight.device
    return kernel_loader.has_kernel(SOURCE, ENTRY, device) and self_test.kernel_passes(
        SOURCE, device, lambda: self_test_problems.group_error_is_right(group_error, device))


def group_error(groups, steps, energy):
    """Sum over each group of energy * (weight - code * step)^2. groups: (N, G, 64) float32, contiguous; steps: (N, G), not 0;
    energy: (G, 64). Returns (N, G) float32."""
    if groups.shape[-1] != GROUP_SIZE or not groups.is_contiguous():
        raise ValueError(f"The kernel needs contiguous groups of {GROUP_SIZE}; these are {tuple(groups.shape)} with strides "
                         f"{groups.stride()}.")
    steps, energy = steps.contiguous(), energy.contiguous()
    error, device = groups.new_empty(steps.shape), groups.device
    ctas = min(-(-steps.numel() // (THREADS // 16)), CTAS * targets.multiprocessors(device))
    kernel = kernel_loader.kernel(SOURCE, ENTRY, (), device)
    kernel((ctas,), (THREADS,), groups, steps, 1 / steps, energy, error, steps.numel(), steps.shape[1])
    return error
