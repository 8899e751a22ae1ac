"""The error that the kernels' users handle."""


class KernelsUnavailable(RuntimeError):
    """The CUDA kernels can't be used on this machine, now or later. The message says why, and what to install."""
