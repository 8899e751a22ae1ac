"""SVDQuant Save Model: saves a quantized MODEL to a file."""

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
            description="Saves a quantized model to models/diffusion_models, in this pack's layout or, for FLUX.1, in "
                        "Nunchaku's.",
            inputs=[
                io.Model.Input("model", tooltip="The quantized model from SVDQuant Quantize Model."),
                io.String.Input("filename", default="flux_svdquant",
                                tooltip="The name of the file in models/diffusion_models, with an optional subfolder."),
                io.Boolean.Input("overwrite", default=False,
                                 tooltip="Replace an existing quantized model of the same name; other files are never replaced. When "
                                         "off, an existing file is kept and the node stops with an error."),
                io.Combo.Input("layout", options=list(formats.WRITERS), default="native", optional=True,
                               tooltip="native: this pack's layout, which stores every model exactly. nunchaku: FLUX.1 only, for "
                                       "software that reads Nunchaku's INT4 files; all layers have to be in 4 bits."),
            ],
            # Not io.Combo.Output: its type is its list of options, which no V3 combo input accepts.
            outputs=[io.Custom("COMBO").Output(display_name="model_name",
                                               tooltip="The saved file's name, for model_name of SVDQuant Load Model.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, filename=None, overwrite=False, layout="native"):
        return written.fingerprint(name_in_folder(filename))

    @classmethod
    def execute(cls, model, filename, overwrite, layout="native"):
        return io.NodeOutput(save_model(model, filename, layout, overwrite))
