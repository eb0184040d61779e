"""Perturbed inputs within a budget: projected gradient ascent, and random signs beside it.

An image may change by at most the budget in every pixel, and stays in [0, 1]. Both are counted in
pixels: a network that normalises its inputs does so inside, see :class:`Normalised`. Each step goes
up the sign of the gradient and is then put back within the budget. What is climbed is the loss of
the true label, where the whole network is known, or else how far a layer's features move: that
needs neither labels nor a head.

Source: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards deep learning models resistant to
adversarial attacks", ICLR 2018, https://arxiv.org/abs/1706.06083 (section 2.1). The order of the
operations is that of torchattacks 3.5.1, https://github.com/Harry24k/adversarial-attacks-pytorch,
which is no dependency: its pins clash with Flower's. A test compares the bits with a literal
reading of it, and with the package itself where that can be imported: both agree, the latter with
the code of that version put on the path (2026-11-29; an earlier version said that this was not
tried).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    Climbed = Callable[[Float[Tensor, " batch channels height width"]], Float[Tensor, ""]]

DISTANCES = ("l2", "cosine")
"""How far features moved: squared Euclidean distance, or one minus the cosine."""

ROUNDING = 1e-6
"""By how much a pixel may miss its budget: adding and taking away an image rounds in float32."""


class BudgetError(ValueError):
    """A budget, a step or a normalisation that cannot be, or an image that breaks its budget."""


class Normalised(nn.Module):
    """A network behind a normalisation: a mean is subtracted and a spread divides, by channel.

    Attributes:
        network: What reads the normalised inputs.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, *, mean: Sequence[float], std: Sequence[float], channels: int
    ) -> None:
        """Put the normalisation before a network.

        Args:
            network: Shared, not copied.
            mean: One number per channel.
            std: One number above 0 per channel.
            channels: Of the images.

        Raises:
            BudgetError: If a number is missing, not finite, or a spread not above 0.
        """
        super().__init__()
        check_normalisation(mean, std)
        if len(mean) != channels:
            raise BudgetError(
                f"a normalisation of {len(mean)} channels (mean = {list(mean)}, std = {list(std)}) "
                f"for images of {channels}; give one mean and one std per channel"
            )
        self.network = network
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1))

    def forward(self, images: Float[Tensor, " batch channels height width"]) -> Tensor:
        """Apply the network to the normalised images."""
        result: Tensor = self.network((images - self.mean) / self.std)
        return result


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse a normalisation without its numbers.

    Args:
        mean: One number per channel, or none.
        std: As many, each above 0.

    Raises:
        BudgetError: If one has other numbers than the other, or one that cannot be.
    """
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if len(mean) != len(std) or not finite or any(value <= 0 for value in std):
        raise BudgetError(
            f"mean = {list(mean)} and std = {list(std)} are no normalisation; give one mean and "
            "one std above 0 per channel, or leave both out"
        )


def check_budget(budget: float) -> None:
    """Refuse a budget that is no share of the range of a pixel.

    Args:
        budget: The most by which a pixel may change.

    Raises:
        BudgetError: If it is not above 0 and at most 1.
    """
    if not 0 < budget <= 1:
        raise BudgetError(
            f"a budget of {budget} is none: pixels lie in [0, 1], so use a number above 0 and at "
            "most 1, such as 0.2 for digits or 8/255 = 0.031 for photographs"
        )


def ascend(
    climbed: Climbed,
    images: Float[Tensor, " batch channels height width"],
    *,
    budget: float,
    step: float,
    steps: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch channels height width"]:
    """Return images within the budget for which a loss is high.

    Args:
        climbed: From a batch of images to what is climbed.
        images: Natural ones, in [0, 1]; never changed.
        budget: The most by which a pixel may change, before any normalisation.
        step: By how much each step changes a pixel.
        steps: How many.
        generator: Draws the start, uniform within the budget; None starts at the images.

    Returns:
        Within the budget and in [0, 1].

    Raises:
        BudgetError: If the budget, the step or their number cannot be.
    """
    check_budget(budget)
    if not step > 0 or steps < 1:
        raise BudgetError(f"{steps} steps of {step} move nothing; use 1 or more, each above 0")
    natural = images.detach()
    found = natural.clone()
    if generator is not None:
        start = torch.empty(natural.shape, dtype=natural.dtype)
        start.uniform_(-budget, budget, generator=generator)
        found = (found + start.to(natural.device)).clamp(0, 1)
    for _ in range(steps):
        found.requires_grad_()
        (gradient,) = torch.autograd.grad(climbed(found), found)
        found = found.detach() + step * gradient.sign()
        found = (natural + (found - natural).clamp(-budget, budget)).clamp(0, 1)
    return found


def random_signs(
    images: Float[Tensor, " batch channels height width"],
    *,
    budget: float,
    generator: torch.Generator,
) -> Float[Tensor, " batch channels height width"]:
    """Return images of which every pixel moved by the whole budget, up or down by chance.

    Args:
        images: Natural ones, in [0, 1]; never changed.
        budget: By how much.
        generator: Draws the signs.

    Returns:
        In [0, 1].
    """
    check_budget(budget)
    signs = torch.randint(2, images.shape, generator=generator).mul(2).sub(1)
    return (images + budget * signs.to(images)).clamp(0, 1)


def against_labels(network: nn.Module, labels: Int[Tensor, " batch"]) -> Climbed:
    """Return the loss of the true labels, for whoever knows the whole network.

    Args:
        network: From images to logits, in evaluation mode.
        labels: Of the images.

    Returns:
        The mean cross-entropy of a batch.
    """

    def loss(images: Float[Tensor, " batch channels height width"]) -> Float[Tensor, ""]:
        return nn.functional.cross_entropy(network(images), labels)

    return loss


def against_features(
    layers: nn.Module,
    images: Float[Tensor, " batch channels height width"],
    *,
    distance: str = "l2",
) -> Climbed:
    """Return how far the features of images moved, for whoever knows neither labels nor head.

    At the natural images themselves there is no gradient, so a climb starts beside them.

    Args:
        layers: From images to features, in evaluation mode.
        images: Natural ones.
        distance: One of ``DISTANCES``.

    Returns:
        The mean distance of a batch.

    Raises:
        BudgetError: If the distance is none of those.
    """
    if distance not in DISTANCES:
        raise BudgetError(f"distance {distance!r} is unknown; use {' or '.join(DISTANCES)}")
    with torch.no_grad():
        natural = layers(images).flatten(1)

    def loss(moved: Float[Tensor, " batch channels height width"]) -> Float[Tensor, ""]:
        features = layers(moved).flatten(1)
        if distance == "cosine":
            alike: Tensor = nn.functional.cosine_similarity(features, natural, dim=1)
            return (1 - alike).mean()
        apart: Tensor = (features - natural).square().sum(1)
        return apart.mean()

    return loss


def refuse_beyond(
    perturbed: Float[Tensor, " batch channels height width"],
    images: Float[Tensor, " batch channels height width"],
    *,
    budget: float,
) -> None:
    """Refuse perturbed images that break their budget.

    Args:
        perturbed: Finite.
        images: The natural ones.
        budget: The most by which a pixel may differ, but for rounding.

    Raises:
        BudgetError: If a pixel differs by more or lies outside [0, 1].
    """
    most = float((perturbed - images).abs().max())
    low, high = float(perturbed.min()), float(perturbed.max())
    if most > budget + ROUNDING or low < 0 or high > 1:
        raise BudgetError(
            f"pixels change by up to {most:.6g} and lie between {low:.4g} and {high:.4g}, where a "
            f"budget of {budget:.6g} within [0, 1] was stated; clip to the budget, then to [0, 1]"
        )
