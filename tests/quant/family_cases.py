"""A small random model of each family beyond FLUX.1, for the tests that every family has to pass in a real ComfyUI."""

from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.sample
import torch
from comfyui_svdquant.quant.families import flux2, qwen_image, z_image
from comfyui_svdquant.quant.families.family import Family
from comfyui_svdquant.quant.host import quantize
from comfyui_svdquant.quant.quantizer import presets

from .comfy_models import Progress
from .random_flux2 import flux2_shapes
from .random_models import random_tensors
from .random_qwen_image import qwen_image_shapes
from .random_z_image import z_image_shapes

HIDDEN, CONTEXT = 256, 128


@dataclass(frozen=True)
class Case:
    """family: the declaration; shapes(): {name: shape} of a small model's file; model_classes: names of the host's classes of the model and
    of its BaseModel; latent: shape of an empty latent; figures: the line on the model's sizes that Inspect prints; loras: {style of keys:
    {key of a layer: (packed layer, its part's (N, K))}}; packed: number of packed layers; newer: styles of keys that older hosts don't
    know; more: other arguments of the diffusion model's forward."""

    family: Family
    shapes: Callable
    model_classes: tuple
    latent: tuple
    figures: str
    loras: dict
    packed: int
    newer: tuple = ()
    more: dict = field(default_factory=dict)

    def __str__(self):
        return self.family.title

    def tensors(self, **changes):
        return random_tensors(self.shapes(**changes))

    def prompts(self, count=2, width=CONTEXT):
        g = torch.Generator().manual_seed(1)
        return [[torch.randn(1, 12, width, generator=g), {"pooled_output": None}] for _ in range(count)]

    def sample(self, patcher, steps=2, cond=None):
        cond, empty = cond or self.prompts(1), torch.zeros(self.latent)
        empty = comfy.sample.fix_empty_latent_channels(patcher, empty)
        return comfy.sample.sample(patcher, comfy.sample.prepare_noise(empty, 5), steps, 1.0, "euler", "simple", cond, cond, empty,
                                   disable_pbar=True, seed=5)

    def quantized(self, patcher, preset="fast", exceptions=""):
        """(the model in 4 bits, its records)."""
        return quantize.quantize(patcher, presets.make_recipe(preset, 16, exceptions), self.prompts(),
                                 {"samples": torch.zeros(self.latent)}, 2, 0, Progress())


FLUX2 = Case(
    flux2.FAMILY, flux2_shapes, ("comfy.ldm.flux.model.Flux", "Flux2"), (1, 128, 6, 6),
    "FLUX.2: 1 double and 2 single blocks, hidden size 256, 128 channels in, with guidance",
    {
        "kohya": {"lora_unet_single_blocks_1_linear2": ("single_blocks.1.linear2", (HIDDEN, 4 * HIDDEN)),
                  "lora_unet_double_blocks_0_img_mlp_0": ("double_blocks.0.img_mlp.0", (6 * HIDDEN, HIDDEN))},
        "ComfyUI": {"diffusion_model.single_blocks.0.linear1": ("single_blocks.0.linear1", (9 * HIDDEN, HIDDEN)),
                    "diffusion_model.double_stream_modulation_img.lin": ("double_stream_modulation_img.lin", (6 * HIDDEN, HIDDEN))},
        "diffusers": {"transformer.transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", (HIDDEN, HIDDEN)),
                      "transformer.transformer_blocks.0.attn.to_add_out": ("double_blocks.0.txt_attn.proj", (HIDDEN, HIDDEN))},
    },
    packed=8 + 2 * 2 + 6)

QWEN_IMAGE = Case(
    qwen_image.FAMILY, qwen_image_shapes, ("comfy.ldm.qwen_image.model.QwenImageTransformer2DModel", "QwenImage"), (1, 16, 12, 12),
    "Qwen-Image: 2 blocks, hidden size 256, 16 channels in",
    {
        "kohya": {"lora_unet_transformer_blocks_1_img_mlp_net_2": ("transformer_blocks.1.img_mlp.net.2", (HIDDEN, 4 * HIDDEN)),
                  "lora_unet_transformer_blocks_0_attn_to_v": ("transformer_blocks.0.attn.to_v", (HIDDEN, HIDDEN))},
        "ComfyUI": {"diffusion_model.transformer_blocks.0.attn.add_k_proj": ("transformer_blocks.0.attn.add_k_proj", (HIDDEN, HIDDEN)),
                    "diffusion_model.transformer_blocks.0.img_mlp.net.0.proj": (
                        "transformer_blocks.0.img_mlp.net.0.proj", (4 * HIDDEN, HIDDEN))},
        "diffusers": {"transformer.transformer_blocks.0.attn.to_out.0": ("transformer_blocks.0.attn.to_out.0", (HIDDEN, HIDDEN)),
                      "transformer.transformer_blocks.1.img_mod.1": ("transformer_blocks.1.img_mod.1", (6 * HIDDEN, HIDDEN))},
        "bare": {"transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_q", (HIDDEN, HIDDEN))},
    },
    packed=2 * 14 + 2)

Z_IMAGE = Case(
    z_image.FAMILY, z_image_shapes, ("comfy.ldm.lumina.model.NextDiT", "Lumina2"), (1, 16, 12, 12),
    "Z-Image: 2 main blocks, 2 refiners of the text and 2 of the image, hidden size 256, 16 channels in",
    {
        "kohya": {"lora_unet_layers_1_feed_forward_w2": ("layers.1.feed_forward.w2", (HIDDEN, 3 * HIDDEN)),
                  "lora_unet_noise_refiner_0_attention_out": ("noise_refiner.0.attention.out", (HIDDEN, HIDDEN))},
        "ComfyUI": {"diffusion_model.layers.0.attention.qkv": ("layers.0.attention.qkv", (3 * HIDDEN, HIDDEN)),
                    "diffusion_model.layers.0.adaLN_modulation.0": ("layers.0.adaLN_modulation.0", (4 * HIDDEN, 256))},
        "diffusers": {"transformer.layers.1.attention.to_k": ("layers.1.attention.qkv", (HIDDEN, HIDDEN)),
                      "transformer.layers.0.attention.to_out.0": ("layers.0.attention.out", (HIDDEN, HIDDEN)),
                      "transformer.layers.0.feed_forward.w1": ("layers.0.feed_forward.w1", (3 * HIDDEN, HIDDEN))},
    },
    packed=2 * 5 + 4 * 6, newer=("diffusers",), more={"num_tokens": 12})

CASES = [FLUX2, QWEN_IMAGE, Z_IMAGE]
