"""Two images side by side, with their amplified difference, PSNR, SSIM and times, as one picture."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .picture_metrics import LEAST_SQUARE, WINDOW, psnr, ssim

SMALLEST_PANEL = 320  # pixels; smaller images are enlarged, so that the text fits
BACKGROUND, TEXT, DIM = (24, 24, 28), (240, 240, 240), (170, 170, 176)


class Comparison(NamedTuple):
    """A comparison of n pairs of images."""

    picture: torch.Tensor  # (n, H, W, 3) float32 in [0, 1]
    psnr: float            # dB, the mean over the pairs
    ssim: float            # the mean over the pairs
    caption: str           # the values of every pair, one line a pair


def compare(first, second, factor=8.0, labels=("", ""), seconds=(0.0, 0.0)):
    """The Comparison of two ComfyUI IMAGEs (n, h, w, c), image by image. Only red, green and blue count, clamped to [0, 1].

    factor: the factor of the difference; labels: of the two images; seconds: the time of each image, 0 if unknown. Raises ValueError if
    the images can't be compared; the message calls them image_1 and image_2, as the node does.
    """
    _check(first, second)
    first, second = (images[..., :3].float().clamp(0, 1).cpu() for images in (first, second))
    planes = [images.movedim(-1, 1) for images in (second, first)]
    decibels, similarities = psnr(*planes).tolist(), ssim(*planes).tolist()
    captions = [_metrics(*pair) for pair in zip(decibels, similarities)]
    times = _times(labels, seconds)
    sheets = [_sheet(a, b, factor, labels, seconds, caption + times) for a, b, caption in zip(first, second, captions)]
    means = [sum(values) / len(values) for values in (decibels, similarities)]
    lines = [f"{number}: {caption}" for number, caption in enumerate(captions, 1)]
    caption = "\n".join([*lines, f"mean: {_metrics(*means)}{times}"]) if len(lines) > 1 else captions[0] + times
    return Comparison(torch.stack(sheets), *means, caption)


def _check(first, second):
    (n, height, width), (n_2, height_2, width_2) = first.shape[:3], second.shape[:3]
    if n != n_2:
        raise ValueError(f"image_1 has {n} images and image_2 has {n_2}; connect batches of the same length.")
    if (height, width) != (height_2, width_2):
        raise ValueError(f"image_1 is {width} x {height} and image_2 is {width_2} x {height_2}; draw both at the same size, or put "
                         "Upscale Image before one of them.")
    if min(height, width) < WINDOW:
        raise ValueError(f"The images are {width} x {height}; SSIM needs at least {WINDOW} x {WINDOW} pixels.")


def _metrics(decibels, similarity):
    if decibels > -10 * np.log10(2 * LEAST_SQUARE):
        return "The images are identical"
    return f"PSNR {decibels:.2f} dB, SSIM {similarity:.4f}"


def _times(labels, seconds):
    """The end of a caption: the seconds that are known."""
    known = [f"{label} {time:.1f} s".strip() for label, time in zip(labels, seconds) if time]
    speed = f": {seconds[0] / seconds[1]:.2f}x as fast" if all(seconds) else ""
    return f"; {', '.join(known)}{speed}" if known else ""


# --- Drawing ---------------------------------------------------------------------------------------------------------


def margin(width):
    """Pixels around the panels of `width` pixels."""
    return width // 32


def line_height(width):
    """Pixels of a line of text above or below a panel."""
    return 2 * _font_size(width)


def columns(width):
    """The left edges of the three panels."""
    return [margin(width) + i * (width + margin(width)) for i in range(3)]


def _font_size(width):
    return max(14, width // 28)


def _sheet(first, second, factor, labels, seconds, caption):
    """(H, W, 3) float32: two images (h, w, 3), their difference, a label above each, and the caption below."""
    scale = -(-SMALLEST_PANEL // first.shape[1])
    panels = [panel.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
              for panel in (first, second, ((first - second).abs() * factor).clamp(max=1))]
    height, width = panels[0].shape[:2]
    edge, line = margin(width), line_height(width)
    canvas = Image.new("RGB", (columns(width)[-1] + width + edge, 2 * edge + 2 * line + height), BACKGROUND)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_font_size(width))
    titles = [*(f"{label}, {time:.1f} s" if label and time else label for label, time in zip(labels, seconds)), f"difference x {factor:g}"]
    for x, panel, title in zip(columns(width), panels, titles):
        draw.text((x, edge), _fitted(title, width, font), fill=DIM, font=font)
        canvas.paste(Image.fromarray((panel * 255).round().byte().numpy()), (x, edge + line))
    draw.text((edge, edge + line + height + line // 4), _fitted(caption, canvas.width - 2 * edge, font), fill=TEXT, font=font)
    return torch.from_numpy(np.asarray(canvas, dtype=np.float32) / 255)


def _fitted(text, width, font):
    """`text` in one line of at most `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    return next((shown for end in range(len(text) - 1, 0, -1) if font.getlength(shown := f"{text[:end]}...") <= width), "")
