"""SVDQuant Inspect: what a model file is, without loading it."""

import json
import time

import folder_paths
from comfy_api.latest import io, ui

from ..quant.checkpoint import inspection
from ..quant.checkpoint.header import read_header
from ..quant.host.loader import check_file
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
        return time.perf_counter_ns()  # always new: the text on the node comes by running, and is lost with the page

    @classmethod
    def execute(cls, model_name):
        shown = NodeProgress(cls.hidden.unique_id if cls.hidden else None)
        shown.say(model_name)  # else the text of the file before stays on the node when this one is refused
        header = read_header(folder_paths.get_full_path_or_raise("diffusion_models", model_name))
        told = inspection.inspect(header)
        check_file(header)
        report = inspection.text(told)
        shown.say(report)
        return io.NodeOutput(report, json.dumps(told, indent=1), ui=ui.PreviewText(report))
