"""SVDQuant Save Model: a quantized MODEL into a file that anybody can load."""

import os

from comfy_api.latest import io

from ..quant.checkpoint import native
from ..quant.checkpoint.convert import READERS
from ..quant.checkpoint.header import CheckpointError, read_header
from ..quant.checkpoint.nunchaku import writer as nunchaku_writer
from ..quant.checkpoint.write import check_target
from ..quant.host import build
from ..quant.host.patcher import SVDQuantModelPatcher, unpatched
from ..quant.host.quantize import CARD
from .model_folder import target_path


def stored_tensors(model):
    """{name in the file: tensor} of a quantized model, in the types that its layers were stored in. What other nodes have hung into the
    model isn't part of it. Raises ValueError where they have taken something away."""
    specs = {layer: module.spec for layer, module in model.packed_layers().items()}
    own = build.empty_like(model.model, specs, model.model.get_dtype()).diffusion_model.state_dict()
    found = unpatched(model.model, model.backup)
    if missing := own.keys() - found.keys():
        raise ValueError(f"Another node has replaced the part of this MODEL that has {min(missing)}; load the MODEL again, and save it "
                         "before that node runs.")
    tensors = {name: found[name] for name in own}
    for layer, module in model.packed_layers().items():
        for part, (_, dtype) in module.spec.tensors().items():
            tensor = tensors[name := f"{layer}.{part}"]
            if tensor.dtype != dtype:  # linear.compute_in's
                tensors[name] = tensor.to("cpu", dtype)
    return {build.stored_name(model.model, name): tensor for name, tensor in tensors.items()}


def check_overwritten(path):
    """Raise CheckpointError where there is a file and it is no quantized FLUX.1, whatever `overwrite` says: it may be what the model
    was made from. Only its header is read."""
    if not os.path.isfile(path):
        return
    try:
        header = read_header(path)
        for reader in READERS.values():
            if reader.matches(header):
                reader.open_file(header)
                return
    except (CheckpointError, OSError):
        pass
    raise CheckpointError(f"{os.path.basename(path)} exists already and is no quantized FLUX.1 that this pack reads, and overwrite "
                          "replaces nothing else; choose another filename, or move that file away.")


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
                                 tooltip="Replace a quantized model of that name; other files are never replaced. Off: an existing "
                                         "file is left alone and the node stops."),
                io.Combo.Input("layout", options=["native", "nunchaku"], default="native", optional=True,
                               tooltip="native: this pack's, which holds every model exactly. nunchaku: for software that "
                                       "reads Nunchaku's INT4 files; all layers have to be in 4 bits."),
            ],
            # Not io.Combo.Output: its type is its list of options, which no V3 combo input accepts.
            outputs=[io.Custom("COMBO").Output(display_name="model_name",
                                               tooltip="The saved file, for SVDQuant Load Model's model_name.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename, overwrite, layout="native"):
        if not isinstance(model, SVDQuantModelPatcher):
            raise ValueError("SVDQuant Save Model saves quantized models; put SVDQuant Quantize Model before it, or save "
                             "a 16-bit model with ComfyUI's own nodes.")
        if model.patches or model.injections:  # bypass LoRAs
            raise ValueError("There are LoRAs or other weight patches on this 4-bit MODEL, which its file can't hold; save it "
                             "without them, or put them before SVDQuant Quantize Model, which bakes them in.")
        path, name = target_path(filename)
        check_overwritten(path)
        check_target(path, overwrite)
        tensors = stored_tensors(model)
        specs = {layer: module.spec for layer, module in model.packed_layers().items()}
        writer = {"native": native, "nunchaku": nunchaku_writer}[layout]
        writer.save(path, tensors, specs, build.stored_config(model.model), model.recipe, model.source, overwrite,
                    model.get_attachment(CARD))
        return io.NodeOutput(name)
