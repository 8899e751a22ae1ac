"""The processes of one run, with gloo on the CPU, and what needs no second process."""

import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from comfyui_svdquant.quant.parallel import all_to_all, crew, ranks, shares
from comfyui_svdquant.quant.parallel.alone import ALONE
from comfyui_svdquant.quant.parallel.peer_attention import Peers

CHECKS = Path(__file__).with_name("checks.py")


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.heavy)])
def test_processes_get_what_others_send_and_the_statistics_of_one(count, tmp_path):
    """Four heads can't be divided among three processes, but everything else can."""
    # Without a folder for its logs torchrun leaves a temporary one behind.
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--log-dir", str(tmp_path / "logs")]
    done = subprocess.run([sys.executable, *launcher, str(CHECKS)], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("torchelastic")] == []
    assert f"{count} processes agree" in done.stdout, done.stderr


def test_one_process_is_alone():
    assert ALONE.share([1, 2, 3]) == [1, 2, 3] and ALONE.gathered(4) == [4] and ALONE.from_first(5) == 5
    assert ALONE.exchanged({0: 6}) == [6] and ALONE.exchanged({}) == [None]


def test_each_process_sees_the_gpu_of_its_number(monkeypatch):
    for visible, number, expected in (("", "1", "1"), ("4,6", "1", "6"), ("GPU-a,GPU-b", "0", "GPU-a")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("LOCAL_RANK", number)
        ranks.own_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="names 1 GPUs"):
        ranks.own_gpu()


def test_the_layers_are_shared_evenly():
    """Two blocks of FLUX.1 on two processes: each gets one of each kind of layer, whatever a layer of the kind costs."""
    kinds = {"linear1": 9.0, "linear2": 14.0, "modulation": 1.0}
    found = shares.owners({f"{i}.{kind}": cost for i in range(2) for kind, cost in kinds.items()}, 2)
    assert all(found[f"0.{kind}"] != found[f"1.{kind}"] for kind in kinds)
    uneven = shares.owners({"a": 5.0, "b": 4.0, "c": 3.0, "d": 3.0, "e": 3.0}, 2)
    assert sorted(sum({"a": 5, "b": 4}.get(name, 3) for name in uneven if uneven[name] == rank) for rank in (0, 1)) == [8, 10]
    equal = shares.owners(dict.fromkeys(("0.image", "1.image", "0.text", "1.text"), 5.0), 2)
    assert equal["0.image"] != equal["1.image"] and equal["0.text"] != equal["1.text"], "neighbours"
    assert shares.batches(list("abcde"), 2) == [["a", "b"], ["c", "d"], ["e"]]


def test_every_token_has_one_process_and_its_place():
    for parts, size in (((512, 4096), 2), ((7, 9), 4), ((3, 100), 3)):
        places = [span for rank in range(size) for span in all_to_all.Division(parts, rank, size).places[rank]]
        tokens = sorted(token for start, count in places for token in range(start, start + count))
        assert tokens == list(range(sum(parts)))
        ordered = [token for start, count in places for token in range(start, start + count)]
        assert all_to_all.Division(parts, 0, size).order("cpu").tolist() == ordered
        counts = all_to_all.Division(parts, 0, size).tokens
        assert max(counts) - min(counts) <= len(parts)


def test_nothing_of_torch_distributed_is_imported_for_one_process():
    """Nor does the node pack open a port: the modules with torch.distributed in them are imported by name where they are asked for."""
    root = Path(ranks.__file__).parents[1]
    users = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if "torch.distributed as" in path.read_text(encoding="utf-8")}
    assert users == {"parallel/ranks.py", "parallel/crew.py", "parallel/all_to_all.py", "host/several_gpus.py"}


def test_a_message_keeps_every_dtype():
    tensors = [torch.arange(7, dtype=torch.int8), torch.randn(3, 5), torch.randn(2).bfloat16(), torch.tensor(True), torch.empty(0, 4)]
    message = ranks.message_of(tensors, "cpu")
    for tensor, copy in zip(tensors, ranks.tensors_of(message, [(tuple(tensor.shape), tensor.dtype) for tensor in tensors])):
        assert torch.equal(tensor, copy) and tensor.dtype == copy.dtype


def test_the_graphs_of_a_lost_run_and_its_group_end_together(monkeypatch):
    """As CUDA and NCCL do: a running graph is destroyed once the abort has begun, which ends once the graph is destroyed."""
    begun, destroyed = threading.Event(), threading.Event()
    graph = types.SimpleNamespace(reset=lambda: begun.wait(10) and destroyed.set())
    every = types.SimpleNamespace(peers=Peers(), graphs=[graph], device=torch.device("cpu"))
    left = []

    def abort():
        begun.set()
        left.append(destroyed.wait(10))

    monkeypatch.setattr(crew, "dist", types.SimpleNamespace(is_initialized=lambda: not left, destroy_process_group=lambda: None,
                                                            distributed_c10d=types.SimpleNamespace(_abort_process_group=abort)))
    every.release_graphs = lambda: ranks.Ranks.release_graphs(every)
    began = time.monotonic()
    crew._end([], {"ranks": every})
    assert left == [True] and time.monotonic() - began < 5 and not crew._leaving.locked()
