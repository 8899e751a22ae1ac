"""Launch of kernels/gptq.cu: GPTQ's inner loop, a block of columns of the weight rounded one after the other."""

from . import kernel_loader, self_test, self_test_problems, targets

SOURCE, ENTRY = "gptq.cu", "gptq_block"
COLUMNS = 128  # the most in a block, as in gptq.cu
WARPS = 16  # warps per CTA, as in gptq.cu
SHARED = COLUMNS * COLUMNS * 4  # the block's piece of the Cholesky factor


def variants():
    """Every (source, entry, defines) that `round_block` may compile."""
    return [(SOURCE, ENTRY, ())]


def available(weight):
    """Whether the kernel runs on weight's device, and runs right."""
    device = weight.device
    return kernel_loader.has_kernel(SOURCE, ENTRY, device, SHARED) and self_test.kernel_passes(
        SOURCE, device, lambda: self_test_problems.round_block_is_right(round_block, device))


def round_block(weight, pending, steps, inverse, groups, lower, codes):
    """Round a block of columns from its last to its first. A column's target is weight + pending / its diagonal entry of `lower`, and its
    error times its row of `lower` is added to the pending error of the columns before it.

    weight, pending: (N, B) float32, B at most 128 and a multiple of 64; steps: (N, G) float32; inverse: 1 / steps, 0 where the step is
    0; groups: (B,) int32, each column's group; lower: (B, B) float32, contiguous; codes: (N, B) int8, filled. weight, pending and codes
    are columns of wider matrices whose rows begin at multiples of 16 bytes. Returns lost, (N, B) float32: weight minus its
    dequantized codes. `pending` itself does not change.
    """
    n, b = weight.shape
    lost = weight.new_empty(n, b)
    ctas = min(-(-n // WARPS), 2 * targets.multiprocessors(weight.device))
    kernel = kernel_loader.kernel(SOURCE, ENTRY, (), weight.device, SHARED)
    kernel((ctas,), (32 * WARPS,), weight, pending, steps, inverse, groups, lower, 1 / lower.diagonal(), codes, lost, n, b,
           weight.stride(0), pending.stride(0), codes.stride(0), steps.shape[1])
    return lost
