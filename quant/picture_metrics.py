"""Distances between pictures: PSNR and SSIM."""

import torch
import torch.nn.functional as F

LEAST_SQUARE = 1e-12  # lower bound of the mean square: equal pictures have 120 dB
WINDOW, SIGMA = 11, 1.5  # SSIM's published window
C1, C2 = 0.01**2, 0.03**2


def psnr(pictures, exact):
    """(n,) dB of n pictures (n, c, h, w) in [0, 1]."""
    square = (pictures - exact).square().flatten(1).mean(dim=1)
    return -10 * square.clamp_min(LEAST_SQUARE).log10()


def ssim(pictures, exact):
    """(n,) structural similarity of n pictures (n, c, h, w) in [0, 1], at least 11 wide and high: Wang et al. 2004, Gaussian
    window of 11 x 11 with deviation 1.5, mean over channels and over the positions where the window fits."""
    pictures, exact = pictures.double(), exact.double()  # in a flat window, the variance is a small difference of large numbers
    taps = torch.arange(WINDOW, dtype=torch.float64, device=exact.device) - WINDOW // 2
    gauss = torch.exp(-taps.square() / (2 * SIGMA**2))
    gauss = gauss / gauss.sum()
    n, c = exact.shape[:2]

    def smoothed(values):
        planes = values.flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(planes, gauss.view(1, 1, -1, 1)), gauss.view(1, 1, 1, -1)).unflatten(0, (n, c))

    mean_x, mean_y = smoothed(pictures), smoothed(exact)
    var_x = smoothed(pictures.square()) - mean_x.square()
    var_y = smoothed(exact.square()) - mean_y.square()
    covariance = smoothed(pictures * exact) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return (likeness / ((mean_x.square() + mean_y.square() + C1) * (var_x + var_y + C2))).flatten(1).mean(dim=1)
