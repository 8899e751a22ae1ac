"""Small random models of architectures that the pack has no family for, in a real ComfyUI: the shapes are those of ComfyUI's own model."""

from dataclasses import dataclass
from importlib.util import find_spec

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.supported_models
import torch
from comfyui_svdquant.quant.host import quantize
from comfyui_svdquant.quant.quantizer import presets
from safetensors.torch import save_file

from .comfy_models import Progress


@dataclass(frozen=True)
class Undeclared:
    """title: of ComfyUI's configuration class; config: ComfyUI's configuration; latent: shape of an empty latent; width: of a prompt;
    detected: whether ComfyUI's detection finds this configuration in a file, which it does for models of the published sizes only where
    it knows them by a width."""

    title: str
    config: dict
    latent: tuple
    width: int
    detected: bool = True

    def __str__(self):
        return self.title

    def model(self):
        """ComfyUI's BaseModel of these sizes in bf16, on the meta device. It computes in ComfyUI's choice of a type."""
        host, device = getattr(comfy.supported_models, self.title)(dict(self.config)), comfy.model_management.get_torch_device()
        host.set_inference_dtype(torch.bfloat16, comfy.model_management.unet_manual_cast(torch.bfloat16, device,
                                                                                         host.supported_inference_dtypes))
        return host.get_model({}, "", device=torch.device("meta"))

    def load(self, folder):
        """A random model of these sizes, in 16 bits."""
        model, g = self.model(), torch.Generator().manual_seed(0)
        tensors = {name: _random(name, tensor.shape, g).bfloat16() for name, tensor in model.diffusion_model.state_dict().items()}
        if self.detected:
            save_file(tensors, folder / "model.safetensors")
            return comfy.sd.load_diffusion_model(str(folder / "model.safetensors"))
        model.diffusion_model.load_state_dict(tensors, assign=True)
        device = comfy.model_management.get_torch_device()
        return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())

    def prompts(self, count=2):
        g = torch.Generator().manual_seed(1)
        return [[torch.randn(1, 24, self.width, generator=g), {"pooled_output": None}] for _ in range(count)]

    def sample(self, patcher, steps=2):
        cond, empty = self.prompts(1), torch.zeros(self.latent)
        return comfy.sample.sample(patcher, comfy.sample.prepare_noise(empty, 5), steps, 1.0, "euler", "simple", cond, cond, empty,
                                   disable_pbar=True, seed=5)

    def quantized(self, patcher, preset="fast", progress=None, folder=None):
        """(the model in 4 bits, its records)."""
        return quantize.quantize(patcher, presets.make_recipe(preset, 16), self.prompts(), {"samples": torch.zeros(self.latent)}, 2, 0,
                                 progress or Progress(), folder)


def _random(name, shape, g):
    if len(shape) in (2, 5):
        return torch.randn(shape, generator=g) / shape[1:].numel() ** 0.5
    small = name.endswith((".bias", "modulation", ".lin", "mod.lin"))
    return torch.randn(shape, generator=g) * 0.1 + (0 if small else 1)


# The text's layers come first there: two of its blocks read each of the text encoder's layers, two the tokens.
KREA2 = Undeclared("Krea2", {"image_model": "krea2", "features": 256, "channels": 16, "patch": 2, "layers": 2, "heads": 2, "kvheads": 1,
                             "txtlayers": 2, "txtdim": 320}, (1, 16, 12, 12), 2 * 320)
WAN = Undeclared("WAN21_T2V", {"image_model": "wan2.1", "model_type": "t2v", "dim": 256, "out_dim": 16, "num_heads": 2, "ffn_dim": 512,
                               "num_layers": 2, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True,
                               "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": 4096}, (1, 16, 2, 12, 12), 4096)
# Refiners of the text and of the image run side by side; each block has a modulation of its own.
LUMINA2 = Undeclared("Lumina2", {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 128,
                                 "n_layers": 2, "qk_norm": True, "n_heads": 2, "n_kv_heads": 1, "axes_dims": [32, 48, 48],
                                 "axes_lens": [300, 512, 512], "rope_theta": 10000.0, "ffn_dim_multiplier": 4.0},
                     (1, 16, 12, 12), 128, detected=False)
MODELS = [WAN, LUMINA2, *([KREA2] if find_spec("comfy.ldm.krea2") else [])]  # only newer ComfyUI has Krea 2
