"""Which code a call runs: a function directly or its op, the kernels or PyTorch."""

import torch

PLAIN = torch.Tensor, torch.nn.Parameter
_dynamo_traces, _dispatch_modes = torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack


def plain(x):
    """Whether nothing traces this call, so that it may skip the dispatcher, which costs a third of a layer's time on the host."""
    # torch.export traces with its own tensor subclass.
    return type(x) in PLAIN and not _dynamo_traces() and not _dispatch_modes()


def on_gpu(x):
    """Whether x is on a device for which the kernels exist."""
    return x.is_cuda and not torch.version.hip
