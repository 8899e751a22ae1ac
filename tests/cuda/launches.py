"""Fake launches of a layer without a GPU: x's device passes for an H100, and the kernels' arguments are recorded."""

import contextlib
import ctypes

import torch
from comfyui_svdquant.cuda import (
    autotune,
    dispatch,
    driver,
    expand_branch,
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
CHAIN = runtime.chain


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
        patch.setattr(dispatch, "on_gpu", lambda x: x.device.type == "cpu")
        yield calls
    for cache in caches:
        cache.cache_clear()


def groups(monkeypatch):
    """Let layers that share an input run together from their first call on, since recorded() gives no numbers to compare. Returns a list to
    which each of their calls without a cached launch appends its arguments."""
    general, op = [], shared_input.svdquant_linears

    def compared(kind, launches, *call):
        shared_input._agreed[kind] = launches
        return shared_input.launched(launches, *call)

    monkeypatch.setattr(shared_input, "compared", compared)
    monkeypatch.setattr(shared_input, "svdquant_linears", lambda *args: general.append(args) or op(*args))
    return general


def addresses(**tensors):
    return {name: runtime.address(tensor) for name, tensor in tensors.items()}


def aligned(tensor):
    """A copy that begins at a multiple of 16 bytes, which the CPU's allocator doesn't guarantee."""
    copy = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
    begin = -copy.data_ptr() % 16 // copy.element_size()
    return copy[begin:begin + tensor.numel()].view(tensor.shape).copy_(tensor)


def memory(address, dtype, *shape):
    """The tensor of CPU memory at an address."""
    count = torch.Size(shape).numel()
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype).view(shape)


def run_expand_branch(call, launches, dtype=torch.bfloat16):
    """Do on the CPU what expand_branch.cu does in a launch, which gets the arguments of cuLaunchKernelEx. `launches` gets the number of
    branches. The kernel's address is the number of its table's layers."""
    config, layers, parameters, _ = call
    out, table = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[:2]
    out, table = ctypes.c_int64.from_address(out).value, memory(table, torch.int64, layers, len(expand_branch.FIELDS))
    grid, present = ctypes.c_uint.from_address(config).value, table[:, 4] < 2**31 - 1
    ends = [*table[present, 4].tolist(), grid][1:]
    for (down, up, scale, offset, first_cta, down_pieces, pieces, row_pieces), end in zip(table[present].tolist(), ends, strict=True):
        assert (end - first_cta - 1) * 256 < pieces <= (end - first_cta) * 256, "the branch's CTAs"
        rank, rows, k = 16 * row_pieces, pieces // row_pieces, down_pieces // row_pieces
        codes = torch.cat((memory(down, torch.int8, k, rank), memory(up, torch.int8, rows - k, rank)))
        memory(out + 16 * offset, dtype, rows, rank).copy_(codes * memory(scale, torch.bfloat16, rows).float().unsqueeze(-1))
    launches.append(int(present.sum()))
    return 0


@contextlib.contextmanager
def expanding(monkeypatch, dtype=torch.bfloat16):
    """The kernel of expand_branch.cu for a type, by the CPU on the CPU's memory, which passes for a GPU's. Yields a list to which each of
    its launches appends the number of branches that it expands."""
    launches = []

    class Driver:
        def cuLaunchKernelEx(self, *call):
            return run_expand_branch(call, launches, dtype)

    def chain(names, *steps, **more):
        return (CHAIN if names[0] == "out" else others)(names, *steps, **more)

    def allocator(shape, dtype, device):
        def allocate():
            kept.append(torch.full(shape, torch.nan, dtype=dtype, device=device))
            return kept[-1]
        return allocate

    others, kept = runtime.chain, []  # kept: the outputs, so that recorded addresses stay valid
    expand_branch.launcher.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(expand_branch, "_kernel", lambda dtype, layers, device: runtime.Kernel(layers, -1, 0))
        patch.setattr(runtime, "chain", chain)
        patch.setattr(runtime, "allocator", allocator)
        patch.setattr(driver, "driver", Driver)
        patch.setattr(driver, "ensure_context", lambda: None)
        patch.setattr(runtime, "_current_device", lambda: -1)
        patch.setattr(runtime, "_raw_stream", lambda index: 0x1234)
        patch.setattr(dispatch, "on_gpu", lambda x: x.device.type == "cpu")
        yield launches
    expand_branch.launcher.cache_clear()
