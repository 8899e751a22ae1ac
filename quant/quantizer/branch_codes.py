"""A low-rank branch in 8 bits: a code for each number, and a scale for each row of each factor.

The error of rounding a rank is a fraction of the rank's own size, and the first singular values of a weight are many times the last. So the
ranks are mixed before they are rounded: with an orthogonal matrix Q, up Q (down Q)^T is the same product, and all ranks are of about one
size (the rotations of QuaRot, arXiv 2404.00456, between the factors of a branch). The ranks of a row then can share a scale.

Most directions of the mixed ranks still count little. So a row is rounded rank by rank, and each rank compensates for the errors of those
before it, as columns do in GPTQ (gptq.py): down in the metric of up; then up, fitted anew to the rounded down, in the metric of the
branch's inputs.
"""

import math

import torch

LARGEST = 127  # code
RIDGE = 1e-6   # times the mean diagonal of a Gram matrix of ranks: a rank of zeros becomes one without effect


def coded(up, down, smooth, factor=None):
    """A branch in 8 bits: {parameter name: tensor} as in LayerSpec.tensors.

    up: (N, R), down: (K, R) float32, R >= 1, whose ranks have norms of one size in both; smooth: (K,) float32, the divisor of the branch's
    input x in the metric; factor: gptq.Factor of x / smooth, or None for a metric in which all columns of x / smooth count alike.
    """
    q = mixing(up.shape[1]).to(up.device)
    up, down = up @ q, down @ q
    down_codes, down_scale = _rounded(down, up.t() @ up)
    rounded = down_codes * down_scale.float().unsqueeze(-1)
    before, after = (_weighted(matrix * smooth.unsqueeze(-1), factor) for matrix in (down, rounded))
    gram = after.t() @ after
    # The best up for the rounded down, in the span of the old one's columns.
    up = up @ torch.linalg.solve(_damped(gram), after.double().t() @ before.double()).t().float()
    up_codes, up_scale = _rounded(up, gram)
    return {"weight_proj_down": down_codes, "weight_proj_up": up_codes, "weight_proj_scale": torch.cat((down_scale, up_scale))}


def mixing(rank):
    """An orthogonal (R, R) float32 on the CPU whose entries are of about one size: the Hadamard matrix of the largest power of two that
    divides R, times a discrete cosine transform of the rest."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while rank % (2 * len(hadamard)) == 0:
        hadamard = torch.cat((torch.cat((hadamard, hadamard), dim=1), torch.cat((hadamard, -hadamard), dim=1)))
    rest = rank // len(hadamard)
    k = torch.arange(rest, dtype=torch.float64)
    cosines = torch.cos(math.pi / rest * k.unsqueeze(1) * (k + 0.5)) * (2 / rest)**0.5
    cosines[0] /= 2**0.5
    return torch.kron(hadamard / len(hadamard)**0.5, cosines).float()


def _weighted(down, factor):
    """(K, R) whose inner products are those of the ranks' outputs. down: (K, R), for x / smooth."""
    return down if factor is None else factor.lower.t() @ down[factor.order]


def _damped(gram):
    damped = gram.double()
    damped.diagonal().add_(RIDGE * damped.diagonal().mean() + torch.finfo(torch.float32).tiny)
    return damped


def _rounded(target, gram):
    """(codes (rows, R) int8, scale (rows,) bf16, positive) of a factor (rows, R) float32, where errors e of a row cost e gram e^T: Babai's
    nearest plane, as in gptq.py. A row of zeros has the scale 1."""
    scale = (target.abs().amax(dim=1) / LARGEST).bfloat16()
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    lower, step = torch.linalg.cholesky(_damped(gram)).float(), scale.float()
    ratios = lower / lower.diagonal()  # C_ij / C_jj
    wanted = target.t().contiguous()  # each rank is contiguous; the errors of rounded ranks move the targets of the others
    codes = torch.empty_like(wanted, dtype=torch.int8)
    for r in reversed(range(len(wanted))):
        code = (wanted[r] / step).round_().clamp_(-LARGEST, LARGEST)
        codes[r] = code
        wanted[:r].addr_(ratios[r, :r], target[:, r] - code * step)
    return codes.t().contiguous(), scale
