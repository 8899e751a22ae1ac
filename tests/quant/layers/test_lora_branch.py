"""The joined ranks of LoRAs: the same weight as the terms, in the memory of their factors."""

import pytest
import torch
from comfyui_svdquant.cuda import reference
from comfyui_svdquant.cuda.operands import MAX_PART_RANK, LoRASizes
from comfyui_svdquant.quant.layers.lora_branch import Dense, LoRABranch, LowRank, joined
from comfyui_svdquant.quant.quantizer.metrics import relative_error

N, K = 5 * 768, 96
Q, KEYS, V, MLP = (0, 768), (768, 1536), (1536, 2304), (2304, N)
ALL = (0, N)


def term(rows, rank, cols=(0, K), seed=0):
    g = torch.Generator().manual_seed(seed)
    return LowRank(rows, cols, torch.randn(rows[1] - rows[0], rank, generator=g), torch.randn(rank, cols[1] - cols[0], generator=g) * 1e-3)


def weight(terms, shape):
    total = torch.zeros(shape)
    for one in terms:
        total[slice(*one.rows), slice(*one.cols)] += one.dense()
    return total


@pytest.mark.parametrize(("windows", "sizes"), [
    ([(ALL, 16)], LoRASizes((16,))),
    ([(ALL, 5)], LoRASizes((8,))),
    ([(ALL, 16), (ALL, 32), (ALL, 4)], LoRASizes((56,))),
    ([(Q, 16), (KEYS, 16), (V, 16)], LoRASizes((16, 16, 16, 0), 768)),
    ([(V, 16)], LoRASizes((0, 0, 16, 0), 768)),
    ([(Q, 16), (KEYS, 8), (V, 4), (MLP, 24)], LoRASizes((16, 8, 8, 24), 768)),
    ([(Q, 16), (V, 16), (ALL, 8)], LoRASizes((24, 8, 24, 8), 768)),
    ([((0, 100), 16)], LoRASizes((16,))),
    ([(Q, MAX_PART_RANK + 8)], LoRASizes((MAX_PART_RANK + 8,)))])
def test_parts_and_weight(windows, sizes):
    terms = [term(rows, rank, seed=seed) for seed, (rows, rank) in enumerate(windows)]
    lora = joined(terms, (N, K), 0, torch.float32, "cpu")
    assert lora.sizes == sizes
    found = reference.lora_product(torch.eye(K), lora.down, lora.up, lora.strength, lora.sizes, N).t()
    error = relative_error(found, weight(terms, (N, K)))
    assert error < 1e-6, f"relative error {error:.1e}"


def test_the_memory_of_the_factors():
    """A LoRA on q, k and v takes no memory for other rows, and one on v alone none for q and k."""
    for windows in ([Q, KEYS, V], [V]):
        branch = LoRABranch.of([term(rows, 16) for rows in windows], (N, K), torch.bfloat16, "cpu")
        assert branch.nbytes() == 2 * sum(16 * (K + stop - start) for start, stop in windows) + 4 * 16 * len(windows)  # and strengths


@pytest.mark.parametrize("part_rows", [100, 768 * 2 + 1])
def test_borders_that_no_tile_has(part_rows):
    """Layers whose q, k and v don't begin with a tile get one part, whose factors are zero where a term doesn't reach."""
    terms = [term((0, part_rows), 8), term((part_rows, 2 * part_rows), 8, seed=1)]
    lora = joined(terms, (N, K), 0, torch.float32, "cpu")
    assert lora.sizes == LoRASizes((16,))
    assert relative_error(lora.up.view(N, 16) @ lora.down, weight(terms, (N, K))) < 1e-6


def test_columns():
    terms = [term(ALL, 8, (32, 64)), term(ALL, 8, seed=1)]
    lora = joined(terms, (N, K), 0, torch.float32, "cpu")
    assert relative_error(lora.up.view(N, 16) @ lora.down, weight(terms, (N, K))) < 1e-6


def test_factors_of_very_different_size_in_fp16():
    one = LowRank(ALL, (0, K), torch.randn(N, 16) * 1e-6, torch.randn(16, K) * 1e3)
    lora = joined([one], (N, K), 0, torch.float16, "cpu")
    assert relative_error(lora.up.float().view(N, 16) @ lora.down.float(), one.dense()) < 1e-3


def test_other_strengths_keep_the_factors():
    """Only the same tensors serve again, at the same place, for a layer of the same rank and type."""
    a, b, x, dtype = term(Q, 8), term(V, 16, seed=1), torch.randn(3, K), torch.bfloat16
    branch = LoRABranch.of([a, b], (N, K), dtype, "cpu", 4)
    branch.lora_down[:4] = 7  # the layer's own ranks
    before = {name: tensor.clone() for name, tensor in branch.named_buffers()}
    addresses = [tensor.data_ptr() for tensor in branch.buffers()]
    for strengths in ((0.5, 1), (0.3, -2), (1e-3, 0.7), (1, 1)):
        terms = [a.scaled(Q, strengths[0]), b.scaled(ALL, strengths[1])]
        assert branch.take_strengths(terms, N, dtype)
        assert relative_error(branch.add(torch.zeros(3, N), x), x @ weight(terms, (N, K)).t()) < 0.01
        assert [tensor.data_ptr() for tensor in branch.buffers()] == addresses, "launches keep them"
    assert all(torch.equal(tensor, before[name]) for name, tensor in branch.named_buffers())
    others = ([a], [a, b, b], [b, a], [a._replace(down=a.down.clone()), b], [a._replace(up=a.up.clone()), b], [a._replace(rows=V), b],
              [a.scaled((0, 9), 0.5), b], [a, Dense(V, (0, K), b.dense())], [])
    assert not any(branch.take_strengths(other, N, dtype) for other in others)
    assert not branch.take_strengths([a, b], N, torch.float16) and not LoRABranch.of([a, b], (N, K), dtype, "cpu", gain=torch.ones(N))\
        .take_strengths([a, b], N, dtype)
    del a, others, terms
    a = term(Q, 8, seed=5)  # perhaps at the address of the tensor that is gone
    assert not branch.take_strengths([a, b], N, dtype)
    assert all(torch.equal(tensor, before[name]) for name, tensor in branch.named_buffers())


def test_a_branch_adds_all_of_it():
    terms = [term(Q, 8), term(V, 16, seed=1)]
    branch, x = LoRABranch.of(terms, (N, K), torch.float32, "cpu"), torch.randn(2, 3, K)
    assert relative_error(branch.add(torch.zeros(2, 3, N), x), x @ weight(terms, (N, K)).t()) < 1e-5
    assert not branch.add(torch.zeros(2, 3, N), x, with_lora=False).any()
