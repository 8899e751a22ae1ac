"""Every kernel that a GPU may compile, found through choose(), so that the tests cover all of them."""

from comfyui_svdquant.cuda import (
    awq,
    block_ops,
    expand_branch,
    gemm_mma,
    gemm_wgmma,
    gptq,
    group_error,
    mlp,
    put,
    quantize_activation,
    rms_ops,
)
from comfyui_svdquant.cuda.choose import MLP, Layer, choose
from comfyui_svdquant.cuda.operands import NO_LORA, LoRASizes

# (M, N, K): FLUX's at 1024 x 1024, some with fewer tokens, and some with few columns.
SHAPES = ((512, 3072, 3072), (1024, 3072, 3072), (4096, 3072, 3072), (4608, 3072, 3072), (512, 3072, 12288), (4096, 3072, 12288),
          (4608, 3072, 15360), (300, 3072, 192), (9000, 3072, 1536))
SMS = 132
RANKS = (0, 32, 64, 96, 128)  # those of one layer, and of up to four that share an input


def linear_choices(target):
    """[(LoRASizes, dtype, LinearKernels)] that represent all choices for SVDQuant layers on a Target: without a LoRA and with one, both
    widths of codes, and layers of two parts whose border lies between two blocks of columns or within one."""
    return [(lora, dtype, choose(Layer(m, n, k, rank, unsigned_from, act_bits, dtype, None, lora), target, SMS))
            for lora in (NO_LORA, LoRASizes((16,))) for dtype in target.dtypes for act_bits in (8, 4) for rank in RANKS
            for m, n, k in SHAPES for unsigned_from in (k, 64)]


def mlp_choice(target):
    dtype = target.dtypes[0]
    return choose(MLP(Layer(4096, 12288, 3072, 32, 3072, 4, dtype, 0), Layer(4096, 3072, 12288, 32, 0, 4, dtype)), target, SMS)


def variants(target):
    """{kernel: [(source, entry, defines)]}, with every tile of each kernel that choose() returns: the tile depends on a layer's size."""
    chosen, fused = linear_choices(target), mlp_choice(target)
    by_mma = sorted({kernels.storage for *_, kernels in chosen if not kernels.wgmma})
    quantize = [quantize_activation.variant(dtype, kernels.storage, kernels.plans[0], bool(lora.ranks)) for lora, dtype, kernels in chosen]
    return {
        "awq": awq.variants(target), **block_ops.variants(target), **rms_ops.variants(target),
        "expand_branch": expand_branch.variants(target), "gptq": gptq.variants(), "group_error": group_error.variants(),
        "put": put.variants(),
        "gemm_mma": [variant for storage in by_mma for variant in gemm_mma.variants(storage, target)],
        "gemm_wgmma": gemm_wgmma.variants() if any(kernels.wgmma for *_, kernels in chosen) else [],
        "mlp": [] if fused is None else mlp.variants(fused.storage, target),
        "quantize": list(dict.fromkeys(quantize)),
    }
