"""Stand-ins for the CUDA graphs of divided forwards, on the CPU. As a program, a worker that has them:

    python stand_in_graphs.py draw.py ARGS...
"""

import importlib
import runpy
import sys
from pathlib import Path

PLAIN = Path(__file__).resolve().parents[1] / "batch" / "on_host.py"


class Graph:
    """Replays launches as a CUDA graph does. `clone` stands for that of the result's tensor."""

    made = []

    def __init__(self, run):
        self.run, self.result, self.replays, self.destroyed = run, None, 0, False
        Graph.made.append(self)

    def replay(self):
        assert not self.destroyed
        self.result = self.run()
        self.replays += 1

    def clone(self):
        return self.result.clone()

    def reset(self):
        self.destroyed, self.run = True, None  # unlike a graph's launches, run keeps the model


def install(step_graphs, captured):
    """captured(run, device): in place of step_graphs.captured."""
    step_graphs.DEVICE, step_graphs.has_room, step_graphs.captured = "cpu", lambda device: True, captured


def captured(run, _device):
    """In process 0."""
    graph = Graph(run)
    return graph, graph


def captured_by_worker(run, _device):
    return Graph(run), None


def main():
    import_module = importlib.import_module

    def imported(name, package=None):
        module = import_module(name, package)
        if name.endswith("quant.host.several_gpus"):
            install(module.step_graphs, captured_by_worker)
        return module

    importlib.import_module = imported
    sys.argv[0] = str(PLAIN)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
