"""The measures: ACC, ASR and RA of predictions; PSNR, SSIM and L∞ of triggered images."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of ``predicted`` equal to ``labels``, both int64 (N,), in [0, 1].

    Over the clean test set this is ACC; over the triggered one it is ASR against the target and RA
    against the true labels.

    Raises:
        ValueError: the tensors differ in length, or are empty.
    """
    if predicted.shape != labels.shape or not len(labels):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} labels")
    return int((predicted == labels).sum()) / len(labels)


def psnr(clean: Tensor, triggered: Tensor) -> float | None:
    """Return the mean peak signal-to-noise ratio, dB, of uint8 images (N, C, H, W).

    Images that the trigger leaves as they were have no finite value and don't count; None if all are.
    """
    error = (clean.double() - triggered.double()).square().mean((1, 2, 3))
    changed = error[error > 0]
    return float((10 * torch.log10(255**2 / changed)).mean()) if len(changed) else None


def linf(clean: Tensor, triggered: Tensor) -> int:
    """Return the largest change of any channel of any pixel, grey levels 0 to 255."""
    return int((clean.int() - triggered.int()).abs().max())


def ssim(clean: Tensor, triggered: Tensor) -> float:
    """Return the mean structural similarity of uint8 images (N, C, H, W), at most 1.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image Quality Assessment: From Error Visibility to
    Structural Similarity", IEEE TIP 2004: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03,
    population variances, windows inside the image only; here the mean over the colour channels too.

    Raises:
        ValueError: the images are smaller than the window.
    """
    side, sigma = 11, 1.5
    if min(clean.shape[-2:]) < side:
        raise ValueError(f"SSIM needs images of at least {side}×{side} pixels, not {tuple(clean.shape[-2:])}")
    offsets = torch.arange(side, dtype=torch.float64) - side // 2
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    taps /= taps.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for x, y in zip(torch.split(clean, 256), torch.split(triggered, 256), strict=True):  # bounds the memory
        a, b = (part.double().flatten(0, 1)[:, None] for part in (x, y))
        stacked = torch.cat([a, b, a * a, b * b, a * b])
        blurred = F.conv2d(F.conv2d(stacked, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
        mean_a, mean_b, square_a, square_b, product = blurred.chunk(5)
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        variances = square_a - mean_a**2 + square_b - mean_b**2
        structure = (2 * (product - mean_a * mean_b) + c2) / (variances + c2)
        scores.append((luminance * structure).mean((1, 2, 3)))
    return math.fsum(torch.cat(scores).tolist()) / sum(map(len, scores))
