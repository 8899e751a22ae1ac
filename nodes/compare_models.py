"""SVDQuant Compare Models: draws the same images with two models, and shows them side by side as SVDQuant Compare does."""

from comfy_api.latest import io

from ..quant.comparison import compare
from ..quant.host import relied_on
from ..quant.host.drawing import draw
from . import compared
from .checked import check_types, checked, choose
from .newer import ADVANCED, ALIASES, CATEGORY, SEARCH
from .progress import NodeProgress

SAMPLER, SCHEDULER = "euler", "simple"
SAMPLERS = dict.fromkeys(relied_on.found(relied_on.SAMPLERS, [SAMPLER]))
SCHEDULERS = dict.fromkeys(relied_on.found(relied_on.SCHEDULERS, [SCHEDULER]))


def check_inputs(sampler_name, scheduler, cfg, negative):
    """Raise HostError if this ComfyUI lacks the lists of samplers, and ValueError for a name that is not on them, or if cfg needs a
    negative prompt and there is none. negative: whether it is connected; the others: None if they are still unknown."""
    relied_on.check_feature(relied_on.COMPARE_MODELS)
    for name, value, options in (("sampler_name", sampler_name, SAMPLERS), ("scheduler", scheduler, SCHEDULERS)):
        if value is not None:
            choose(name, value, options)
    if cfg not in (None, 1.0) and not negative:
        raise ValueError(f"With cfg {cfg:g} the models need a negative prompt; connect negative, or set cfg to 1.")


class SVDQuantCompareModels(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantCompareModels",
            display_name="SVDQuant Compare Models",
            category=CATEGORY,
            description="Draws the same images with two models, such as the 16-bit and the 4-bit one, and shows them side by side with "
                        "their difference, PSNR, SSIM and the seconds that each took.",
            inputs=[
                io.Model.Input("model_1", tooltip="The model to compare with, such as the 16-bit model."),
                io.Model.Input("model_2", tooltip="The other model, such as the 4-bit one."),
                io.Conditioning.Input("positive", tooltip="The prompt that both models draw."),
                io.Latent.Input("latent_image", tooltip="The latent from which both start: an empty one of your image size, or an encoded "
                                                        "image."),
                io.Vae.Input("vae", tooltip="The VAE that decodes both images."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                             tooltip="The random seed of the noise, the same for both."),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The sampling steps of each image."),
                io.Float.Input("cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="The classifier-free guidance. FLUX.1 takes 1 and its guidance from the prompt; other values need "
                                       "negative."),
                io.Combo.Input("sampler_name", options=list(SAMPLERS), default=SAMPLER,
                               tooltip="The sampler, the same for both."),
                io.Combo.Input("scheduler", options=list(SCHEDULERS), default=SCHEDULER,
                               tooltip="The scheduler, the same for both."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="The amount of denoising; below 1 keeps a part "
                                                                                            "of the image in latent_image.", **ADVANCED),
                compared.factor(),
                io.String.Input("label_1", default="16 bits", optional=True,
                                tooltip="The text above model_1's image, in Latin letters."),
                io.String.Input("label_2", default="4 bits", optional=True,
                                tooltip="The text above model_2's image, in Latin letters."),
                io.Conditioning.Input("negative", optional=True, tooltip="The negative prompt. Not used where cfg is 1."),
            ],
            outputs=[
                *compared.outputs(),
                io.Image.Output(display_name="image_1", tooltip="The images of model_1."),
                io.Image.Output(display_name="image_2", tooltip="The images of model_2."),
            ],
            hidden=[io.Hidden.unique_id],
            **({"search_aliases": [*ALIASES, *compared.ALIASES, "benchmark"]} if SEARCH else {}),
        )

    @classmethod
    def validate_inputs(cls, sampler_name=None, scheduler=None, cfg=None, negative=False):
        # A connected input is None here, and one that is not connected is left out.
        return checked(cls, check_inputs, sampler_name, scheduler, cfg, negative is None)

    @classmethod
    def execute(cls, model_1, model_2, positive, latent_image, vae, seed, steps, cfg, sampler_name, scheduler, denoise, factor, label_1="",
                label_2="", negative=None):
        with NodeProgress.of(cls) as shown:
            check_types(cls, model_1=model_1, model_2=model_2, positive=positive, negative=negative, latent_image=latent_image, vae=vae,
                        seed=seed, steps=steps, cfg=cfg, denoise=denoise, factor=factor, label_1=label_1, label_2=label_2)
            check_inputs(sampler_name, scheduler, cfg, negative is not None)
            shown.total(2 * steps)
            images, seconds = zip(*(
                draw(model, vae, positive, positive if negative is None else negative, latent_image, seed, steps, cfg, sampler_name,
                     scheduler, denoise, lambda number, name=name: shown.step(f"{name}: step {number} of {steps}"))
                for model, name in ((model_1, label_1 or "model_1"), (model_2, label_2 or "model_2"))))
            found = compare(*images, factor, (label_1, label_2), seconds)
            shown.say(found.caption)
            return io.NodeOutput(*found, *images)
