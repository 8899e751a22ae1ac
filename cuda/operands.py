"""The operands of an SVDQuant layer."""

from typing import NamedTuple, Optional

from torch import Tensor

# The rows of a part are a multiple of this, which is a multiple of the weight rows of each GEMM's tiles, and of pairs of Hopper's: so no
# tile has rows of two parts.
PART_ROWS = 768
RANK_STEP = 8       # ranks of a part are a multiple of this: 16 bytes
CODES_STEP = 16     # ranks of a branch in 8 bits are a multiple of this: 16 bytes
MAX_PARTS, MAX_PART_RANK = 7, 255 * RANK_STEP  # limits for several parts: the kernels take their ranks as bytes of one 64-bit number


class LoRASizes(NamedTuple):
    """The sizes of the LoRA factors that a layer adds to its own low-rank branch.

    The output rows may have parts, such as the q, k and v of a joined linear, each with ranks of its own. For part p, whose rows of
    lora_down follow those of the parts before it, and whose (rows of p, ranks of p) matrix follows theirs in lora_up:

        rows of p of y += (x @ rows of p of lora_down^T * ranks of p of lora_strength) @ matrix of p of lora_up^T
    """

    ranks: tuple = ()   # the ranks of each part, multiples of RANK_STEP; (): no LoRA
    part_rows: int = 0  # rows of each part but the last, which has the rest: a multiple of PART_ROWS; 0: there is one part

    @property
    def arguments(self):
        """The kernels' arguments: LoraRanks of lora.cuh."""
        eighths = sum(rank // RANK_STEP << 8 * part for part, rank in enumerate(self.ranks))
        return eighths, max(1, len(self.ranks)), self.part_rows

    def blocks(self, block):
        """The number of blocks of `block` ranks, where each part begins with a new one."""
        return sum(-(-rank // block) for rank in self.ranks)

    def rows(self, n):
        """(first row, last row + 1) of each part, of n rows."""
        last = len(self.ranks) - 1
        return [(part * self.part_rows, n if part == last else (part + 1) * self.part_rows) for part in range(last + 1)]


NO_LORA = LoRASizes()


class LayerOperands(NamedTuple):
    """A layer's tensors and constants: everything it computes with besides its input x (..., K).

    N outputs, R the rank, G = K / 64 groups. The float tensors are 16-bit and share a dtype. With a proj_scale the low-rank branch is in
    8 bits: proj_down and proj_up are int8 codes, contiguous, and R is a multiple of CODES_STEP. The ops expand it (expand_branch.py).
    """

    weight: Tensor                       # (N, K/2) int8, packed 4-bit codes (int4.py)
    weight_scale: Tensor                 # (G, N)
    proj_down: Tensor                    # (K, R)
    proj_up: Tensor                      # (N, R)
    smooth: Tensor                       # (K,), the divisor of x
    bias: Optional[Tensor]               # (N,)
    unsigned_from: int                   # first column of x that is a GELU's output; K if there is none
    act_bits: int = 4                    # bits of the activation's codes: 4 or 8
    row_scale: Optional[Tensor] = None   # (N,) float32, from row_scales.row_scale; the kernels need it for act_bits 8
    gelu_from: Optional[int] = None      # first output column to which the layer itself applies GELU; None if there is none
    proj_scale: Optional[Tensor] = None  # (K + N,) bf16, of the rows of proj_down and of proj_up, if these are codes
    lora_down: Optional[Tensor] = None   # (R + sum of the LoRA's ranks, K); the first R rows are proj_down^T, for one product of all
    lora_up: Optional[Tensor] = None     # (sum of each part's rows times its ranks,)
    lora_strength: Optional[Tensor] = None  # (sum of the LoRA's ranks,) float32
    lora: LoRASizes = NO_LORA

    @property
    def tensors(self):
        """The stored tensors but proj_scale: weight, weight_scale, proj_down, proj_up, smooth, bias."""
        return self[:6]

    def flat(self):
        """All fields, those of LoRASizes one by one. A method, and by position: PyTorch 2.5's torch.compile can't unpack a property of a
        named tuple."""
        return *tuple(self)[:-1], *self[-1]
