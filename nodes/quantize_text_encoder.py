"""SVDQuant Quantize Text Encoder: quantizes the text encoders of a CLIP to 4 bits in the graph."""

from comfy_api.latest import io

from ..quant.host.clip_quantize import quantize
from .checked import check_types, choose
from .exceptions import exceptions_input
from .newer import ALIASES, CATEGORY, SEARCH
from .progress import NodeProgress

ENCODERS = {"large": False, "all": True}
CLIP_ALIASES = [*ALIASES, "clip", "t5", "text encoder", "qwen", "mistral", "gemma"]


class SVDQuantQuantizeTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantQuantizeTextEncoder",
            display_name="SVDQuant Quantize Text Encoder",
            category=CATEGORY,
            description="Quantizes the text encoders of a CLIP: 4-bit weights with 16-bit activations, and 8-bit embeddings. It needs no "
                        "prompts and takes seconds on a GPU. LoRAs on the CLIP are baked in.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders in bf16, fp16, fp8 or fp32, with any LoRAs to bake in."),
                io.Combo.Input("encoders", options=list(ENCODERS), default="large",
                               tooltip="large: encoders of a billion parameters or more, such as T5-XXL, Qwen, Mistral and Gemma. all: "
                                       "small ones too, such as CLIP-L and CLIP-G, which saves little and changes images more."),
                exceptions_input("t5xxl.encoder.block.0.* or *.wo"),
            ],
            outputs=[
                io.Clip.Output(display_name="CLIP", tooltip="The quantized text encoders, for text encode nodes, Load LoRA and SVDQuant "
                                                            "Save Text Encoder."),
                io.String.Output(display_name="report", tooltip="What was packed and what stays in 16 bits, the errors of the weights and "
                                                                "the size, as text."),
            ],
            hidden=[io.Hidden.unique_id],
            **({"search_aliases": CLIP_ALIASES} if SEARCH else {}),
        )

    @classmethod
    def execute(cls, clip, encoders, exceptions=""):
        with NodeProgress.of(cls) as shown:
            check_types(cls, clip=clip, encoders=encoders, exceptions=exceptions)
            quantized, report, size = quantize(clip, choose("encoders", encoders, ENCODERS), exceptions, shown)
            shown.say(size)
            return io.NodeOutput(quantized, report)
