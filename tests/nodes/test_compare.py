"""SVDQuant Compare, called as ComfyUI calls it."""

import pytest
import torch
from comfyui_svdquant.nodes.compare import SVDQuantCompare

from ..quant.test_comparison import images

pytestmark = pytest.mark.usefixtures("inference_mode")


def test_the_nodes_outputs():
    first, second = images(2), images(2, seed=1)
    picture, psnr, ssim, caption = SVDQuantCompare.execute(first, second, 8.0, "16 bits", "4 bits", 10.0, 8.0).result
    assert picture.shape[0] == 2 and picture.dtype == torch.float32 and 0 <= picture.min() < picture.max() <= 1
    assert type(psnr) is type(ssim) is float and 0 < psnr < 20 and ssim < 0.5
    assert caption.splitlines()[2] == f"mean: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}; 16 bits 10.0 s, 4 bits 8.0 s: 1.25x as fast"


def test_only_the_images_and_the_factor_are_required():
    assert SVDQuantCompare.execute(images(), images(), 8.0).result[3] == "The images are identical"


def test_different_sizes_are_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="image_1 is 400 x 40 and image_2 is 320 x 40; draw both at the same size"):
        SVDQuantCompare.execute(images(), images(width=320), 8.0)
