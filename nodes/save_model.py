"""SVDQuant Save Model: saves a quantized MODEL to a file."""

from comfy_api.latest import io

from ..quant.checkpoint import formats
from ..quant.host import saving, written
from .checked import check_types, checked, choose
from .newer import CATEGORY, SEARCH
from .progress import NodeProgress


class SVDQuantSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantSaveModel",
            display_name="SVDQuant Save Model",
            category=CATEGORY,
            **SEARCH,
            description="Saves a quantized model to models/diffusion_models, in this pack's layout or, for FLUX.1, in "
                        "Nunchaku's.",
            inputs=[
                # Lazy, so that check_lazy_status runs before the quantization.
                io.Model.Input("model", lazy=True, tooltip="The quantized model from SVDQuant Quantize Model."),
                io.String.Input("filename", default="model_svdquant",
                                tooltip="The name of the file in models/diffusion_models, with an optional subfolder. It may have the "
                                        "tokens of Save Image, such as %date:yyyy-MM-dd% or %KSampler.seed%."),
                io.Boolean.Input("overwrite", default=False,
                                 tooltip="Replace an existing quantized model of the same name; other files are never replaced. When "
                                         "off, an existing file is kept and the node stops with an error."),
                io.Combo.Input("layout", options=list(formats.WRITERS), default="native", optional=True,
                               tooltip="native: this pack's layout, which stores every model exactly. nunchaku: FLUX.1 only, for "
                                       "software that reads Nunchaku's INT4 files; all layers have to be in 4 bits."),
                io.Boolean.Input("numbered", default=False, optional=True,
                                 tooltip="If the name is taken and overwrite is off, add the next free number to it, as in "
                                         "model_svdquant_00001_, instead of stopping with an error."),
            ],
            # Not io.Combo.Output: its type is its list of options, which no V3 combo input accepts.
            outputs=[io.Custom("COMBO").Output(display_name="model_name",
                                               tooltip="The saved file's name, for model_name of SVDQuant Load Model.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, filename=None, overwrite=False, layout="native", numbered=False):
        return written.fingerprint_of_filename(filename)

    @classmethod
    def validate_inputs(cls, filename=None, overwrite=None, numbered=False):
        return checked(cls, saving.check_name, filename, overwrite, numbered)

    @classmethod
    def check_lazy_status(cls, filename, overwrite, layout="native", numbered=False, model=None):
        """Checks once more, before the model is quantized, what validate_inputs could not know: the value of a linked input, and whether
        ComfyUI's cache has this node's result, whose file then exists by right."""
        if model is None:
            with NodeProgress.of(cls):
                check_types(cls, filename=filename, overwrite=overwrite, numbered=numbered)
                choose("layout", layout, formats.WRITERS)
                saving.check_target(*saving.free_path(filename, overwrite, numbered), overwrite)
        return ["model"]

    @classmethod
    def execute(cls, model, filename, overwrite, layout="native", numbered=False):
        with NodeProgress.of(cls) as shown:
            check_types(cls, filename=filename, overwrite=overwrite, numbered=numbered)
            choose("layout", layout, formats.WRITERS)
            name = saving.save_model(model, filename, layout, overwrite, numbered)
            shown.say(saving.summary(name, layout))
            return io.NodeOutput(name)
