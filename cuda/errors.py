"""The error that callers of the kernels handle."""


class KernelsUnavailable(RuntimeError):
    """The CUDA kernels can't be used on this machine, now or later. The message gives the reason and the remedy."""
