"""SVDQuant Save Model: a quantized MODEL into a file that anybody can load."""

from comfy_api.latest import io

from ..quant.checkpoint import formats
from ..quant.host import written
from ..quant.host.model_folder import name_in_folder
from ..quant.host.saving import save_model


class SVDQuantSaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantSaveModel",
            display_name="SVDQuant Save Model",
            category="model/svdquant",
            description="Saves a model that SVDQuant Quantize Model made into models/diffusion_models, in our layout or in "
                        "Nunchaku's.",
            inputs=[
                io.Model.Input("model", tooltip="A model from SVDQuant Quantize Model."),
                io.String.Input("filename", default="flux_svdquant",
                                tooltip="Name of the file in models/diffusion_models; a folder may stand before it."),
                io.Boolean.Input("overwrite", default=False,
                                 tooltip="Replace a quantized model of that name; other files are never replaced. Off: another "
                                         "file of that name is left alone and the node stops."),
                io.Combo.Input("layout", options=list(formats.WRITERS), default="native", optional=True,
                               tooltip="native: this pack's, which holds every model exactly. nunchaku: for software that "
                                       "reads Nunchaku's INT4 files; all layers have to be in 4 bits."),
            ],
            # Not io.Combo.Output: its type is its list of options, which no V3 combo input accepts.
            outputs=[io.Custom("COMBO").Output(display_name="model_name",
                                               tooltip="The saved file, for SVDQuant Load Model's model_name.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, filename=None, overwrite=False, layout="native"):
        return written.fingerprint(name_in_folder(filename))

    @classmethod
    def execute(cls, model, filename, overwrite, layout="native"):
        return io.NodeOutput(save_model(model, filename, layout, overwrite))
