"""SVDQuant Load Text Encoder: loads text encoders, quantized or in 16 bits, as one CLIP."""

from comfy_api.latest import io

from ..quant.host import clip_folder, clip_loader
from .checked import checked, choose
from .newer import ADVANCED, CATEGORY, SEARCH
from .progress import NodeProgress
from .quantize_text_encoder import CLIP_ALIASES

DEVICES = ("default", "cpu")


class SVDQuantLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = clip_folder.listed()
        return io.Schema(
            node_id="SVDQuantLoadTextEncoder",
            display_name="SVDQuant Load Text Encoder",
            category=CATEGORY,
            description="Loads up to four text encoders as one CLIP: those that SVDQuant Save Text Encoder has saved, and 16-bit ones "
                        "beside them. It takes the files in the order of ComfyUI's own CLIP loaders.",
            inputs=[
                io.Combo.Input("clip_name1", options=names, tooltip="A text encoder from models/text_encoders."),
                io.Combo.Input("type", options=list(clip_loader.types()), default="flux",
                               tooltip="The model that the text encoders are for, as in ComfyUI's CLIP loaders."),
                *(io.Combo.Input(f"clip_name{number}", options=[clip_folder.NONE, *names], default=clip_folder.NONE, optional=True,
                                 tooltip=f"Text encoder {number} of a model that has several, as FLUX.1 has T5-XXL and CLIP-L; none for "
                                         "others.") for number in (2, 3, 4)),
                io.Combo.Input("device", options=list(DEVICES), default="default", optional=True,
                               tooltip="The device that runs the text encoders: default is ComfyUI's choice, and cpu leaves the GPU's "
                                       "memory to the model.", **ADVANCED),
            ],
            outputs=[io.Clip.Output(display_name="CLIP", tooltip="The text encoders, for text encode nodes and Load LoRA.")],
            hidden=[io.Hidden.unique_id],
            **({"search_aliases": CLIP_ALIASES} if SEARCH else {}),
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name1, type, clip_name2=None, clip_name3=None, clip_name4=None, device="default"):
        return clip_folder.states((clip_name1, clip_name2, clip_name3, clip_name4))

    @classmethod
    def validate_inputs(cls, clip_name1=None, clip_name2=None, clip_name3=None, clip_name4=None):
        return checked(cls, clip_folder.check, (clip_name1, clip_name2, clip_name3, clip_name4))

    @classmethod
    def execute(cls, clip_name1, type, clip_name2=None, clip_name3=None, clip_name4=None, device="default"):
        with NodeProgress.of(cls) as shown:
            choose("type", type, clip_loader.types())
            choose("device", device, dict.fromkeys(DEVICES))
            clip, summary = clip_loader.load(clip_folder.paths((clip_name1, clip_name2, clip_name3, clip_name4)), type, device)
            shown.say(summary)
            return io.NodeOutput(clip)
