"""FLUX.1-dev with random weights, on ComfyUI's own classes: with ordinary linears in bf16 or fp8, or with this pack's layers. It is on the
GPU, or on the CPU if there is none."""

import re
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch

DEV = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56],
       "mlp_ratio": 4.0, "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096, "vec_in_dim": 768, "qkv_bias": True,
       "guidance_embed": True, "theta": 10000}
TEXT_TOKENS = 512
NORM = re.compile(r"norm\w*\.(scale|weight)$")  # a norm's own factor
COPY_THREADS = 8
LATENT_CHANNELS, LATENT_PIXELS = 16, 8  # a latent's channels, and the pixels along one side of its elements


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new_flux(operations, device, dtype=torch.bfloat16, **smaller):
    """A Flux without values. smaller: arguments of Flux that replace FLUX.1-dev's."""
    from comfy.ldm.flux.model import Flux, FluxParams

    # Newer ComfyUIs also ask for the position axes that count for the text; FLUX.1 has none.
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}
    return Flux(dtype=dtype, device=device, operations=operations, **DEV | newer | smaller)


def random_(tensor, name, generator=None):
    """Fill a tensor of a model with values that keep activations at ordinary sizes. generator: of the tensor's device, or None for
    PyTorch's own."""
    if tensor.dtype == torch.int8:
        return tensor.copy_(torch.randint(-128, 128, tensor.shape, dtype=torch.int8, device=tensor.device, generator=generator))
    if tensor.is_floating_point() and tensor.itemsize == 1:
        return tensor.copy_(random_(torch.empty_like(tensor, dtype=torch.bfloat16), name, generator))
    if name.endswith("weight_proj_scale"):
        return tensor.fill_(2.0**-12)
    if name.endswith("weight_scale"):
        return tensor.copy_(torch.randint(8, 17, tensor.shape, device=tensor.device, generator=generator) * 2.0**-12)
    if name.endswith("smooth_factor") or NORM.search(name):
        return tensor.fill_(1)
    return tensor.normal_(std=0.002 if name.endswith(("bias", "zeros")) else 0.02, generator=generator)


def random_in_host_memory(shapes):
    """{name: random values in bf16} of {name: shape}, in host memory as after a loader. They are made on the GPU, if there is one, and by
    several threads, because one alone can't write as fast as the GPU sends. The values depend on a tensor's name and shape alone."""
    def made(name):
        generator = torch.Generator(device()).manual_seed(zlib.crc32(name.encode()))
        return random_(torch.empty(shapes[name], dtype=torch.bfloat16, device=device()), name, generator).cpu()

    with ThreadPoolExecutor(COPY_THREADS) as pool:
        found = dict(zip(shapes, pool.map(made, shapes)))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def filled(flux):
    """The Flux with random values, in evaluation mode, as ComfyUI runs it. (In training mode ComfyUI does not multiply in fp8.)"""
    for name, parameter in flux.named_parameters():
        random_(parameter.data, name)
    return flux.eval()


def plain_flux(operations=None, dtype=torch.bfloat16, **smaller):
    """A Flux with ordinary linears. operations: ComfyUI's for `dtype`; None for those of a model that is stored in its compute dtype."""
    import comfy.ops

    return filled(new_flux(operations or comfy.ops.disable_weight_init, device(), dtype, **smaller))


def packed_flux(rank, act_bits=8, fused=False, branch_bits=8, **smaller):
    """A Flux with this pack's layers, prepared as the loader prepares it: threads still compile its kernels. fused: whether its blocks are
    fused and small steps recorded, as the loader makes them; branch_bits: as in LayerSpec."""
    from comfyui_svdquant.quant.families.flux1 import FAMILY
    from comfyui_svdquant.quant.host import build, operations
    from comfyui_svdquant.quant.layers import layout, preparation

    flux = new_flux(operations.Operations, "meta", **smaller)
    shapes = {name: parameter.shape for name, parameter in flux.named_parameters()}
    for name in FAMILY.packed_names(shapes):
        kind = FAMILY.layer(name)
        build.swap(flux, name, layout.spec_of(kind, shapes[f"{name}.weight"], kind.branches * rank, True, torch.bfloat16,
                                              branch_bits=branch_bits))
    build.take_over_activations(FAMILY, flux)
    filled(flux.to_empty(device=device()))
    blocks = []
    if fused:
        from comfyui_svdquant.quant.host import fused_blocks, step_graphs

        fused_blocks.fuse(flux, FAMILY)
        step_graphs.record_steps(flux)
        blocks = fused_blocks.preparations(flux, torch.bfloat16, device())
    preparation.set_act_bits(flux, act_bits)
    preparation.prepare(flux, device())
    preparation.warm_up(flux, device(), torch.bfloat16, preparation.of_other_sizes(FAMILY.tokens), blocks)
    return flux


def wait_for_compilation():
    """Wait for the threads in which a warm-up compiles and tests kernels."""
    for thread in threading.enumerate():
        if thread.name.startswith("svdquant-compiler"):
            thread.join()


def latent_shape(pixels=1024, batch=1):
    """The shape of `batch` latents of `pixels` x `pixels` pixels."""
    return batch, LATENT_CHANNELS, pixels // LATENT_PIXELS, pixels // LATENT_PIXELS


def inputs(pixels=1024, batch=1):
    """The keyword arguments of a forward."""
    def normal(*shape):
        return torch.randn(*shape, device=device()).bfloat16()

    def constant(value):
        return torch.full((batch,), value, device=device()).bfloat16()

    return {"x": normal(*latent_shape(pixels, batch)), "timestep": constant(0.5), "guidance": constant(3.5),
            "context": normal(batch, TEXT_TOKENS, DEV["context_in_dim"]), "y": normal(batch, DEV["vec_in_dim"])}
