"""SVDQuant Compare: two images side by side, with their difference, PSNR and SSIM."""

from comfy_api.latest import io

from ..quant.comparison import compare
from . import compared
from .checked import check_types
from .newer import ALIASES, CATEGORY, SEARCH


class SVDQuantCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SVDQuantCompare",
            display_name="SVDQuant Compare",
            category=CATEGORY,
            description="Shows two images side by side with their amplified difference, PSNR and SSIM, for instance the same seed drawn "
                        "in 16 and in 4 bits.",
            inputs=[
                io.Image.Input("image_1", tooltip="The image to compare with, such as the 16-bit model's."),
                io.Image.Input("image_2", tooltip="The other image, of the same size and from the same seed. Batches are compared image "
                                                  "by image."),
                compared.factor(),
                io.String.Input("label_1", default="16 bits", optional=True,
                                tooltip="The text above image_1, in Latin letters."),
                io.String.Input("label_2", default="4 bits", optional=True,
                                tooltip="The text above image_2, in Latin letters."),
                io.Float.Input("seconds_1", default=0.0, min=0.0, max=1e6, step=0.1, optional=True,
                               tooltip="The seconds that image_1 took, for the caption. 0 leaves them out."),
                io.Float.Input("seconds_2", default=0.0, min=0.0, max=1e6, step=0.1, optional=True,
                               tooltip="The seconds that image_2 took, for the caption. 0 leaves them out."),
            ],
            outputs=compared.outputs(),
            **({"search_aliases": [*ALIASES, *compared.ALIASES]} if SEARCH else {}),
        )

    @classmethod
    def execute(cls, image_1, image_2, factor, label_1="", label_2="", seconds_1=0.0, seconds_2=0.0):
        check_types(cls, image_1=image_1, image_2=image_2, factor=factor, label_1=label_1, label_2=label_2, seconds_1=seconds_1,
                    seconds_2=seconds_2)
        return io.NodeOutput(*compare(image_1, image_2, factor, (label_1, label_2), (seconds_1, seconds_2)))
