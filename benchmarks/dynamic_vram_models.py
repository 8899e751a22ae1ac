"""The models of dynamic_vram.py, and the time of their sampling steps."""

import gc
import os
import sys
import tempfile
import time

import flux_model
import torch
from machine import synchronize

GB = 1 << 30
STEPS, FIRST, RUNS = 8, 2, 3  # a run's steps; the first that is timed, once weights are pinned and their order is known; runs


def patcher(variant, rank, smaller):
    """The patcher of a model in a format of ComfyUI's, in "bf16", or in "4 bits", which this pack's loader would give."""
    if variant == "4 bits":
        import memory_caps

        return memory_caps.packed_patcher(rank, **smaller)
    import comfy.sd
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "flux.safetensors")
        save_file(stored(variant, smaller), path)
        return comfy.sd.load_diffusion_model(path)  # it keeps the file open


def stored(variant, smaller):
    """{name: tensor} of a FLUX.1's file, with the layers in a format of ComfyUI's that are in 4 bits in this pack's files."""
    from comfy import quant_ops
    from comfyui_svdquant.quant.families.flux1 import FAMILY
    from comfyui_svdquant.quant.host.operations import Operations
    from comfyui_svdquant.quant.layers.layout import encode_conf

    shapes = {name: p.shape for name, p in flux_model.new_flux(Operations, "meta", **smaller).named_parameters()}
    packed, tensors = {f"{name}.weight" for name in FAMILY.packed_names(shapes)}, {}
    for name, shape in shapes.items():
        values = flux_model.random_(torch.empty(shape, dtype=torch.bfloat16, device=flux_model.device()), name)
        if variant == "bf16" or name not in packed:
            tensors[name] = values.cpu()
            continue
        weight = quant_ops.QuantizedTensor.from_float(values, quant_ops.QUANT_ALGOS[variant]["comfy_tensor_layout"], scale="recalculate")
        tensors |= {key: tensor.cpu().contiguous() for key, tensor in weight.state_dict(name).items()}
        tensors[f"{name.removesuffix('weight')}comfy_quant"] = encode_conf({"format": variant})
    return tensors


def unload():
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    comfy.model_management.soft_empty_cache()


def measure(patcher, pixels, limit):
    """({"ms": median of the runs' milliseconds a step, "least_ms", "most_ms", "resident_gb": weights on the GPU}, a run's latent).
    limit: called when the model is unloaded, and again when all is measured. Without memory for a run, "ms" is None."""
    unload()
    limit()
    try:
        runs = [run(patcher, pixels) for _ in range(RUNS)]
    except torch.cuda.OutOfMemoryError:
        return {"ms": None, "resident_gb": 0.0}, torch.empty(0)
    times = sorted(ms for ms, _ in runs)
    found = {"ms": times[RUNS // 2], "least_ms": times[0], "most_ms": times[-1], "resident_gb": patcher.loaded_size() / GB}
    return {key: round(number, 3) for key, number in found.items()}, runs[-1][1]


def run(patcher, pixels):
    """(milliseconds of a step, the latent) of a run of ComfyUI's sampler."""
    import comfy.sample

    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, flux_model.TEXT_TOKENS, flux_model.DEV["context_in_dim"], generator=generator)
    pooled = torch.randn(1, flux_model.DEV["vec_in_dim"], generator=generator)
    conditioning = [[context, {"pooled_output": pooled, "guidance": 3.5}]]
    latent, marks = torch.zeros(flux_model.latent_shape(pixels)), []

    def mark(step, *_):
        if step in (FIRST - 1, STEPS - 1):
            synchronize()
            marks.append(time.perf_counter())

    sampled = comfy.sample.sample(patcher, comfy.sample.prepare_noise(latent, 0), STEPS, 1.0, "euler", "simple", conditioning, conditioning,
                                  latent, callback=mark, disable_pbar=True, seed=0)
    end_node()
    return (marks[1] - marks[0]) / (STEPS - FIRST) * 1e3, sampled


def end_node():
    """What ComfyUI does after each node while Dynamic VRAM is on."""
    if getattr(sys.modules.get("comfy.memory_management"), "aimdo_enabled", False):  # older ComfyUIs have no such module
        import comfy.model_management
        import comfy.model_prefetch
        import comfy_aimdo.model_vbar

        comfy.model_management.reset_cast_buffers()
        comfy.model_prefetch.cleanup_prefetch_queues()
        comfy_aimdo.model_vbar.vbars_reset_watermark_limits()
