"""How near a guessed image is to the truth: one value per image, never a silent NaN.

Pixel metrics read intensities in [0, 1]; correlation metrics forgive any change of brightness,
contrast or polarity, because several attacks recover shapes only up to scale. SSIM and PSNR are
torchmetrics' with peak and data range 1. Published numbers often use other constants: PSNR of
unnormalised images with a peak of 1 / (channel std) reads 11.485 dB too high, and SSIM with data
range 255 on images in [0, 1] is near 1 for any pair of images, so neither compares with these.

Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to
structural similarity", IEEE Transactions on Image Processing 2004,
https://doi.org/10.1109/TIP.2003.819861; Clopper, Pearson, "The use of confidence or fiducial limits
illustrated in the case of the binomial", Biometrika 1934, https://doi.org/10.1093/biomet/26.4.404.
Departure: SSIM averages over the whole map, its borders padded by reflection (torchmetrics).
"""

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest
from torch import Tensor

HIGHER_LEAKS_MORE = {
    "identification": True,
    "abs_pearson": True,
    "ssim": True,
    "label_accuracy": True,
    "leak_auc": True,
    "cluster_accuracy": True,
    "attribute_accuracy": True,
    "class_rate": True,
    "nearest_real": True,
    "diversity": True,
    "mse": False,
    "psnr": True,
    "affine_mse": False,
}
"""Every metric of a score, the leading ones first, and which direction leaks more."""

BEST_IS_ONE = (
    "identification",
    "abs_pearson",
    "ssim",
    "label_accuracy",
    "leak_auc",
    "cluster_accuracy",
    "attribute_accuracy",
    "class_rate",
)
"""The metrics whose perfect value is 1: those that can be given as skill over a baseline."""

RATES = ("identification", "label_accuracy", "cluster_accuracy", "attribute_accuracy", "class_rate")
"""The metrics that are shares of samples."""

PSNR_CEILING = 100.0
"""Decibels given to equal images, so that a mean stays finite; 100 dB is an MSE of 1e-10."""

_FLAT = 1e-6  # spread below which an image counts as constant: float32 rounding, far under 1/255
_TIE = 1e-12  # correlations nearer than float64 can tell apart count as ties
_CHUNK = 2048  # candidates correlated at once: 50 MB for CIFAR images in float64


def mse(
    guess: Float[Tensor, " batch *image"], truth: Float[Tensor, " batch *image"]
) -> Float[Tensor, " batch"]:
    """Mean squared error of each image; lower leaks more."""
    return (guess.double() - truth.double()).square().flatten(1).mean(1)


