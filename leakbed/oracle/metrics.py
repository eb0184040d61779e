"""How near guesses are to the truth: image metrics, the matching of rows, unnamed groups.

**Image metrics** give one value per image. An image that is not finite has values that are not, and
identifies nothing; in a score it counts as a failure (:func:`leakbed.oracle.score`). Pixel metrics
read intensities in [0, 1]; correlation metrics forgive any change of brightness, contrast or
polarity, because several attacks recover shapes only up to scale. SSIM and PSNR are torchmetrics'
with peak and data range 1. Published numbers often use other constants: PSNR of unnormalised images
with a peak of 1 / (channel std) reads 11.485 dB too high, and SSIM with data range 255 on images in
[0, 1] is near 1 for any pair of images, so neither compares with these.

SSIM is the common form: the mean over the windows that lie within the image. Until 2026-11-28 it
was the mean over the whole map, borders padded by reflection, which reads otherwise where three
fifths of the map are border: of 28 x 28 digits .37 for .11 (another digit) and .46 for .78 (noise
of .1). Tables say which of the two they have.

Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to
structural similarity", IEEE Transactions on Image Processing 2004,
https://doi.org/10.1109/TIP.2003.819861; Clopper, Pearson, "The use of confidence or fiducial limits
illustrated in the case of the binomial", Biometrika 1934, https://doi.org/10.1093/biomet/26.4.404.

**Matching**: an attack on a batch returns its rows in any order. Each target is one assignment
problem (Kuhn, "The Hungarian method for the assignment problem", Naval Research Logistics Quarterly
1955, https://doi.org/10.1002/nav.3800020109), solved by scipy. The best of all orders flatters a
random guess, so baselines are matched in the same way.

**Groups without names.** An attack that knows no label at all may still say which samples share
one. Its score is the share of samples that are right under the one-to-one naming which makes most
of them right. No attacker has that naming, so the score is an upper bound on what the groups are
worth under any other such naming; an attacker that gives two groups one label may be right more
often. Baselines are named in the same way, since the best naming flatters groups that mean nothing
too.
"""

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor

HIGHER_LEAKS_MORE: dict[str, bool] = {
    "identification": True,
    "abs_pearson": True,
    "ssim": True,
    "label_accuracy": True,
    "balanced_accuracy": True,
    "leak_auc": True,
    "cluster_accuracy": True,
    "attribute_accuracy": True,
    "class_rate": True,
    "misclassification": True,
    "nearest_real": True,
    "diversity": True,
    "mse": False,
    "psnr": True,
    "affine_mse": False,
}
"""Every metric of a score, the leading ones first, and which direction leaks more.

``misclassification`` is no leak of a sample: it is the share of altered inputs on which the node's
whole network errs. Higher is worse for the node as well.
"""

BEST_IS_ONE = (
    "identification",
    "abs_pearson",
    "ssim",
    "label_accuracy",
    "leak_auc",
    "cluster_accuracy",
    "attribute_accuracy",
    "class_rate",
    "misclassification",
)
"""The metrics that can be given as skill over a baseline: their perfect value is 1.

``balanced_accuracy`` is left out: it is of the same hits as ``label_accuracy``, whose control it
would only repeat.
"""

RATES = (
    "identification",
    "label_accuracy",
    "cluster_accuracy",
    "attribute_accuracy",
    "class_rate",
    "misclassification",
)
"""The metrics that are shares of samples."""

PERCENTAGES = (*RATES, "balanced_accuracy")
"""The metrics that are printed in percent."""

SSIM_WINDOW = 11
"""Pixels a side of SSIM's published window; a smaller image holds none and has no SSIM."""

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

    The mean over all published windows, 11 x 11 Gaussians of sigma 1.5, that lie within the image,
    and over channels: as MATLAB's ``ssim_index`` and as scikit-image's ``structural_similarity``
    with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1``.

    Args:
        guess: Reconstructed images, pixel values in [0, 1].
        truth: The private images, pixel values in [0, 1].

    Returns:
        One value per image.

    Raises:
        ValueError: A side of the images is under ``SSIM_WINDOW``: no window lies within them.
    """
    from torchmetrics.functional.image import (  # noqa: PLC0415  a second to import
        structural_similarity_index_measure,
    )

    if not has_ssim(guess):
        raise ValueError(
            f"images of {guess.shape[-2]} x {guess.shape[-1]} pixels have no SSIM: its window is "
            f"{SSIM_WINDOW} x {SSIM_WINDOW}; leave it out (see has_ssim)"
        )
    # float32 is ten times faster; it is off by up to 1e-4 on flat images, by 1e-7 on digits.
    _, padded = structural_similarity_index_measure(
        guess.float(),
        truth.float(),
        sigma=1.5,
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    border = SSIM_WINDOW // 2  # torchmetrics pads by it
    within: Tensor = padded[..., border:-border, border:-border]
    return within.flatten(1).mean(1)


def has_ssim(images: Float[Tensor, " *batch height width"]) -> bool:
    """Return whether images are large enough for one window of SSIM."""
    return min(images.shape[-2:]) >= SSIM_WINDOW


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


def match_images(
    guess: Float[Tensor, " targets rows channels height width"],
    truth: Float[Tensor, " targets rows channels height width"],
) -> Int[Tensor, " targets rows"]:
    """Return, for each true image, the guessed row of its target in the best order by |Pearson|."""
    return _assign(torch.stack([correlations(t, g) for t, g in zip(truth, guess, strict=True)]))


def match_labels(
    guess: Int[Tensor, " targets rows"], truth: Int[Tensor, " targets rows"]
) -> Int[Tensor, " targets rows"]:
    """Return, for each true label, the guessed row of its target; as many agree as can."""
    return _assign((truth[:, :, None] == guess[:, None, :]).double())


def _assign(gain: Float[Tensor, " targets rows rows"]) -> Int[Tensor, " targets rows"]:
    columns = [linear_sum_assignment(table, maximize=True)[1] for table in gain.cpu().numpy()]
    return torch.stack([torch.from_numpy(column) for column in columns]).to(gain.device)


BOUND = (
    "an upper bound: clusters have the best one-to-one names there are, which no attacker knows; "
    "only naming two clusters alike could be right more often"
)
"""What a card says beside such a score."""


def best_named(
    clusters: Int[Tensor, " targets rows"],
    labels: Int[Tensor, " targets rows"],
    *,
    usable: Bool[Tensor, " targets"] | None = None,
) -> Bool[Tensor, " targets rows"]:
    """Return which samples are right when each cluster has the best name.

    Args:
        clusters: Any numbers; samples of one number are one group.
        labels: The true ones.
        usable: Whose clusters count in the choice of names; None for all.

    Returns:
        Hits and misses; of more clusters than labels, those without a name miss.
    """
    groups, own = clusters.unique(return_inverse=True)
    names, true = labels.unique(return_inverse=True)
    counted = own * len(names) + true
    pairs = (counted if usable is None else counted[usable]).flatten()
    shared = torch.bincount(pairs, minlength=len(groups) * len(names))
    table = shared.reshape(len(groups), len(names))
    rows, columns = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    named = torch.full((len(groups),), -1, device=true.device)
    named[torch.from_numpy(rows)] = torch.from_numpy(columns).to(named)
    hits: Tensor = named[own] == true
    return hits
