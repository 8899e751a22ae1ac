"""The parts that the nodes which compare images share."""

from comfy_api.latest import io

ALIASES = ["psnr", "ssim", "difference", "side by side"]


def factor():
    """The input that amplifies the difference."""
    return io.Float.Input("factor", default=8.0, min=1.0, max=100.0, step=1.0,
                          tooltip="The difference of the two images is multiplied by this before it is shown.")


def outputs():
    """The outputs that hold a quant.comparison.compare."""
    return [io.Image.Output(display_name="image", tooltip="Both images, their difference and the caption, one picture for each pair."),
            io.Float.Output(display_name="psnr", tooltip="The peak signal-to-noise ratio in dB; higher is closer. The mean of a batch."),
            io.Float.Output(display_name="ssim", tooltip="The structural similarity, at most 1; higher is closer. The mean of a batch."),
            io.String.Output(display_name="caption", tooltip="The values as text, one line for each pair.")]
