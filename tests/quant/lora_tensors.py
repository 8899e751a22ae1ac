"""Helpers for the tests of LoRAs: random LoRAs for the small FLUX, and the weight of a layer that carries them."""

import copy

import comfy.lora
import comfy.model_management
import comfy.sd
import torch
from comfyui_svdquant.cuda import reference
from comfyui_svdquant.quant.quantizer.metrics import relative_error

RANK = 4
LINEAR1, LINEAR2, QKV, FC1, FC2, MOD = ("single_blocks.0.linear1", "single_blocks.0.linear2", "double_blocks.0.img_attn.qkv",
                                        "double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.2", "double_blocks.0.img_mod.lin")
ROUNDING = 0.005  # relative rounding error of two bf16 factors
MARGIN = 1.15
BF16_OUTPUT = 2**-8  # relative rounding error of an output, and of what a kernel rounds on the way to it


def shapes(patcher):
    """{layer name: (N, K)} of the layers that are packed in a quantized model."""
    return {name: (layer.out_features, layer.in_features) for name, layer in patcher.packed_layers().items()}


def random(*shape, seed=0):
    # Each shape and side has its own seed, so that no two factors of a LoRA are equal.
    g = torch.Generator().manual_seed(hash((shape, seed)) % 2**31)
    return torch.randn(*shape, generator=g)


def factors(n, k, seed=0, rank=RANK, size=0.25):
    """(up, down) whose product is `size` times as large as the weights of flux_tensors."""
    return random(n, rank, seed=seed) * size / rank**0.5, random(rank, k, seed=seed + 1) / k**0.5


def named(prefix, n, k, seed=0, up="lora_up.weight", down="lora_down.weight", alpha=None, **options):
    tensors = dict(zip((f"{prefix}.{up}", f"{prefix}.{down}"), (t.contiguous() for t in factors(n, k, seed, **options))))
    if alpha is not None:
        tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha))
    return tensors


def generic(*layers, alpha=None, **options):
    """A LoRA in ComfyUI's plain naming; layers: (name, (n, k))."""
    tensors = {}
    for seed, (name, (n, k)) in enumerate(layers):
        tensors |= named(f"diffusion_model.{name}", n, k, 10 * seed, alpha=alpha, **options)
    return tensors


def load_lora(patcher, tensors, strength=1.0):
    """Add a LoRA as LoraLoader and LoraLoaderModelOnly do."""
    return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]


def loaded(patcher):
    """The patcher, with its patches on the model."""
    patcher.unpatch_model(patcher.offload_device)
    patcher.patch_model(patcher.load_device)
    return patcher


def without_gelu(patcher):
    """The patcher with linear packed layers: none applies a GELU to its output."""
    for layer in patcher.packed_layers().values():
        layer.gelu_from = None
    return patcher


def layer_of(patcher, name):
    return patcher.packed_layers()[name]


def output(patcher, name, x):
    """A layer's output of x on the patcher's device, on the CPU."""
    return layer_of(patcher, name)(x.to(patcher.load_device)).cpu()


def rounding(y):
    """The norm of the rounding errors of a layer's output y: the kernels of a GPU compute in 16 bits, the CPU in 32."""
    return BF16_OUTPUT * float(y.norm()) if comfy.model_management.get_torch_device().type == "cuda" else 0.0


def margin():
    """How many times as far from the 16-bit model's picture as without a LoRA one with a LoRA may be. On a GPU both models compute in
    bf16, which rounds both pictures, and 8-bit activations leave less of a distance to compare with."""
    return 1.3 if comfy.model_management.get_torch_device().type == "cuda" else MARGIN


def lora_weight(branch, n):
    """(n, K) float32: the weight that a LoRA branch's joined LoRAs stand for."""
    down, up = branch.lora_down[branch.own:].cpu().float(), branch.lora_up.cpu().float()
    return reference.lora_product(torch.eye(down.shape[1]), down, up, branch.lora_strength.cpu(), branch.lora, n).t()


def effective(layer):
    """(N, K) float32: a layer's effective weight, including its LoRA branch."""
    weight = layer.dense("cpu")
    if layer.lora_branch is None:
        return weight
    if layer.lora_branch.gain is not None:
        weight = weight * layer.lora_branch.gain[:, None].cpu()
    if layer.lora_branch.lora_up is not None:
        weight += lora_weight(layer.lora_branch, weight.shape[0])
    for term in layer.lora_branch.terms:
        weight[slice(*term.rows), slice(*term.cols)] += copy.deepcopy(term).float().dense("cpu")
    return weight


def change(patcher, name):
    """(relative error of the change of the layer's weight to ComfyUI's own dense arithmetic, the dense change)."""
    layer, key = layer_of(patcher, name), f"diffusion_model.{name}.weight"
    dense = layer.dense("cpu")
    exact = comfy.lora.calculate_weight(patcher.patches[key], dense.clone(), key) - dense
    return relative_error(effective(layer) - dense, exact), exact
