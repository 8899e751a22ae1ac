"""SVDQuant Quantize Model: quantizes a MODEL to 4 bits in the graph."""

from dataclasses import replace

from comfy_api.latest import io

from ..quant import families
from ..quant.host.quantize import quantize
from ..quant.layers import layout
from ..quant.quantizer import chart, presets, report
from ..quant.quantizer.calibration import TOKENS_PER_INPUT
from .checked import check_types, checked, choose
from .exceptions import exceptions_input
from .newer import ADVANCED, CATEGORY, SEARCH
from .progress import PROGRESS_FOLDERS, NodeProgress

KEPT, RANKED = families.EXAMPLES
BRANCH_BITS = {str(bits): bits for bits in reversed(layout.BRANCH_BITS)}


class SVDQuantQuantizeModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantQuantizeModel",
            display_name="SVDQuant Quantize Model",
            category=CATEGORY,
            **SEARCH,
            description=f"Quantizes a {families.TITLES} model to 4 bits: 4-bit weights and activations plus a small low-rank "
                        "branch. It samples the model with your prompts to calibrate each layer. LoRAs on the model are "
                        "baked in.",
            inputs=[
                io.Model.Input("model", tooltip=f"A {families.TITLES} model in bf16, fp16 or fp8, with any LoRAs to bake in. Models of "
                                                "other architectures are quantized by what calibration finds in them."),
                io.Combo.Input("preset", options=list(presets.PRESETS), default="best",
                               tooltip="best: calibrated on your prompts, with GPTQ. slow: closer to the original still, takes "
                                       "longer. fast: calibrated, without GPTQ. data-free: no calibration, larger errors. naive: "
                                       "plain rounding without SVDQuant, for comparison only."),
                io.Int.Input("rank", default=presets.DEFAULT_RANK, min=presets.MIN_RANK, max=presets.MAX_RANK,
                             step=presets.RANK_STEP,
                             tooltip="The rank of the low-rank branch. Layers that combine two layers of the paper, as those in "
                                     "single blocks do, get twice this rank. 64 suits most models; a higher rank is closer to the "
                                     "original and makes the model larger."),
                io.Conditioning.Input("positive", optional=True,
                                      tooltip="The calibration prompts; join several with Conditioning (Combine). More prompts like "
                                              "those you use give a better model. The presets best, slow and fast need "
                                              "them."),
                io.Latent.Input("latent", optional=True,
                                tooltip="The image size for calibration: an empty latent of your usual size."),
                io.Int.Input("steps", default=8, min=1, max=100,
                             tooltip="Sampling steps for each calibration prompt. 8 steps cover all noise levels."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="The random seed of the noise for calibration."),
                exceptions_input(KEPT, f"; with a number it sets their rank, such as {RANKED}; with = int8 their activations have 8 "
                                       "bits, for a closer image, unless SVDQuant Load Model sets activations to int4"),
                io.Int.Input("tokens", default=TOKENS_PER_INPUT, min=1, max=64, optional=True,
                             tooltip="The number of calibration tokens per input channel of a layer, for GPTQ and the fit of the "
                                     "branch. 4 to 16 are enough; more take longer and change little.", **ADVANCED),
                io.Combo.Input("progress", options=list(PROGRESS_FOLDERS), default="temp", optional=True,
                               tooltip="Where finished blocks are stored during the run, so that an interrupted run can resume. "
                                       "temp: ComfyUI's temp folder, which is emptied when ComfyUI restarts. output: the output "
                                       "folder, which is kept. off: they are not stored.", **ADVANCED),
                io.Combo.Input("branch_bits", options=list(BRANCH_BITS), default=str(presets.DEFAULT_BRANCH_BITS), optional=True,
                               tooltip="The bits of the low-rank branch. With 8, twice the rank takes about as much memory, in the file "
                                       "and on the GPU: rank 64 in 8 bits is much closer to the original than rank 32 in 16. A step takes "
                                       "a few percent longer.", **ADVANCED),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The quantized model, for samplers and SVDQuant Save Model."),
                io.String.Output(display_name="report", tooltip="The error and size of every layer, as text."),
                io.Image.Output(display_name="chart", tooltip="How much closer than plain rounding the model is, its worst "
                                                              "layers, and the error of every layer."),
                io.String.Output(display_name="json", tooltip="The report as JSON, for programs."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, preset=None, exceptions=None, positive=False, latent=False):
        # A connected input is None here, and one that is not connected is left out.
        return checked(cls, presets.check_inputs, preset, exceptions, positive is None, latent is None)

    @classmethod
    def execute(cls, model, preset, rank, steps, seed, positive=None, latent=None, exceptions="", tokens=TOKENS_PER_INPUT,
                progress="temp", branch_bits=str(presets.DEFAULT_BRANCH_BITS)):
        with NodeProgress.of(cls) as shown:
            check_types(cls, model=model, preset=preset, rank=rank, steps=steps, seed=seed, positive=positive, latent=latent,
                        exceptions=exceptions, tokens=tokens)
            bits = choose("branch_bits", branch_bits, BRANCH_BITS)
            recipe = replace(presets.make_recipe(preset, rank, exceptions, bits), tokens=tokens)
            folder = choose("progress", progress, PROGRESS_FOLDERS)()
            quantized, records = quantize(model, recipe, positive, latent, steps, seed, shown, folder)
            shown.say(report.summary(records))
            notes = quantized.recipe["notes"]
            return io.NodeOutput(quantized, report.text(records, recipe, notes), chart.picture(records),
                                 report.as_json(records, recipe, notes))
