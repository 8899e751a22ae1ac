"""Stand-ins for comfy.model_prefetch as ComfyUI's versions have it since 0.34: how a step's allocation graph is begun, paused and ended.

The graph of comfy-aimdo is allocations.Recorder here, which runs without a GPU.
"""

import threading
import types

from .allocations import Recorder


class Graph:
    """A thread's graph. rogues: allocations that outlive their step; syncs: pauses in which evictions wait for the GPU."""

    def __init__(self):
        self.recorder, self.rogues, self.pauses, self.syncs, self.steps = Recorder(), 0, 0, 0, 0

    def push(self):
        self.recorder.made.clear()
        self.recorder.__enter__()

    def pop(self):
        self.recorder.__exit__(None, None, None)
        assert not self.recorder.paused, "it was not resumed"
        self.rogues += len(self.recorder.rogues())
        self.steps += 1

    def pause(self, sync=False):
        assert not self.recorder.paused, "aimdo has no nested pauses: the inner resume would end the outer one"
        self.recorder.paused, self.pauses, self.syncs = True, self.pauses + 1, self.syncs + sync

    def resume(self, sync=False):
        self.recorder.paused = False


def first():
    """The first versions': a graph is kept with its module, and is in ACTIVE_MALLOC_GRAPHS while it records; none can be paused but itself.
    """
    host, graphs = types.ModuleType("comfy.model_prefetch"), {}
    host.ACTIVE_MALLOC_GRAPHS = {}

    def begin(device):
        graph = graphs.setdefault(threading.get_ident(), Graph())
        graph.push()
        host.ACTIVE_MALLOC_GRAPHS[threading.get_ident()] = graph

    def end():
        host.ACTIVE_MALLOC_GRAPHS.pop(threading.get_ident()).pop()

    return _with(host, begin, end, lambda: graphs[threading.get_ident()])


def second(sync=False):
    """Later versions': a thread's graph stays in MALLOC_GRAPHS and says itself whether it records. sync: whether there are pauses in which
    evictions wait for the GPU."""
    host = types.ModuleType("comfy.model_prefetch")
    host.MALLOC_GRAPHS = {}

    class Pause:
        def __init__(self, **options):
            self.options = options

        def __enter__(self):
            graph = host.MALLOC_GRAPHS.get(threading.get_ident())
            if graph is not None and graph._comfy_active:
                graph.pause(**self.options)

        def __exit__(self, *args):
            graph = host.MALLOC_GRAPHS.get(threading.get_ident())
            if graph is not None and graph._comfy_active:
                graph.resume(**self.options)

    host.pause_malloc_graph = (lambda sync=False: Pause(sync=sync)) if sync else (lambda: Pause())

    def begin(device):
        graph = host.MALLOC_GRAPHS.setdefault(threading.get_ident(), Graph())
        graph.push()
        graph._comfy_active = True

    def end():
        graph = host.MALLOC_GRAPHS[threading.get_ident()]
        graph.pop()
        graph._comfy_active = False

    return _with(host, begin, end, lambda: host.MALLOC_GRAPHS[threading.get_ident()])


def third():
    return second(sync=True)


def _with(host, begin, end, graph):
    host.malloc_graph_begin, host.malloc_graph_end, host.graph = begin, end, graph
    return host


VERSIONS = first, second, third
