"""The two launches of a layer where there is no GPU: x's device passes for an H100, and what the kernels would get is written down."""

import contextlib

import torch
from comfyui_svdquant.cuda import compiler, gemm_mma, gemm_wgmma, ops, quantize, runtime


@contextlib.contextmanager
def recorded(monkeypatch):
    """Yields a list of {name in ops.VARYING or ops.CONSTANT: address} that grows by one with each call of a layer."""
    calls, names = [], ops.VARYING + ops.CONSTANT

    def chain(count, *steps, constants=()):
        def run(*values):
            assert len(values) == count
            if len(steps) == 2:  # not a kernel by itself
                calls.append(dict(zip(names, values + tuple(constants), strict=True)))
        return run

    caches = ops._plan, quantize.launcher, gemm_mma.launcher, gemm_wgmma.launcher
    for cache in caches:
        cache.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "chain", chain)
        patch.setattr(runtime, "kernel", lambda source, entry, defines, device, shared=0: runtime.Kernel(0x77, -1, shared))
        patch.setattr(runtime.Kernel, "active_clusters", lambda kernel, ctas, threads: 16)
        patch.setattr(compiler, "architecture", lambda device: "sm_90a")
        patch.setattr(compiler, "multiprocessors", lambda device: 132)
        patch.setattr(ops, "kernels_run", lambda x, weight: x.device == weight.device)
        yield calls
    for cache in caches:
        cache.cache_clear()


def addresses(**tensors):
    return {name: runtime.address(tensor) for name, tensor in tensors.items()}


def aligned(tensor):
    """A copy that begins at a multiple of 16 bytes, which the CPU's allocator doesn't promise everywhere."""
    copy = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
    begin = -copy.data_ptr() % 16 // copy.element_size()
    return copy[begin:begin + tensor.numel()].view(tensor.shape).copy_(tensor)
