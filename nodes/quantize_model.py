"""SVDQuant Quantize Model: a FLUX.1 MODEL into its 4-bit twin, in the graph."""

from dataclasses import replace

from comfy_api.latest import io

from ..quant.host.quantize import quantize
from ..quant.quantizer import presets, report
from ..quant.quantizer.calibration import TOKENS_PER_INPUT
from .progress import PROGRESS_FOLDERS, NodeProgress


class SVDQuantQuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantQuantizeModel",
            display_name="SVDQuant Quantize Model",
            category="model/svdquant",
            description="Quantizes a FLUX.1 model to 4 bits: 4-bit weights and activations beside a small 16-bit "
                        "branch. It watches the model draw your prompts to find where precision matters. LoRAs on the "
                        "model are baked in.",
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.1 model in bf16, fp16 or fp8, with any LoRAs to bake in."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="Prompts to watch the model draw; join several with Conditioning "
                                              "(Combine). More prompts of the kind you draw give a better model. The "
                                              "presets best, slow and fast need them."),
                io.Latent.Input("latent", optional=True,
                                tooltip="The picture size to draw while watching: an empty latent of your usual size."),
                io.Int.Input("steps", default=8, min=1, max=100,
                             tooltip="Sampling steps for each prompt. They cover all noise levels, so 8 are enough."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="Noise of the pictures that are drawn while watching."),
                io.Int.Input("rank", default=32, min=presets.MIN_RANK, max=presets.MAX_RANK,
                             step=presets.RANK_STEP,
                             tooltip="Width of the 16-bit branch; twice that in the single blocks, whose layers are two in one. "
                                     "32 suits most; more is closer to the original and makes the model larger."),
                io.Combo.Input("preset", options=list(presets.PRESETS), default="best",
                               tooltip="best: calibrated on your prompts, with GPTQ. slow: errors of layers a little smaller, "
                                       "and longer. fast: without GPTQ. data-free: no calibration, weaker. naive: plain "
                                       "rounding without the method, only to compare with."),
                io.String.Input("exceptions", default="", multiline=True, optional=True,
                                tooltip="Layers to treat differently, one a line: a name or pattern to keep in 16 bits, "
                                        "such as single_blocks.37.*, or one with a rank of its own, such as "
                                        "*.linear2 = 128."),
                io.Int.Input("tokens", default=TOKENS_PER_INPUT, min=1, max=64, optional=True,
                             tooltip="How many tokens, for each input of a layer, rounding goes by. 2 to 4 suit; more take "
                                     "longer and change little."),
                io.Combo.Input("progress", options=list(PROGRESS_FOLDERS), default="temp", optional=True,
                               tooltip="Where finished blocks are kept until all are, so that a run that was interrupted goes on "
                                       "with them. temp: ComfyUI's temp folder, which lasts until ComfyUI ends. output: the "
                                       "output folder, which lasts. off: nowhere."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The 4-bit model, for samplers and SVDQuant Save Model."),
                io.String.Output(display_name="report", tooltip="Error and size of every layer, as text."),
                io.Image.Output(display_name="chart", tooltip="The errors as a picture: plain rounding above, this model "
                                                              "below."),
                io.String.Output(display_name="json", tooltip="The report for programs, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, steps, seed, rank, preset, positive=None, latent=None, exceptions="", tokens=TOKENS_PER_INPUT,
                progress="temp"):
        recipe = replace(presets.make_recipe(preset, rank, exceptions), tokens=tokens)
        shown = NodeProgress(cls.hidden.unique_id if cls.hidden else None)
        quantized, records = quantize(model, recipe, positive, latent, steps, seed, shown, PROGRESS_FOLDERS[progress]())
        shown.say(report.summary(records))
        notes = quantized.recipe["notes"]
        return io.NodeOutput(quantized, report.text(records, recipe, notes), report.picture(records),
                             report.as_json(records, recipe, notes))
