"""How far simulated rows lie from received ones: distances, and a critic that tells them apart.

Parts of every attack that fits a network of its own to what nodes send; see
:mod:`attacks.building_blocks.simulated_bottom` for who uses which, and the sources.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from leakbed.models import draw_alike

PRIORS = ("mmd", "cosine")
"""How features above the server's part are compared."""

_KERNELS = tuple(2.0**power for power in range(-3, 2))  # FORA's, in mean squared distances
_FLOOR = 1e-12  # of a mean squared distance that is divided by
_SPREAD = 1e-6  # under the root of a variance, whose gradient at 0 is infinite
_LEAK, _DROPOUT = 0.2, 0.4  # of the critic: SDAR's
_MAPS = 3  # axes of a row that is feature maps


def kernel_distance(
    one: Float[Tensor, " batch *shape"], other: Float[Tensor, " rows *shape"]
) -> Float[Tensor, ""]:
    """Return the squared maximum mean discrepancy of two sets of rows, summed over five kernels.

    Args:
        one: Through which the gradient flows.
        other: Likewise.

    Returns:
        The estimate that counts each row's distance from itself, so it is never negative.
    """
    rows = torch.cat([one.flatten(1), other.flatten(1)])
    squares = rows.square().sum(1)
    distances = (squares[:, None] + squares[None] - 2 * rows @ rows.T).clamp(min=0)
    scale = distances.detach().mean().clamp(min=_FLOOR)
    kernels = torch.stack([(-distances / (2 * size * scale)).exp() for size in _KERNELS]).sum(0)
    count = len(one)
    within = kernels[:count, :count].mean() + kernels[count:, count:].mean()
    return within - 2 * kernels[:count, count:].mean()


def moment_distance(
    one: Float[Tensor, " batch *shape"], other: Float[Tensor, " rows *shape"]
) -> Float[Tensor, ""]:
    """Return the mean squared distance of the channels' means, plus that of their deviations.

    Args:
        one: Feature maps, or flat rows, whose every number is a channel.
        other: Of the same shape; through both the gradient flows.

    Returns:
        A mean over channels.
    """
    moments = [channel_moments(rows) for rows in (one, other)]
    (mean, deviation), (mean_other, deviation_other) = moments
    return nn.functional.mse_loss(mean, mean_other) + nn.functional.mse_loss(
        deviation, deviation_other
    )


def channel_moments(
    rows: Float[Tensor, " batch channels *maps"],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Return mean and deviation of every channel.

    Args:
        rows: Feature maps, or flat rows, whose every number is a channel.

    Returns:
        Both; a deviation is .001 at least.
    """
    values = rows.transpose(0, 1).flatten(1)
    return values.mean(1), (values.var(1, unbiased=False) + _SPREAD).sqrt()


def prior_distance(
    features: Float[Tensor, " batch *upper"], target: Float[Tensor, " rows *upper"], *, by: str
) -> Float[Tensor, ""]:
    """Return the distance of features from those of received rows.

    Args:
        features: Of simulated rows, above the server's part.
        target: Of received ones.
        by: One of ``PRIORS``: the kernel distance, or one minus the cosine of the features' means.

    Returns:
        From 0, where they are alike.
    """
    if by == "mmd":
        return kernel_distance(features, target)
    means = features.flatten(1).mean(0), target.flatten(1).mean(0)
    return 1 - nn.functional.cosine_similarity(*means, dim=0)


def row_critic(shape: tuple[int, ...]) -> nn.Sequential:
    """Return a critic of rows: three convolutions of feature maps, two dense layers of others.

    Args:
        shape: Of a row.

    Returns:
        One score per row, high for received ones.
    """
    layers: list[nn.Module] = []
    if len(shape) == _MAPS:
        for inputs, outputs, stride in ((shape[0], 32, 1), (32, 64, 2), (64, 64, 1)):
            layers.append(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1))
            layers += [nn.LeakyReLU(_LEAK), nn.Dropout(_DROPOUT)]
        flat = 64 * -(-shape[1] // 2) * -(-shape[2] // 2)
        return draw_alike(nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 1)))
    flat = int(torch.Size(shape).numel())
    for inputs, outputs in ((flat, 128), (128, 128)):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(_LEAK), nn.Dropout(_DROPOUT)]
    return draw_alike(nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 1)))


def logistic_loss(scores: Shaped[Tensor, " batch 1"], *, high: bool) -> Float[Tensor, ""]:
    """Return the mean logistic loss of scores that should all be high, or all be low."""
    wanted = torch.full_like(scores, float(high))
    return nn.functional.binary_cross_entropy_with_logits(scores, wanted)
