"""The kernels that choose() returns for each GPU, and that the tests of machine code cover all of them."""

import pytest
import torch
from comfyui_svdquant.cuda import gemm_mma, gemm_wgmma
from comfyui_svdquant.cuda.activation_layout import CodeStorage
from comfyui_svdquant.cuda.choose import MLP, W4A16, AWQKernel, Kind, Layer, choose
from comfyui_svdquant.cuda.targets import TARGETS

from .variants import variants

INT8, INT4_BYTES, INT4_NIBBLES = CodeStorage
H100 = TARGETS[90], 132
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def layer(m=4096, n=3072, k=3072, rank=32, unsigned_from=None, act_bits=8, dtype=BF16, gelu_from=None):
    return Layer(m, n, k, rank, k if unsigned_from is None else unsigned_from, act_bits, dtype, gelu_from)


@pytest.mark.parametrize(("number", "act_bits", "storage", "wgmma"), [
    (75, 4, INT4_NIBBLES, False), (89, 4, INT4_NIBBLES, False), (89, 8, INT8, False), (90, 8, INT8, True), (90, 4, INT4_BYTES, False),
    (100, 8, INT8, False), (120, 4, INT4_BYTES, False)])
def test_the_kernels_of_a_generation(number, act_bits, storage, wgmma):
    target = TARGETS[number]
    kernels = choose(layer(act_bits=act_bits, dtype=target.dtypes[0]), target, 100)
    assert (kernels.storage, kernels.wgmma, kernels.whole) == (storage, wgmma, True)
    assert kernels.tile in (gemm_wgmma.STAGES if wgmma else gemm_mma.tiles_of(target))


@pytest.mark.parametrize(("unsigned_from", "wgmma"), [(0, True), (3072, True), (128, True), (64, False), (192, False)])
def test_hoppers_gemm_takes_borders_between_blocks(unsigned_from, wgmma):
    kernels = choose(layer(unsigned_from=unsigned_from), *H100)
    assert kernels.wgmma is wgmma and kernels.storage == INT8 and kernels.whole


@pytest.mark.parametrize(("changes", "rank", "gelu_from", "whole"), [
    ({}, 32, None, True), ({"gelu_from": 64}, 32, 64, True), ({"gelu_from": 80}, 32, None, False), ({"rank": 24}, 32, None, False),
    ({"rank": 128}, 128, None, True), ({"rank": 144, "gelu_from": 64}, 144, 64, True), ({"rank": 121}, 128, None, False),
    ({"rank": 160, "unsigned_from": 64, "gelu_from": 0}, 160, 0, True), ({"rank": 160, "act_bits": 4}, 160, None, True),
    ({"dtype": FP32}, 32, None, False)])
def test_the_parts_that_the_gemm_leaves_to_pytorch(changes, rank, gelu_from, whole):
    """Ranks are padded to 16. PyTorch applies GELU from columns at which no warp begins."""
    kernels = choose(layer(**changes), *H100)
    assert (kernels.rank, kernels.gelu_from, kernels.whole) == (rank, gelu_from, whole)


@pytest.mark.parametrize(("number", "changes", "whole"), [
    (90, {}, True), (90, {"dtype": FP16}, True), (90, {"rank": 160}, True), (90, {"rank": 24}, False), (90, {"gelu_from": 64}, False),
    (90, {"unsigned_from": 64}, True), (90, {"act_bits": 4}, False), (89, {"act_bits": 4}, True), (120, {"act_bits": 8}, True),
    (75, {"dtype": FP16}, True), (75, {}, False)])
def test_the_layers_that_the_gemm_adds_to_a_residual(number, changes, whole):
    """The choice of tile and plans is that of the layer alone, also where the kernel has failed."""
    target, alone = TARGETS[number], layer(**changes)
    gated, kernels = alone._replace(gated=True), choose(alone, target, 132)
    source = gemm_wgmma.SOURCE if kernels.wgmma else gemm_mma.SOURCE
    assert choose(gated, target, 132) == kernels._replace(whole=whole)
    assert choose(gated, target, 132, frozenset({Kind(source, kernels.storage, gated=True)})) == kernels._replace(whole=False)


@pytest.mark.parametrize("changes", [{"m": 0}, {"k": 96}, {"n": 72}, {"n": 1 << 20, "k": 1 << 13}])
@pytest.mark.parametrize("act_bits", [4, 8, W4A16])
def test_layers_that_the_reference_computes(act_bits, changes):
    assert choose(layer(act_bits=act_bits, **changes), *H100) is None


def test_w4a16():
    assert [choose(layer(m=m, act_bits=W4A16), *H100) for m in (1, 8, 9, 100)] == [AWQKernel(1)] * 2 + [AWQKernel(4)] * 2


@pytest.mark.parametrize("number", TARGETS)
def test_an_mlp(number):
    target = TARGETS[number]
    dtype = target.dtypes[0]
    kernels = choose(MLP(layer(n=12288, act_bits=4, dtype=dtype, gelu_from=0), layer(k=12288, act_bits=4, dtype=dtype)), target, 100)
    assert (kernels is None) is (number == 75)
    if kernels:
        assert kernels.storage == (INT4_NIBBLES if target.native_int4 else INT4_BYTES)
        assert kernels.tile in gemm_mma.next_tiles_of(kernels.storage) and kernels.second_tile in gemm_mma.tiles_of(target)


def modes(target):
    """The storages for which the tests of the machine code compile gemm_mma.cu, and whether they compile gemm_wgmma.cu."""
    found = variants(target)
    return {dict(defines)["CODES"] for _, _, defines in found["gemm_mma"]}, bool(found["gemm_wgmma"])


@pytest.mark.parametrize("number", TARGETS)
def test_the_variants_cover_every_storage(number):
    """Hopper's int8 layers with a border within a block of columns also use gemm_mma.cu."""
    target = TARGETS[number]
    assert modes(target) == ({INT8, INT4_NIBBLES if target.native_int4 else INT4_BYTES}, target.wgmma)


@pytest.mark.parametrize("number", TARGETS)
def test_the_variants_cover_other_layers(number):
    """The variants also cover layers that were not used to find them."""
    target = TARGETS[number]
    storages, wgmma = modes(target)
    for m in (1, 333, 2048):
        for n, k in ((9216, 3072), (208, 1088)):
            for rank, unsigned_from, act_bits in ((16, 0, 4), (128, 64, 8), (160, 960, 8), (48, 1024, 4), (32, 128, 8)):
                kernels = choose(layer(m, n, k, rank, unsigned_from, act_bits, target.dtypes[0]), target, 60)
                assert wgmma if kernels.wgmma else kernels.storage in storages
