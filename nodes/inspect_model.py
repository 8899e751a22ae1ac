"""SVDQuant Inspect: what a model file is, without loading it."""

import json
import os

import folder_paths
from comfy_api.latest import io, ui

from ..quant import inspection
from .progress import NodeProgress


class SVDQuantInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantInspect",
            display_name="SVDQuant Inspect",
            category="model/svdquant",
            description="Tells what a FLUX.1 file is: format, sizes, ranks, recipe and errors. Its weights are not loaded.",
            inputs=[
                io.Combo.Input("model_name", options=folder_paths.get_filename_list("diffusion_models"),
                               tooltip="A FLUX.1 file from models/diffusion_models."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="What the file is, as text."),
                io.String.Output(display_name="json", tooltip="The same for programs, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model_name):
        path = folder_paths.get_full_path("diffusion_models", model_name) if model_name else None
        return (os.stat(path).st_mtime_ns, os.stat(path).st_size) if path else None

    @classmethod
    def execute(cls, model_name):
        told = inspection.inspect(folder_paths.get_full_path_or_raise("diffusion_models", model_name))
        report = inspection.text(told)
        NodeProgress(cls.hidden.unique_id if cls.hidden else None).say(report)
        return io.NodeOutput(report, json.dumps(told, indent=1), ui=ui.PreviewText(report))
