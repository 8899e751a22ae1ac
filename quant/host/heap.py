"""Memory of models that are gone, which glibc keeps."""

import ctypes
import functools


@functools.cache
def _malloc_trim():
    """glibc's function; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not in musl's or Apple's library; Windows has no library of that name
        return None


def give_back():
    """Return freed memory to the system, in 15 to 60 ms where there are gigabytes of it.

    Tensors of up to 32 MB come from glibc's heap, and holes stay in it when they go: when a model of 2.4 GB had been loaded and dropped
    twice, a third one made the process 3.3 GB larger, and 2.4 with this before each load.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
