"""The layout of packed layers: their tensors, the shapes of these, and their description in a file.

The module's parameters, the checkpoint and the reference have the same layout. Names and shapes are comfy-kitchen's, so that other
software can read the files. N is the number of outputs, K of inputs, R the rank, G = K / 64 the number of groups of columns:

    svdquant_w4a4                        awq_w4a16
    X.weight                (N, K/2)     X.weight        (N, K/2)    int8, two codes a byte, low nibble = even column
    X.weight_scale          (G, N)       X.weight_scale  (G, N)      16 bit
    X.weight_proj_down      (K, R)       X.weight_zeros  (G, N)      16 bit
    X.weight_proj_up        (N, R)                                   16 bit
    X.weight_smooth_factor  (K)                                      16 bit
    X.bias                  (N)          X.bias          (N)         16 bit
    X.comfy_quant                        X.comfy_quant               uint8, JSON: format, group_size, rank, ...

`weight_scale` alone defines the scales, even if a kernel finds a structure in it. If the scales are exactly c_n * i, a file may hold them
in half the bytes (checkpoint/int8_scales.py). The loaded layer still has the 16-bit scales; its file has

    svdquant_w4a4_int8_scale
    X.weight_scale          (G, N)    int8, i in -15..16
    X.weight_scale_2        (N)       16 bit, c_n, not negative; the layer's scales are the products in this type
    and the others as in svdquant_w4a4

The description of this format always has `act_unsigned_from`, which is K if no column is unsigned. The format has its own name because a
reader that used these integers as the scales would silently compute wrong images.

The low-rank branch of both formats may be in 8 bits. A loaded layer has the same tensors, and they are expanded for each of its calls
(cuda/expand_branch.py): the factors that it multiplies with are code * scale, in float32, rounded once to its 16-bit type. In a file:

    svdquant_w4a4_int8_branch
    X.weight_proj_down      (K, R)    int8, R a multiple of 16
    X.weight_proj_up        (N, R)    int8
    X.weight_proj_scale     (K + N)   bfloat16, positive: of proj_down's rows, and of proj_up's
    and the others as in svdquant_w4a4, or as in svdquant_w4a4_int8_scale

Its description has `act_unsigned_from` too, and `scale_bits`, 8 or 16, which says how `weight_scale` is stored. The format has its own name
for the same reason.

If a layer's activations have 8 bits where those of others may have 4, its description says so in `act_bits`. A reader that ignores it
computes the same layer with the bits of the others.

Published NVFP4 layers keep their format (cuda/nvfp4.py has the arithmetic), with groups of 16, G = K / 16:

    svdquant_nvfp4
    X.weight                (N, K/2)  int8, two e2m1 codes a byte, low nibble = even column
    X.weight_scale          (G, N)    float8_e4m3fn
    X.weight_scale_2        (B, N)    float32, one for each row and each block of K / B columns
    and X.weight_proj_down, X.weight_proj_up, X.weight_smooth_factor, X.bias, X.comfy_quant as above

Their inputs are signed e2m1, also after a GELU, so they have no GELU shift and no correction of it in the bias. B is 1, except for layers
that combine two published ones side by side, each with its own second scales. The format's name differs from comfy-kitchen's nvfp4, which
has one second scale per matrix.

A linear of a model may combine two published layers (families.family.Joined). It is one packed layer here:

* If both read the same input, as q, k, v and the MLP's first layer do, it is one matrix with one `smooth`, one quantized input and one
  LoRA branch fitted to all its rows. Every reader can treat it as a plain svdquant_w4a4 layer.
* If they read two inputs side by side, the second of which comes from a GELU, the second input has unsigned codes. Scales belong to groups
  of 64 columns, so the weight's codes, the scales, `smooth` and the LoRA branch need no boundary; only the activation's codes do. The
  description records it as `act_unsigned_from`, the first unsigned column. Other readers don't know that field, and would silently compute
  wrong images if they ignored it; therefore such a layer has its own format name, at which they stop with a clear error.
"""

import json
from dataclasses import dataclass, replace

import torch

