"""SVDQuant Inspect: describes a model file without loading it."""

import json
import time
from functools import partial

from comfy_api.latest import io, ui

from ..quant import families
from ..quant.checkpoint import inspection
from ..quant.checkpoint.header import read_header
from ..quant.checkpoint.write import size_text
from ..quant.host import loader, model_folder
from .checked import checked
from .newer import CATEGORY, SEARCH
from .progress import NodeProgress


def _reading(shown, done, total):
    shown.at(done, total, f"verified {size_text(done)} of {size_text(total)}")


class SVDQuantInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantInspect",
            display_name="SVDQuant Inspect",
            category=CATEGORY,
            **SEARCH,
            description=f"Describes a {families.TITLES} file: format, sizes, ranks, recipe and quantization errors. It reads a "
                        "4-bit file whole to verify its checksums, without loading it.",
            inputs=[
                io.Combo.Input("model_name", options=model_folder.listed(),
                               tooltip=f"A {families.TITLES} file from models/diffusion_models, or a checkpoint with such a model in it "
                                       "from models/checkpoints."),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The description of the file, as text."),
                io.String.Output(display_name="json", tooltip="The description in more detail, as JSON for programs."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model_name):
        return time.perf_counter_ns()  # always new: only a run shows the text on the node, and reloading the page clears it

    @classmethod
    def validate_inputs(cls, model_name=None):
        return checked(cls, loader.check_kind, model_name)

    @classmethod
    def execute(cls, model_name):
        with NodeProgress.of(cls) as shown:
            header = read_header(model_folder.existing_path(model_name))
            loader.check_file(header)
            description = inspection.inspect_body(header, partial(_reading, shown))
            report = inspection.text(description)
            shown.say(report)
            return io.NodeOutput(report, json.dumps(description, indent=1), ui=ui.PreviewText(report))
