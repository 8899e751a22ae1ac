"""SVDQuant Load Model: loads a quantized or an ordinary diffusion model from a file."""

import torch
from comfy_api.latest import io

from ..quant import families
from ..quant.host import loader, model_folder, written
from .checked import checked, choose
from .newer import CATEGORY, SEARCH
from .progress import NodeProgress

COMPUTE_DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ACT_BITS = {"auto": 0, "int4": 4, "int8": 8}


class SVDQuantLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantLoadModel",
            display_name="SVDQuant Load Model",
            category=CATEGORY,
            **SEARCH,
            description=f"Loads a {families.TITLES} model: a 4-bit model (from SVDQuant Save Model, in comfy-kitchen's "
                        "svdquant_w4a4 format, or one of Nunchaku's), or an ordinary bf16, fp16 or fp8 model that you want to "
                        "quantize.",
            inputs=[
                io.Combo.Input("model_name", options=model_folder.listed(),
                               tooltip=f"A {families.TITLES} file from models/diffusion_models, or a checkpoint with such a model in it "
                                       "from models/checkpoints."),
                io.Combo.Input("compute_dtype", options=list(COMPUTE_DTYPES), default="auto",
                               tooltip="The precision of everything that is not in 4 bits. auto uses ComfyUI's own choice for your "
                                       "device; fp16 suits GPUs older than the RTX 30 series."),
                io.Combo.Input("activations", options=list(ACT_BITS), default="auto", optional=True,
                               tooltip="The precision of the activations in 4-bit layers. int8 is closer to the 16-bit model's images, "
                                       "int4 is SVDQuant as published; the weights are the same. auto uses the faster one on your GPU: "
                                       "int4 on the RTX 20, 30 and 40 series, int8 on the RTX 50 series, A100, H100 and newer. "
                                       "NVFP4 models always use NVFP4 activations."),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model, for samplers and other model nodes.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name, compute_dtype, activations="auto"):
        return written.state_of(model_folder.find(model_name)) if model_name else None

    @classmethod
    def validate_inputs(cls, model_name=None):
        return checked(cls, loader.check_kind, model_name)

    @classmethod
    def execute(cls, model_name, compute_dtype, activations="auto"):
        with NodeProgress.of(cls) as shown:
            dtype, act_bits = choose("compute_dtype", compute_dtype, COMPUTE_DTYPES), choose("activations", activations, ACT_BITS)
            path = model_folder.existing_path(model_name)
            patcher, summary = loader.load_described(path, dtype, act_bits, model_name)
            shown.say(summary)
            return io.NodeOutput(patcher)
