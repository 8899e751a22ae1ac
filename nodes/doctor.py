"""SVDQuant Doctor: says what the 4-bit layers need of this machine and what is wrong."""

import time

import comfy.model_management
import comfyui_version
from comfy_api.latest import io, ui

from ..quant.doctor import page
from ..quant.doctor.part import Host
from .newer import ALIASES, CATEGORY, SEARCH
from .progress import NodeProgress


class SVDQuantDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantDoctor",
            display_name="SVDQuant Doctor",
            category=CATEGORY,
            description="Checks all that 4-bit models need of this machine: GPU, driver, PyTorch, CuPy, NVRTC, the kernels with their "
                        "self-test, and the cache. It says what to do about each problem. The page can be pasted into a bug report.",
            inputs=[
                # Off, because it compiles kernels and takes GPU memory that a loaded model may need.
                io.Boolean.Input("benchmark", default=False,
                                 tooltip="Also measure this GPU's speed on FLUX.1's linears, in 16 bits, in fp8 and in 4 bits, for at "
                                         "most a minute. The first run compiles kernels."),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The page, as plain text.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **({"search_aliases": [*ALIASES, "diagnose", "benchmark", "cupy", "debug", "gpu"]} if SEARCH else {}),
        )

    @classmethod
    def fingerprint_inputs(cls, benchmark):
        return time.perf_counter_ns()  # always new: the machine may have changed

    @classmethod
    def execute(cls, benchmark):
        shown = NodeProgress(cls.hidden.unique_id if cls.hidden else None)
        shown.say("measuring, for at most a minute" if benchmark else "examining")
        host = Host(comfyui_version.__version__, comfy.model_management.get_torch_device(),
                    getattr(comfy.model_management, "MAX_PINNED_MEMORY", None))  # the doctor also runs where the loader would fail
        report = page.examine(host, benchmark)
        shown.say(report)
        return io.NodeOutput(report, ui=ui.PreviewText(report))
