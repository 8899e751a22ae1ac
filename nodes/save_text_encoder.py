"""SVDQuant Save Text Encoder: saves the quantized text encoders of a CLIP to files."""

from comfy_api.latest import io

from ..quant.host import clip_saving, written
from .checked import check_types, checked
from .newer import CATEGORY, SEARCH
from .progress import NodeProgress
from .quantize_text_encoder import CLIP_ALIASES


class SVDQuantSaveTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantSaveTextEncoder",
            display_name="SVDQuant Save Text Encoder",
            category=CATEGORY,
            description="Saves the quantized text encoders of a CLIP to models/text_encoders, one file each. Encoders that stayed in 16 "
                        "bits are not saved.",
            inputs=[
                # Lazy, so that check_lazy_status runs before the quantization.
                io.Clip.Input("clip", lazy=True, tooltip="The quantized CLIP from SVDQuant Quantize Text Encoder."),
                io.String.Input("filename", default="text_encoder_svdquant",
                                tooltip="The name of the file in models/text_encoders, with an optional subfolder and the tokens of Save "
                                        "Image, such as %date:yyyy-MM-dd%. Several quantized encoders get a file each, with _ and the "
                                        "encoder's name added."),
                io.Boolean.Input("overwrite", default=False,
                                 tooltip="Replace an existing quantized text encoder of the same name; other files are never replaced. "
                                         "When off, an existing file is kept and the node stops with an error."),
            ],
            # Not io.Combo.Output: its type is its list of options, which no V3 combo input accepts.
            outputs=[io.Custom("COMBO").Output(display_name="clip_name", tooltip="The saved file's name, for SVDQuant Load Text Encoder; "
                                                                                 "of several, the first.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **({"search_aliases": CLIP_ALIASES} if SEARCH else {}),
        )

    @classmethod
    def fingerprint_inputs(cls, clip=None, filename=None, overwrite=False):
        return written.fingerprint_of_filename(filename, clip_saving.KIND)

    @classmethod
    def validate_inputs(cls, filename=None, overwrite=None):
        return checked(cls, clip_saving.check_name, filename, overwrite)

    @classmethod
    def check_lazy_status(cls, filename, overwrite, clip=None):
        """Checks once more, before the CLIP is quantized, what validate_inputs could not know: the value of a linked input."""
        if clip is None:
            with NodeProgress.of(cls):
                check_types(cls, filename=filename, overwrite=overwrite)
                clip_saving.check_name(filename, overwrite)
        return ["clip"]

    @classmethod
    def execute(cls, clip, filename, overwrite):
        with NodeProgress.of(cls) as shown:
            check_types(cls, filename=filename, overwrite=overwrite)
            names = clip_saving.save(clip, filename, overwrite)
            shown.say(clip_saving.summary(names))
            return io.NodeOutput(names[0])
