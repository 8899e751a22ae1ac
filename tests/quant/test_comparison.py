"""The picture that compares two images: its panels, its caption, and the errors of images that don't pair."""

import pytest
import torch
from comfyui_svdquant.quant import comparison, picture_metrics


def images(n=1, height=40, width=400, seed=0, channels=3):
    return torch.rand(n, height, width, channels, generator=torch.Generator().manual_seed(seed))


def panels(picture, height, width):
    """The three panels of a sheet, cut out at their places."""
    top = comparison.margin(width) + comparison.line_height(width)
    return [picture[top:top + height, x:x + width] for x in comparison.columns(width)]


def test_the_panels_are_both_images_and_their_amplified_difference():
    first, second = images(2), images(2, seed=1) / 4 + images(2) * 3 / 4
    found = comparison.compare(first, second, factor=3.0)
    assert found.picture.shape[0] == 2 and found.picture.shape[3] == 3 and found.picture.dtype == torch.float32
    for sheet, a, b in zip(found.picture, first, second):
        left, middle, right = panels(sheet, 40, 400)
        for panel, expected in ((left, a), (middle, b), (right, ((a - b).abs() * 3).clamp(max=1))):
            assert (panel - expected).abs().max() <= 1 / 255


def test_the_metrics_are_the_benchmarks():
    first, second = images(3), images(3, seed=1)
    found = comparison.compare(first, second)
    planes = [each.movedim(-1, 1) for each in (first, second)]
    assert found.psnr == pytest.approx(float(picture_metrics.psnr(*planes).mean()), abs=1e-4)
    assert found.ssim == pytest.approx(float(picture_metrics.ssim(*planes).mean()), abs=1e-6)
    assert found.psnr == comparison.compare(second, first).psnr


def test_the_caption_has_the_metrics_and_the_seconds():
    first, second = images(), images(seed=1)
    found = comparison.compare(first, second, labels=("bf16", "W4A8"), seconds=(16.5, 13.2))
    assert found.caption == f"PSNR {found.psnr:.2f} dB, SSIM {found.ssim:.4f}; bf16 16.5 s, W4A8 13.2 s: 1.25x as fast"
    found = comparison.compare(first, second, labels=("bf16", "W4A8"), seconds=(0.0, 13.2))
    assert found.caption == f"PSNR {found.psnr:.2f} dB, SSIM {found.ssim:.4f}; W4A8 13.2 s"
    assert comparison.compare(first, first).caption == "The images are identical"


def test_a_batchs_caption_has_a_line_for_each_pair_and_the_mean():
    first, second = images(2), images(2, seed=1)
    second[1] = first[1]
    lines = comparison.compare(first, second).caption.splitlines()
    assert lines[0].startswith("1: PSNR ") and lines[1] == "2: The images are identical" and lines[2].startswith("mean: PSNR ")


def test_the_text_is_drawn():
    first = images()
    sheets = [comparison.compare(first, first, labels=labels).picture for labels in (("", ""), ("bf16", "W4A8"))]
    assert sheets[0].shape == sheets[1].shape and not torch.equal(*sheets)


def test_a_long_label_stays_in_its_panel():
    first = images()
    short, long = (comparison.compare(first, first, labels=(label, "")).picture for label in ("", "x" * 500))
    left, middle, _ = comparison.columns(400)
    assert torch.equal(short[:, :, middle:], long[:, :, middle:]) and not torch.equal(short[:, :, left:middle], long[:, :, left:middle])


def test_small_images_are_enlarged_by_a_whole_factor():
    """Otherwise the text would not fit."""
    first = images(height=16, width=64)
    found = comparison.compare(first, first)
    left, *_ = panels(found.picture[0], 80, 320)
    assert (left[::5, ::5] - first[0]).abs().max() <= 1 / 255 and (left[4::5, 4::5] - first[0]).abs().max() <= 1 / 255


def test_values_out_of_range_count_as_a_viewer_shows_them_and_alpha_is_left_out():
    first = images()
    beyond = torch.where(first > 0.5, first + 1, first)
    assert comparison.compare(beyond, beyond.clamp(0, 1)).caption == "The images are identical"
    assert comparison.compare(images(channels=4), images(channels=4)[..., :3]).caption == "The images are identical"


@pytest.mark.parametrize(("first", "second", "says"), [
    (images(), images(width=392), "image_1 is 400 x 40 and image_2 is 392 x 40; draw both at the same size, or put Upscale Image"),
    (images(2), images(3), "image_1 has 2 images and image_2 has 3; connect batches of the same length"),
    (images(height=10), images(height=10), "The images are 400 x 10; SSIM needs at least 11 x 11 pixels"),
])
def test_images_that_do_not_pair_are_refused(first, second, says):
    with pytest.raises(ValueError, match=says):
        comparison.compare(first, second)
