"""SVDQuant Several GPUs: draws one picture on several GPUs of this machine."""

from comfy_api.latest import io

from ..quant.host import relied_on
from .newer import ALIASES, CATEGORY, SEARCH
from .progress import NodeProgress


class SVDQuantSeveralGPUs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantSeveralGPUs",
            display_name="SVDQuant Several GPUs",
            category=CATEGORY,
            description="Runs each step of a model on several GPUs of this machine at once. A process on each other GPU loads the same "
                        "file and computes a part of the image.",
            inputs=[
                io.Model.Input("model", tooltip="The model of SVDQuant Load Model, with or without LoRAs: the other GPUs load the same "
                                                "file and get the LoRAs."),
                io.Int.Input("gpus", default=2, min=2, max=64,
                             tooltip="The number of GPUs. It has to divide the model's number of attention heads: 2, 3, 4, 6, 8 and 12 "
                                     "suit FLUX.1."),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model, for samplers and other model nodes.")],
            hidden=[io.Hidden.unique_id],
            **({"search_aliases": [*ALIASES, "multi gpu", "multigpu", "parallel", "xdit", "raylight"]} if SEARCH else {}),
        )

    @classmethod
    def execute(cls, model, gpus):
        relied_on.check_feature(relied_on.SEVERAL_GPUS)
        # Imported here, since it brings torch.distributed, which nobody needs who doesn't ask for it.
        from ..quant.host.several_gpus import several_gpus

        with NodeProgress.of(cls) as shown:
            several = several_gpus(model, gpus)
            shown.say(f"{gpus} GPUs; the others load the model")
            return io.NodeOutput(several)