def psnr(
    guess: Float[Tensor, " batch *image"], truth: Float[Tensor, " batch *image"]
) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio of each image in decibels, peak 1; higher leaks more.

    Args:
        guess: Reconstructed images, pixel values in [0, 1].
        truth: The private images, pixel values in [0, 1].

    Returns:
        One value per image, at most ``PSNR_CEILING``.
    """
    from torchmetrics.functional.image import (  # noqa: PLC0415  a second to import
        peak_signal_noise_ratio,
    )

    ratio: Tensor = peak_signal_noise_ratio(
        guess.double().flatten(1),
        truth.double().flatten(1),
        data_range=1.0,
        reduction="none",
        dim=1,
    )
    return ratio.clamp(max=PSNR_CEILING)


def ssim(
    guess: Float[Tensor, " batch channels height width"],
    truth: Float[Tensor, " batch channels height width"],
) -> Float[Tensor, " batch"]:
    """Structural similarity of each image, at most 1; higher leaks more.

    The window is the published 11 x 11 Gaussian of sigma 1.5. Images under 6 pixels get the widest
    Gaussian that fits them; such values compare only with images of the same size.

    Args:
        guess: Reconstructed images, pixel values in [0, 1].
        truth: The private images, pixel values in [0, 1].

    Returns:
        One value per image.

    Raises:
        ValueError: A side of the images is a single pixel: there is no structure to compare.
    """
    from torchmetrics.functional.image import (  # noqa: PLC0415  a second to import
        structural_similarity_index_measure,
    )

    side = min(guess.shape[-2:])
    if side < 2:  # noqa: PLR2004
        raise ValueError(
            f"images of {guess.shape[-2]} x {guess.shape[-1]} pixels have no SSIM; it needs 2 x 2"
            " or more, and the published window 6 x 6"
        )
    # torchmetrics pads by int(3.5 sigma + 0.5) pixels of reflection, which must be under the side.
    sigma = min(1.5, (side - 1) / 3.5)
    # float32 is ten times faster; it is off by up to 1e-4 on flat images, by 1e-7 on digits.
    similarity: Tensor = structural_similarity_index_measure(
        guess.float(), truth.float(), sigma=sigma, data_range=1.0, reduction="none"
    )
    return similarity


def pearson(
    guess: Float[Tensor, " batch *image"], truth: Float[Tensor, " batch *image"]
) -> Float[Tensor, " batch"]:
    """Pearson correlation over all pixels and channels of each image, in [-1, 1].

    Its magnitude is what leaks: see ``abs_pearson``. Unlike torchmetrics' version, a constant image
    correlates 0 with everything instead of giving NaN.

    Args:
        guess: Reconstructed images, any scale and polarity.
        truth: The private images.

    Returns:
        One value per image.
    """
    return (_direction(guess) * _direction(truth)).sum(1).clamp(-1, 1)


def abs_pearson(
    guess: Float[Tensor, " batch *image"], truth: Float[Tensor, " batch *image"]
) -> Float[Tensor, " batch"]:
    """Magnitude of the Pearson correlation of each image, in [0, 1]; higher leaks more."""
    return pearson(guess, truth).abs()


def affine_mse(
    guess: Float[Tensor, " batch *image"], truth: Float[Tensor, " batch *image"]
) -> Float[Tensor, " batch"]:
    """Mean squared error after the best map ``a * guess + b`` of each image; lower leaks more.

    Least squares in closed form: the variance of the truth that the correlation leaves unexplained.
    ``a`` may be negative, and a constant guess scores the variance of the truth.

    Args:
        guess: Reconstructed images, any scale and polarity.
        truth: The private images, pixel values in [0, 1].

    Returns:
        One value per image.
    """
    variance = truth.double().flatten(1).var(1, correction=0)
    return variance * (1 - pearson(guess, truth).square())


def correlations(
    guess: Float[Tensor, " batch *image"], others: Float[Tensor, " others *image"]
) -> Float[Tensor, " batch others"]:
    """Magnitude of the Pearson correlation of every guess with every other image, in [0, 1]."""
    direction = _direction(guess)
    chunks = torch.split(others, _CHUNK)
    parts = [direction @ _direction(chunk).T for chunk in chunks]
    return torch.cat(parts, dim=1).abs().clamp(max=1)


def identification(
    guess: Float[Tensor, " batch *image"],
    candidates: Float[Tensor, " candidates *image"],
    position: Int[Tensor, " batch"],
) -> Bool[Tensor, " batch"]:
    """Whether the truth is the candidate nearest to the guess; more hits leak more.

    Nearest by |Pearson|. Ties fail: a constant guess identifies nothing, and an exact double of a
    private image among the candidates makes that image unidentifiable.

    Args:
        guess: Reconstructed images.
        candidates: Private images, the truths among them.
        position: Where in ``candidates`` each guess's truth is.

    Returns:
        One hit or miss per image.
    """
    table = correlations(guess, candidates)
    own = table.gather(1, position[:, None]).squeeze(1)
    rivals = table.scatter(1, position[:, None], -1.0)  # -1: below any magnitude
    return own > rivals.amax(1) + _TIE


def binomial_interval(
    successes: int, trials: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a success rate.

    Args:
        successes: How many trials succeeded.
        trials: How many there were, at least one.
        confidence: Probability that the interval covers the true rate.

    Returns:
        The lower and the upper end, in [0, 1].
    """
    interval = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def skill(score: float, baseline: float) -> float:
    """Share of the way from a baseline to a perfect 1 that a score covers; higher leaks more.

    Args:
        score: A score whose perfect value is 1.
        baseline: The same score reached without evidence.

    Returns:
        1 for a perfect score, 0 at the baseline, negative below it.

    Raises:
        ValueError: The baseline is perfect already, so nothing is left to gain.
    """
    if baseline >= 1:
        raise ValueError(f"no skill over a baseline of {baseline}; it must be below 1")
    return (score - baseline) / (1 - baseline)


def _direction(images: Float[Tensor, " batch *image"]) -> Float[Tensor, " batch pixels"]:
    """Centre each image and scale it to length 1; a constant image becomes all zeros."""
    pixels = images.double().flatten(1)
    mean = pixels.mean(1, keepdim=True)
    centred = pixels - mean
    length = centred.norm(dim=1, keepdim=True)
    flat = length <= _FLAT * mean.abs().clamp(min=1) * pixels.shape[1] ** 0.5
    return torch.where(flat, torch.zeros_like(centred), centred / length.clamp(min=1e-300))
