"""The int8 GEMM of Hopper: chooses the tile, launches kernels/gemm_wgmma.cu."""

import torch

from . import compiler, images

ARCHITECTURES = ("sm_90a",)
SOURCE, ENTRY = "gemm_wgmma.cu", "gemm"
ROWS = 192  # weight rows of a tile
CLUSTER = 2  # CTAs that share their tokens
STAGES = {192: 5, 128: 6, 64: 8}  # tokens of a tile -> stages of its ring, as many as fit


def _defines(tokens, dtype, cluster=CLUSTER):
    return (("HALF", int(dtype == torch.float16)), ("TOKENS", tokens), ("STAGES", STAGES[tokens]), ("CLUSTER", cluster))


def variants(arch):
    """[(source, entry, defines)] of all that may be asked for on `arch`."""
    if arch not in ARCHITECTURES:
        return []
    return [(SOURCE, ENTRY, _defines(tokens, dtype)) for tokens in STAGES for dtype in (torch.bfloat16, torch.float16)]


def shared_bytes(tokens):
    """Shared memory of a CTA: the ring, the turned outputs, the tokens' and rows' factors, the barriers (see the kernel)."""
    ring = STAGES[tokens] * (tokens * 128 + ROWS * 64 + 1024)
    warpgroups = ROWS // 64
    return ring + warpgroups * 2 * 32 * 128 + warpgroups * (3 * tokens + 64) * 4 + 16 * STAGES[tokens]


def tile_tokens(m, n, k, sms):
    """Tokens of a tile: fewest clocks, counted as waves of clusters times the clocks of a tile.

    A block of 128 columns takes 192 * 128 / 4096 = 6 clocks a token; the end of a tile about 12 a token and 1500.
    """
    def clocks(tokens):
        tiles = -(-m // tokens) * -(-n // (ROWS * CLUSTER))
        return -(-tiles // (sms // CLUSTER)) * (tokens * (6 * -(-k // images.BLOCK) + 12) + 1500)

    return min(STAGES, key=clocks)


def gemm(act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up, bias, unsigned_from, m, out=None, tokens=None):
    """y (m, N) in weight_scale's dtype.

    act: (blocks, padded m, 128) int8 in INTEGER order; act_scale: (2, padded m) float32; low, low_scale: the branch's image and its
    rows' factors, or None; weight: (N, K/2); weight_scale: (G, N); row_scale: (N,) float32 (scales.py); proj_up: (N, R);
    bias: (N,) or None. tokens: the tile's, in place of the chosen one.
    """
    n, k, rank = weight.shape[0], 2 * weight.shape[1], proj_up.shape[1]
    y = torch.empty(m, n, dtype=weight_scale.dtype, device=act.device) if out is None else out
    sms = torch.cuda.get_device_properties(act.device).multi_processor_count
    tokens = tokens or tile_tokens(m, n, k, sms)
    kernel = compiler.kernel(SOURCE, ENTRY, _defines(tokens, y.dtype), act.device, shared_bytes(tokens))
    clusters = min(sms // CLUSTER, -(-m // tokens) * -(-n // (ROWS * CLUSTER)))
    border = unsigned_from // images.BLOCK if 0 < unsigned_from < k else 0
    kernel((CLUSTER * clusters, 1, 1), (ROWS * 2 + 128, 1, 1), y, act, act_scale, low, low_scale, weight, weight_scale, row_scale, proj_up,
           bias, m, act.shape[1], n, k, rank, border, int(unsigned_from < k))
    return y
