"""Comparison of the fused forwards of a model's blocks with the host's own.

Path switches the fused forwards on and off, and counts their calls. On the CPU, which has no kernels, they run block_ops' reference. The
models there compute in float32, without the rounding of activations to codes, where another order of a sum can have another code: then the
two paths differ by float32's rounding alone. On a GPU the kernels run, in bf16.
"""

import comfy.sample
import torch
from comfyui_svdquant.cuda import reference
from comfyui_svdquant.cuda.int4 import GELU_SHIFT
from comfyui_svdquant.quant.host import fused_blocks
from comfyui_svdquant.quant.quantizer.metrics import relative_error

from .comfy_models import CONTEXT, POOLED
from .lora_tensors import generic, load_lora, shapes

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
BOUND = 0.1 if GPU else 2e-5  # relative, of the latents; in bf16 the host rounds after each of some ten passes
PLAIN, HALF, FUSED = 0.0, 0.5, 1.0  # share of the calls of blocks that run fused; the model has one block of each kind, or two of one


class Path:
    """on: whether the fused forwards run. fused, calls: calls of blocks so far; passes: calls of modulate's passes."""

    def __init__(self, monkeypatch, *patchers):
        self.on, self.fused, self.calls, self.passes = True, 0, 0, 0
        block_ops = fused_blocks.block_ops
        join, modulated, has_kernels = block_ops.qk_norm_rope, block_ops._modulated, block_ops.takes

        def counted(streams, *args):
            self.fused += 1
            rows = [x for source, *_ in streams for x in ([source] if isinstance(source, torch.Tensor) else source)]
            assert {x.dtype for x in rows} == {DTYPE}, "the kernels read no other"
            return join(streams, *args)

        def checked(x, y, *args):
            self.passes += 1
            assert y is None or y.dtype == x.dtype, "the kernels read no other"
            return modulated(x, y, *args)

        def count(*_):
            self.calls += 1

        monkeypatch.setattr(block_ops, "takes", lambda dtype, device: self.on and (not GPU or has_kernels(dtype, device)))
        monkeypatch.setattr(block_ops, "qk_norm_rope", counted)
        monkeypatch.setattr(block_ops, "_modulated", checked)
        for patcher in patchers:
            model = patcher.model.diffusion_model
            for block in (block for block in model.modules() if isinstance(block, fused_blocks._Fused)):
                fused_blocks.agrees(*fused_blocks.kind(block), DTYPE, patcher.load_device)
                block.register_forward_pre_hook(count)

    def share(self, on, draw):
        """(what draw() returns, the share of the calls of blocks that ran fused)"""
        self.on, self.fused, self.calls = on, 0, 0
        result = draw()
        return result, self.fused / self.calls


def smoothed(x, smooth, unsigned_from, act_bits=4, dtype=torch.float32):
    """In place of reference.quantize_activation: the activations without rounding, and scales of 1."""
    shifted = x.to(dtype, copy=True)
    shifted[:, unsigned_from:] += GELU_SHIFT
    return shifted / smooth.to(dtype), torch.ones(x.shape[0], x.shape[1] // reference.GROUP_SIZE, dtype=dtype)


def prompt(tokens=12, seed=1, **extras):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, CONTEXT, generator=g), {"pooled_output": torch.randn(1, POOLED, generator=g), **extras}]]


def draw(patcher, positive=None, negative=None, cfg=1.0, steps=2, size=(8, 8), batch=1, mask=None, channels=16):
    latent = torch.zeros(batch, channels, *size)
    return comfy.sample.sample(patcher, comfy.sample.prepare_noise(latent, 5), steps, cfg, "euler", "simple", positive or prompt(),
                               negative or prompt(seed=2), latent, noise_mask=mask, disable_pbar=True, seed=5)


def compared(path, model, monkeypatch, case, share):
    """The latents of a case, case(patcher, monkeypatch) -> (patcher, options of draw), on the plain path, and their steps."""
    def run():
        with monkeypatch.context() as patch:
            patcher, options = case(model, patch)
            return draw(patcher, **options), options.get("steps", 2)

    (exact, steps), none = path.share(False, run)
    (estimate, _), found = path.share(True, run)
    assert (none, found) == (0, share)
    assert torch.isfinite(exact).all() and relative_error(estimate, exact) < BOUND
    return exact, steps


def single(patcher):
    return patcher.model.diffusion_model.single_blocks[0]


# --- what some of the tests do to a model ------------------------------------------------------------------------------


def options_of(patcher, **options):
    patched = patcher.clone()
    patched.model_options["transformer_options"] |= options
    return patched


def other_attention(q, k, v, heads, mask=None, **_):
    """As SageAttention: one's own function for (B, heads, L, D), here at another temperature."""
    return torch.nn.functional.scaled_dot_product_attention(2 * q, k, v, mask).transpose(1, 2).flatten(2)


def overridden(patcher, _):
    return options_of(patcher, optimized_attention_override=lambda func, *args, **kwargs: other_attention(*args)), {}


def lora(patcher, _):
    return load_lora(patcher, generic(*shapes(patcher).items()), 0.7), {}
