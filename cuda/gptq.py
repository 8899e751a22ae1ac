"""Launch of kernels/gptq.cu: GPTQ's inner loop, a block of columns of the weight rounded one after the other."""

from . import kernel_loader, targets

SOURCE, ENTRY = "gptq.cu", "gptq_block"
COLUMNS = 128  # at most, of a block; gptq.cu's
WARPS = 16  # a CTA, gptq.cu's
SHARED = COLUMNS * COLUMNS * 4  # the block's piece of the Cholesky factor


def variants():
    """What `round_block` may ask the compiler for: (source, entry, defines)."""
    return [(SOURCE, ENTRY, ())]


def available(weight):
    """Whether the kernel runs where `weight` is."""
    return kernel_loader.has_kernel(SOURCE, ENTRY, weight.device, SHARED)


def round_block(weight, pending, steps, inverse, groups, lower, codes):
    """Round a block of columns from its last to its first. Each aims at weight + pending / its diagonal of `lower`, and what it
    loses is pending for those before it.

    weight, pending: (N, B) float32, B at most 128 and a multiple of 64; steps: (N, G) float32; inverse: 1 / steps, 0 where the step is
    0; groups: (B,) int32, each column's group; lower: (B, B) float32, contiguous; codes: (N, B) int8, filled. weight, pending and codes
    are columns of wider matrices whose rows begin at multiples of 16 bytes. Returns lost, (N, B) float32: weight less what the codes
    stand for; `pending` is left as it is.
    """
    n, b = weight.shape
    lost = weight.new_empty(n, b)
    ctas = min(-(-n // WARPS), 2 * targets.multiprocessors(weight.device))
    kernel = kernel_loader.kernel(SOURCE, ENTRY, (), weight.device, SHARED)
    kernel((ctas,), (32 * WARPS,), weight, pending, steps, inverse, groups, lower, 1 / lower.diagonal(), codes, lost, n, b,
           weight.stride(0), pending.stride(0), codes.stride(0), steps.shape[1])
    return lost
