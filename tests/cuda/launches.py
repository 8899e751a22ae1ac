"""Fake launches of a layer without a GPU: x's device passes for an H100, and the kernels' arguments are recorded."""

import contextlib

import torch
from comfyui_svdquant.cuda import (
    autotune,
    gemm_mma,
    gemm_wgmma,
    kernel_loader,
    ops,
    quantize_activation,
    runtime,
    self_test,
    shared_input,
    targets,
)

WORK = 1 << 40  # the address of the chains' work memory


def recorder(note, length):
    """A replacement for runtime.chain: each call of a chain of `length` kernels calls note({name: address}, the steps)."""
    def chain(names, *steps, work=(), constants=()):
        offsets, _ = runtime.laid_out(dict(work))
        at = dict(constants) | {name: 0 if offset is None else WORK + offset for name, offset in offsets.items()}

        def run(*values):
            if len(steps) == length:
                note(at | dict(reversed([*zip(names, values, strict=True)])), steps)  # the first address of a name counts
        return run

    return chain


@contextlib.contextmanager
def recorded(monkeypatch, layers=1):
    """Yields a list to which each call of a layer, or of several with one input, appends its {name: address}."""
    calls = []
    caches = shared_input._launches, ops._launches, ops.chosen, quantize_activation.launcher, gemm_mma.launcher, gemm_wgmma.launcher
    for cache in caches:
        cache.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "chain", recorder(lambda at, steps: calls.append(at), 1 + layers))
        patch.setattr(shared_input, "_agreed", {})
        patch.setattr(runtime, "_tensor_map", lambda boxes: None)
        patch.setattr(kernel_loader, "kernel", lambda source, entry, defines, device, shared=0: runtime.Kernel(0x77, -1, shared))
        patch.setattr(runtime.Kernel, "active_clusters", lambda kernel, ctas, threads: 16)
        patch.setattr(targets, "for_device", lambda device: targets.TARGETS[90])
        patch.setattr(targets, "multiprocessors", lambda device: 132)
        patch.setattr(self_test, "passes", lambda *args: True)
        patch.setattr(self_test, "quantize_passes", lambda *args: True)
        patch.setattr(autotune, "wanted", lambda target: False)
        patch.setattr(ops, "on_gpu", lambda x: x.device.type == "cpu")
        yield calls
    for cache in caches:
        cache.cache_clear()


def addresses(**tensors):
    return {name: runtime.address(tensor) for name, tensor in tensors.items()}


def aligned(tensor):
    """A copy that begins at a multiple of 16 bytes, which the CPU's allocator doesn't guarantee."""
    copy = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
    begin = -copy.data_ptr() % 16 // copy.element_size()
    return copy[begin:begin + tensor.numel()].view(tensor.shape).copy_(tensor)
