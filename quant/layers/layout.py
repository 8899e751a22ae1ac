"""The packed layer: which tensors it has, their shapes, and how a file describes them.

One layout serves the module's parameters, the checkpoint and the reference. Names and shapes are comfy-kitchen's, so
that other software can read the files; N outputs, K inputs, R the rank, G = K / 64 groups of columns:

    svdquant_w4a4                        awq_w4a16
    X.weight                (N, K/2)     X.weight        (N, K/2)    int8, two codes a byte, low nibble = even column
    X.weight_scale          (G, N)       X.weight_scale  (G, N)      16 bit
    X.weight_proj_down      (K, R)       X.weight_zeros  (G, N)      16 bit
    X.weight_proj_up        (N, R)                                   16 bit
    X.weight_smooth_factor  (K)                                      16 bit
    X.bias                  (N)          X.bias          (N)         16 bit
    X.comfy_quant                        X.comfy_quant               uint8, JSON: format, group_size, rank, ...

`weight_scale` is the whole truth about the scales, whatever structure a kernel may find in it. A file may hold it in half the
bytes, where it is c_n * i to the bit (checkpoint/int8_scales.py). The layer has the 16-bit scales all the same, and in the file it is

    svdquant_w4a4_int8_scale
    X.weight_scale          (G, N)    int8, i in -15..16
    X.weight_scale_2        (N)       16 bit, c_n, not negative; the layer's scales are the products in this type
    and the others as in svdquant_w4a4

whose description always says `act_unsigned_from`, K where no column is unsigned. The format has a name of its own because a reader
that took these integers for the scales would compute a wrong picture in silence.

Layers that others quantized to NVFP4 stay in it (cuda/nvfp4.py has the arithmetic), with groups of 16, G = K / 16:

    svdquant_nvfp4
    X.weight                (N, K/2)  int8, two e2m1 codes a byte, low nibble = even column
    X.weight_scale          (G, N)    float8_e4m3fn
    X.weight_scale_2        (B, N)    float32, one for each row and K / B columns
    and X.weight_proj_down, X.weight_proj_up, X.weight_smooth_factor, X.bias, X.comfy_quant as above

Their inputs are signed e2m1 throughout, behind a GELU too, so nothing is shifted and no bias holds a correction. B is 1, but for
layers that hold two published ones side by side, each with scales of its own. The name is not comfy-kitchen's nvfp4, which has one second
scale a matrix.

A linear of a model may hold two published layers (families.family.Joined), and stays one packed layer here:

* Where both read one input, as q, k, v and the MLP's first layer do, it is one matrix with one `smooth`, one quantized input and one
  branch fitted to all its rows. It is a plain svdquant_w4a4 layer to any reader.
* Where they read two inputs side by side, the second one out of a GELU, that one is coded unsigned. Scales belong to groups of 64
  columns, so the codes, the scales, `smooth` and the branch need no boundary; only the activation's code does. It is recorded as
  `act_unsigned_from`, the first unsigned column. No other reader knows that field, and one that ignored it would compute a wrong
  picture in silence; therefore such a layer has a format name of its own, which makes other readers stop with a clear error.
"""

import json
from dataclasses import dataclass

import torch

from ...cuda.int4 import GROUP_SIZE
from ...cuda.nvfp4 import NVFP4_GROUP
from ..families.family import Packing

SVDQUANT = "svdquant_w4a4"
SVDQUANT_SPLIT = "svdquant_w4a4_split"  # signed columns, then unsigned ones
SVDQUANT_INT8_SCALE = "svdquant_w4a4_int8_scale"  # in files only: either of the two
NVFP4 = "svdquant_nvfp4"
AWQ = "awq_w4a16"
GROUP_SIZES = {SVDQUANT: GROUP_SIZE, SVDQUANT_SPLIT: GROUP_SIZE, SVDQUANT_INT8_SCALE: GROUP_SIZE, NVFP4: NVFP4_GROUP, AWQ: GROUP_SIZE}

QUANT_KEY = "comfy_quant"


@dataclass(frozen=True)
class LayerSpec:
    """What one packed layer is.

    unsigned_from: the first column that is coded unsigned; in_features if none is. scale_blocks: B, of NVFP4's
    second scale.
    """

    format: str
    in_features: int
    out_features: int
    rank: int = 0
    unsigned_from: int = -1
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16  # of the scales (not NVFP4's), the branch, the smoothing factor and the bias
    scale_blocks: int = 1

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

    @property
    def group_size(self):
        """Columns that share one scale."""
        return GROUP_SIZES[self.format]

    def tensors(self):
        """{parameter name: (shape, dtype)} of the module's parameters, which are also the file's tensors, but for int8 scales."""
        n, k, groups = self.out_features, self.in_features, self.in_features // self.group_size
        scale_dtype = torch.float8_e4m3fn if self.format == NVFP4 else self.dtype
        tensors = {"weight": ((n, k // 2), torch.int8), "weight_scale": ((groups, n), scale_dtype)}
        if self.format == NVFP4:
            tensors["weight_scale_2"] = ((self.scale_blocks, n), torch.float32)
        if self.format == AWQ:
            tensors["weight_zeros"] = ((groups, n), self.dtype)
        else:
            tensors["weight_proj_down"] = ((k, self.rank), self.dtype)
            tensors["weight_proj_up"] = ((n, self.rank), self.dtype)
            tensors["weight_smooth_factor"] = ((k,), self.dtype)
        if self.bias:
            tensors["bias"] = ((n,), self.dtype)
        return tensors

    def stored(self, int8_scale):
        """tensors, as a file has them. int8_scale: whether as svdquant_w4a4_int8_scale."""
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
        if int8_scale:
            conf["format"] = SVDQUANT_INT8_SCALE
        if int8_scale or self.format == SVDQUANT_SPLIT:
            conf["act_unsigned_from"] = self.unsigned_from
        return conf


def svdquant_spec(in_features, out_features, rank, unsigned_from, bias, dtype):
    """The LayerSpec of a W4A4 layer; picks the format name that says what a reader must know."""
    split = 0 < unsigned_from < in_features
    return LayerSpec(SVDQUANT_SPLIT if split else SVDQUANT, in_features, out_features, rank, unsigned_from, bias, dtype)


def layer_spec(layer, name, weight_shape, rank, bias, dtype):
    """LayerSpec of linear `name` from its family's Layer and its weight's (N, K); rank: of its branch, if it has one; bias: whether it
    has one. Raises ValueError naming the layer where K does not fit."""
    n, k = weight_shape
    try:
        if layer.packing is Packing.W4A16:
            return LayerSpec(AWQ, k, n, bias=bias, dtype=dtype)
        return svdquant_spec(k, n, rank, layer.unsigned_from(k, n), bias, dtype)
    except ValueError as error:
        raise ValueError(f"Layer {name} {error}, so it can't be packed in 4 bits.") from None


def encode_conf(conf):
    """A JSON object as the uint8 tensor that ComfyUI stores under `X.comfy_quant`."""
    return torch.tensor(list(json.dumps(conf).encode("utf-8")), dtype=torch.uint8)


def decode_conf(data):
    """bytes of `X.comfy_quant` -> dict. Raises ValueError where it is not a JSON object."""
    try:
        conf = json.loads(bytes(data).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(conf, dict):
        raise ValueError("is not a JSON object")
    return conf
