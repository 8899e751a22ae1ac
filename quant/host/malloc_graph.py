"""Newer ComfyUIs' "Comfy Compiler", which records a step's allocations on a GPU, replays their addresses in the next step, and ends the
process where a tensor of the step is still alive then. It runs in the threads that have entered comfy.model_prefetch.malloc_graph_scope."""

import contextlib
import threading
from pkgutil import resolve_name

from ..layers import kept_memory


def install():
    """Have the layers allocate what they keep outside of the record, where this ComfyUI has one."""
    kept_memory.context = _of_the_host("pause_malloc_graph") or contextlib.nullcontext


def is_active():
    """Whether this thread's allocations are being recorded or replayed."""
    graph = (_of_the_host("MALLOC_GRAPHS") or {}).get(threading.get_ident())
    return graph is not None and getattr(graph, "_comfy_active", True)


def _of_the_host(name):
    """What comfy.model_prefetch has under a name, else None."""
    try:
        return resolve_name(f"comfy.model_prefetch:{name}")
    except (ImportError, AttributeError):
        return None
