"""Branches in 8 bits and their launches without a GPU: a stand-in reads the tables that expand_branch.cu gets, and does its work."""

import threading

import pytest
import torch
from comfyui_svdquant.cuda import expand_branch, reference, runtime

from .launches import expanding
from .layers import random_layer

BFLOAT, HALF = torch.bfloat16, torch.float16
CPU = torch.device("cpu")
SIZES = (64, 1, 16), (192, 80, 48), (37, 300, 240), (256, 256, 32)  # K, N, R


def branch(k, n, rank, seed=0):
    """(proj_down codes, proj_up codes, scale)"""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (k + n, rank), generator=g, dtype=torch.int8)
    return codes[:k].clone(), codes[k:].clone(), torch.exp2(torch.rand(k + n, generator=g) * 12 - 16).bfloat16()


def exact(codes, dtype=BFLOAT):
    return reference.expand_branch(torch.cat(codes[:2]), codes[2], dtype)


def addresses(branches):
    return tuple(tuple(map(runtime.address, codes)) for codes in branches)


def operands(size, codes, dtype):
    k, n, rank = size
    layer = random_layer(n, -(-k // 64) * 64, rank, dtype=dtype)
    return layer._replace(proj_down=codes[0], proj_up=codes[1], proj_scale=codes[2])


def by_expander(size, codes, dtype):
    memory, begin = expand_branch.expander(operands(size, codes, dtype))()
    k, n, rank = size
    return memory.flatten()[begin:][:(k + n) * rank].view(k + n, rank)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_a_branch_alone(monkeypatch, dtype):
    with expanding(monkeypatch, dtype) as launches:
        for size in SIZES:
            codes = branch(*size)
            assert torch.equal(torch.cat(expand_branch.expanded(*codes, dtype)), exact(codes, dtype))
            assert torch.equal(by_expander(size, codes, dtype), exact(codes, dtype))
    assert launches == [1] * 2 * len(SIZES)


def test_operands_in_16_bits(monkeypatch):
    """Those in 8 bits get the expanded branch, with all else as it was; others stay the same tuple."""
    codes, size = branch(*SIZES[1]), SIZES[1]
    narrow = operands(size, codes, BFLOAT)
    with expanding(monkeypatch) as launches:
        wide = expand_branch.in_16_bits(narrow)
        assert launches == [1] and expand_branch.in_16_bits(wide) is wide and expand_branch.expander(wide) is None
    assert wide.proj_scale is None and torch.equal(torch.cat((wide.proj_down, wide.proj_up)), exact(codes))
    kept = [name for name in wide._fields if name not in ("proj_down", "proj_up", "proj_scale")]
    assert all(getattr(wide, name) is getattr(narrow, name) for name in kept)


@pytest.mark.parametrize(("count", "expected"), [(2, [2]), (16, [16]), (17, [16, 1]), (35, [16, 16, 3])])
def test_the_branches_of_a_block(monkeypatch, count, expected):
    """By few launches, ahead of the layers, which then launch nothing; afterwards each expands its own again."""
    sizes = [SIZES[i % len(SIZES)] for i in range(count)]
    branches = [branch(*size, seed) for seed, size in enumerate(sizes)]
    with expanding(monkeypatch) as launches:
        expand = expand_branch.ahead_of(addresses(branches), sizes, BFLOAT, CPU)
        for _ in range(2):
            with expand():
                assert launches == expected
                for size, codes in zip(sizes, branches):
                    assert torch.equal(torch.cat(expand_branch.expanded(*codes, BFLOAT)), exact(codes))
                    assert torch.equal(by_expander(size, codes, BFLOAT), exact(codes))
            assert launches == expected
            branches[0][0].neg_()  # in place: the next block expands it anew
            launches.clear()
        expand_branch.expanded(*branches[0], BFLOAT)
        assert launches == [1]


@pytest.mark.parametrize("other", ["type", "stream", "thread", "address", "block", "none"])
def test_only_the_same_branch_is_found(monkeypatch, other):
    codes, dtype, found = branch(*SIZES[1]), BFLOAT, []
    with expanding(monkeypatch, HALF if other == "type" else BFLOAT) as launches:
        expand = expand_branch.ahead_of(addresses([codes]), [SIZES[1]], HALF if other == "type" else BFLOAT, CPU)
        inner = expand_branch.ahead_of(addresses([branch(*SIZES[0])]), [SIZES[0]], BFLOAT, CPU)

        def ask():
            found.append(torch.cat(expand_branch.expanded(*codes, dtype)))

        with expand():
            launches.clear()
            if other == "type":
                with expanding(monkeypatch, BFLOAT) as launches:
                    ask()
            elif other == "stream":
                with monkeypatch.context() as patch:
                    patch.setattr(runtime, "_raw_stream", lambda index: 0x5678)
                    ask()
            elif other == "thread":
                thread = threading.Thread(target=ask)
                thread.start()
                thread.join()
            elif other == "address":
                codes = (codes[0], codes[1].neg(), codes[2])
                ask()
            elif other == "block":
                with inner():
                    launches.clear()
                    ask()
            else:
                ask()
    assert torch.equal(found[0], exact(codes)) and launches == ([] if other == "none" else [1])


def test_a_block_that_fails_leaves_the_one_around_it(monkeypatch):
    branches = [branch(*size) for size in SIZES[:2]]
    with expanding(monkeypatch) as launches:
        outer, inner = (expand_branch.ahead_of(addresses([codes]), [size], BFLOAT, CPU) for codes, size in zip(branches, SIZES))
        with outer():
            with pytest.raises(ZeroDivisionError), inner():
                raise ZeroDivisionError
            launches.clear()
            expand_branch.expanded(*branches[0], BFLOAT)
            assert not launches
        expand_branch.expanded(*branches[0], BFLOAT)
        assert launches == [1]
