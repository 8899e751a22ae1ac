"""Where the GPU's time goes in a function, by the kind of its kernels."""

import re

import torch

# (kind, pattern of its kernels' names), the first match counts. What TorchInductor generates is named after the operators that it fuses,
# among them products that it reads, so that its kernels are recognized before all others; its templates ("tem") are real products.
# This pack's kernels have their functions' bare names, those of other libraries are C++ names with namespaces and arguments.
KINDS = (("other", r"^triton_(?!tem)"),
         ("awq", r"^awq"),
         ("attention", r"flash|fmha|sdpa|attn|attention"),
         ("quantize", r"quantize"),
         ("gemm", r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|^triton_tem|^add_partial_sums"),
         ("other", ""))
NAMES = "gemm", "attention", "quantize", "awq", "other"


def kind(name):
    """The kind of the kernel `name`: gemm, attention, quantize (also the decoding of a weight's codes), awq (the modulation layers in 4
    bits), or other: norms, elementwise operations, among them PyTorch's casts to fp8, and copies."""
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def by_kind(times):
    """{kind: milliseconds} of [(kernel's name, microseconds)]"""
    found = dict.fromkeys(NAMES, 0.0)
    for name, microseconds in times:
        found[kind(name)] += microseconds / 1e3
    return found


def kernel_times(run):
    """[(name, microseconds)] of the kernels and copies that run() launches on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    # Without the CPU's activity there are no annotations on the GPU's timeline, which would count their kernels' time twice.
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return [(event.name, event.time_range.elapsed_us()) for event in profiled.events() if event.device_type == DeviceType.CUDA]
