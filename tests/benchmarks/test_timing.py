"""A capture in which nothing was launched is an error, since its time would be meaningless."""

import warnings
from contextlib import contextmanager

import machine
import pytest
import torch

# PyTorch's warning from 2.0 to 2.13.
EMPTY = "The CUDA Graph is empty. This usually means that the graph was attempted to be captured on wrong device or stream."


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """The list of launches in a fake torch.cuda.graph, which warns at its end if the list is empty, as PyTorch does."""
    made = []

    @contextmanager
    def capture(graph, stream=None):
        yield
        if not made:
            warnings.warn(EMPTY, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return made


def test_a_capture_of_nothing_is_an_error(launches):
    with pytest.raises(RuntimeError, match="Nothing was launched"):
        machine.recorded(lambda: None, 3)


def test_a_capture_of_work_is_a_graph_of_all_its_calls(launches):
    machine.recorded(lambda: launches.append(1), 3)
    assert launches == [1, 1, 1]


def test_other_warnings_pass_through(launches):
    with pytest.warns(UserWarning, match="something else"):
        machine.recorded(lambda: launches.append(warnings.warn("something else", stacklevel=1)), 1)


@pytest.mark.gpu
def test_pytorchs_warning_of_an_empty_graph_is_recognized():
    x = torch.zeros(8, device="cuda")
    assert machine.graph_time(lambda: x.add_(1)) > 0
    with pytest.raises(RuntimeError, match="Nothing was launched"):
        machine.graph_time(lambda: x.view(2, 4))
