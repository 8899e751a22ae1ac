"""Newer ComfyUIs' "Comfy Compiler", which records a step's allocations on a GPU, replays their addresses in the next step, and ends the
process where a tensor of the step is still alive then. It runs in the threads between comfy.model_prefetch's malloc_graph_begin and
malloc_graph_end.

The first versions keep a thread's graph in ACTIVE_MALLOC_GRAPHS while it records. Later ones keep it in MALLOC_GRAPHS, active or not, and
offer pause_malloc_graph, which newest ones give the parameter `sync`.
"""

import contextlib
import functools
import inspect
import threading
from pkgutil import resolve_name

from ..layers import kept_memory


def install():
    """Have the layers allocate what they keep outside of the record, where this ComfyUI has one."""
    kept_memory.context = _context()


def is_active():
    """Whether this thread's allocations are being recorded or replayed."""
    return _active_graph() is not None


def _context():
    pause = _of_the_host("pause_malloc_graph")
    if pause is None:
        return contextlib.nullcontext if _of_the_host("ACTIVE_MALLOC_GRAPHS") is None else _paused
    # With `sync`, weights that have to make room are evicted once the GPU has read them. ComfyUI allocates what it keeps itself so.
    return functools.partial(pause, sync=True) if "sync" in inspect.signature(pause).parameters else pause


@contextlib.contextmanager
def _paused():
    graph = _active_graph()
    if graph is None:
        yield
        return
    graph.pause()
    try:
        yield
    finally:
        graph.resume()


def _active_graph():
    """The graph that this thread's allocations go to, or None."""
    for name in ("MALLOC_GRAPHS", "ACTIVE_MALLOC_GRAPHS"):
        graph = (_of_the_host(name) or {}).get(threading.get_ident())
        if graph is not None and getattr(graph, "_comfy_active", True):
            return graph
    return None


def _of_the_host(name):
    """What comfy.model_prefetch has under a name, else None."""
    try:
        return resolve_name(f"comfy.model_prefetch:{name}")
    except (ImportError, AttributeError):
        return None