from ...cuda import reference
from ...cuda.int4 import GROUP_SIZE
from ...cuda.nvfp4 import NVFP4_GROUP
from ...cuda.operands import CODES_STEP
from ..families.family import Packing

SVDQUANT = "svdquant_w4a4"
SVDQUANT_SPLIT = "svdquant_w4a4_split"  # signed columns, then unsigned ones
SVDQUANT_INT8_SCALE = "svdquant_w4a4_int8_scale"  # in files only, for both of the above
SVDQUANT_INT8_BRANCH = "svdquant_w4a4_int8_branch"  # in files only, likewise
NVFP4 = "svdquant_nvfp4"
AWQ = "awq_w4a16"
GROUP_SIZES = {SVDQUANT: GROUP_SIZE, SVDQUANT_SPLIT: GROUP_SIZE, SVDQUANT_INT8_SCALE: GROUP_SIZE, SVDQUANT_INT8_BRANCH: GROUP_SIZE,
               NVFP4: NVFP4_GROUP, AWQ: GROUP_SIZE}
BRANCH_BITS = (8, 16)

QUANT_KEY = "comfy_quant"


@dataclass(frozen=True)
class LayerSpec:
    """The format and sizes of one packed layer.

    unsigned_from: the first input column with unsigned codes; in_features if there is none. scale_blocks: B, the number of rows of NVFP4's
    second scale. act_bits: bits of a W4A4 layer's activations unless the user chooses others: 8, or 0 for those with which the device is
    fastest. branch_bits: of a W4A4 layer's low-rank branch, 16 or 8. Raises ValueError, whose message is the second half of a sentence, if
    the sizes don't fit each other.
    """

    format: str
    in_features: int
    out_features: int
    rank: int = 0
    unsigned_from: int = -1
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16  # of the scales (not NVFP4's), the branch, the smoothing factor and the bias
    scale_blocks: int = 1
    act_bits: int = 0
    branch_bits: int = 16

    def __post_init__(self):
        if self.unsigned_from < 0:
            object.__setattr__(self, "unsigned_from", self.in_features)
        if self.in_features % GROUP_SIZE:
            raise ValueError(f"has {self.in_features} input columns, which is not a multiple of {GROUP_SIZE}")
        if self.unsigned_from % GROUP_SIZE or self.unsigned_from > self.in_features:
            raise ValueError(f"has its first unsigned column at {self.unsigned_from}, not at a multiple of "
                             f"{GROUP_SIZE} within {self.in_features} columns")
        if self.scale_blocks < 1 or self.in_features // self.group_size % self.scale_blocks:
            raise ValueError(f"has {self.scale_blocks} rows of second scales, which do not divide its "
                             f"{self.in_features // self.group_size} groups of columns")
        if self.branch_bits == 8 and (self.rank < 1 or self.rank % CODES_STEP):
            raise ValueError(f"has a branch in 8 bits of rank {self.rank}, which is not a positive multiple of {CODES_STEP}")

    @property
    def group_size(self):
        """Columns that share one scale."""
        return GROUP_SIZES[self.format]

    def tensors(self):
        """{parameter name: (shape, dtype)} of the module's parameters. The file has the same tensors, except for int8 scales."""
        n, k, groups = self.out_features, self.in_features, self.in_features // self.group_size
        scale_dtype = torch.float8_e4m3fn if self.format == NVFP4 else self.dtype
        tensors = {"weight": ((n, k // 2), torch.int8), "weight_scale": ((groups, n), scale_dtype)}
        if self.format == NVFP4:
            tensors["weight_scale_2"] = ((self.scale_blocks, n), torch.float32)
        if self.format == AWQ:
            tensors["weight_zeros"] = ((groups, n), self.dtype)
        else:
            branch_dtype = torch.int8 if self.branch_bits == 8 else self.dtype
            tensors["weight_proj_down"] = ((k, self.rank), branch_dtype)
            tensors["weight_proj_up"] = ((n, self.rank), branch_dtype)
            if self.branch_bits == 8:
                tensors["weight_proj_scale"] = ((k + n,), torch.bfloat16)
            tensors["weight_smooth_factor"] = ((k,), self.dtype)
        if self.bias:
            tensors["bias"] = ((n,), self.dtype)
        return tensors

    def stored(self, int8_scale):
        """{name: (shape, dtype)} of the layer's tensors in a file. int8_scale: whether its group scales are stored in 8 bits."""
        if not int8_scale:
            return self.tensors()
        (groups, n), dtype = self.tensors()["weight_scale"]
        return self.tensors() | {"weight_scale": ((groups, n), torch.int8), "weight_scale_2": ((n,), dtype)}

    def nbytes(self):
        """Bytes of all the layer's tensors."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors().values())

    def conf(self, int8_scale=False):
        """The JSON object of `X.comfy_quant`. int8_scale: as in stored."""
        conf = {"format": self.format, "group_size": self.group_size, "orig_dtype": str(self.dtype),
                "orig_shape": [self.out_features, self.in_features]}
        if self.format != AWQ:
            conf |= {"rank": self.rank, "act_unsigned": self.unsigned_from == 0}
        if self.act_bits:
            conf["act_bits"] = self.act_bits
        if int8_scale:
            conf["format"] = SVDQUANT_INT8_SCALE
        if self.branch_bits == 8:
            conf |= {"format": SVDQUANT_INT8_BRANCH, "scale_bits": 8 if int8_scale else 16}
        if conf["format"] in (SVDQUANT_INT8_SCALE, SVDQUANT_INT8_BRANCH, SVDQUANT_SPLIT):
            conf["act_unsigned_from"] = self.unsigned_from
        return conf


def svdquant_spec(in_features, out_features, rank, unsigned_from, bias, dtype):
    """The LayerSpec of a W4A4 layer. It has the format SVDQUANT_SPLIT if only some of the columns are unsigned."""
    split = 0 < unsigned_from < in_features
    return LayerSpec(SVDQUANT_SPLIT if split else SVDQUANT, in_features, out_features, rank, unsigned_from, bias, dtype)


def spec_of(layer, weight_shape, rank, bias, dtype, act_bits=0, branch_bits=16):
    """The LayerSpec of a linear, from its family's Layer and its weight's shape (N, K). rank: the rank of its LoRA branch, if it has one;
    bias: whether it has a bias; act_bits, branch_bits: as in LayerSpec, of a W4A4 layer. Raises ValueError, whose message is the second
    half of a sentence, if the linear can't be packed."""
    n, k = weight_shape
    if layer.packing is Packing.W4A16:
        return LayerSpec(AWQ, k, n, bias=bias, dtype=dtype)
    return replace(svdquant_spec(k, n, rank, layer.unsigned_from(k, n), bias, dtype), act_bits=act_bits, branch_bits=branch_bits)


def branch_of(tensors, dtype):
    """(proj_down (K, R), proj_up (N, R)) in `dtype` with which a layer multiplies, from its {parameter name: tensor}."""
    factors = tensors["weight_proj_down"], tensors["weight_proj_up"]
    if "weight_proj_scale" not in tensors:
        return tuple(factor.to(dtype) for factor in factors)
    scales = tensors["weight_proj_scale"].split([len(codes) for codes in factors])
    return tuple(reference.expand_branch(codes, scale, dtype) for codes, scale in zip(factors, scales))


def layer_spec(layer, name, weight_shape, rank, bias, dtype, branch_bits=16):
    """spec_of linear `name`. Raises ValueError, which names the layer, if it can't be packed."""
    try:
        return spec_of(layer, weight_shape, rank, bias, dtype, branch_bits=branch_bits)
    except ValueError as error:
        raise ValueError(f"Layer {name} {error}, so it can't be packed in 4 bits.") from None


def encode_conf(conf):
    """A JSON object as the uint8 tensor that ComfyUI stores under `X.comfy_quant`."""
    return torch.tensor(list(json.dumps(conf).encode("utf-8")), dtype=torch.uint8)


def decode_conf(data):
    """The dict in the bytes of `X.comfy_quant`. Raises ValueError if they are not a JSON object."""
    try:
        conf = json.loads(bytes(data).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(conf, dict):
        raise ValueError("is not a JSON object")
    return conf
