"""DLM: images and labels from the weights of two rounds, with the learning rate as an unknown.

A step of plain SGD moves the weights by the learning rate times the gradient. Dummy images, soft
labels and a scale k (the true one is 1 / learning rate) are optimised until the dummy gradient
equals k times the weight difference.

Source: Zhao, Luo, Ding, *Deep Leakage from Model in Federated Learning*, CPAL 2024, PMLR 234,
https://arxiv.org/abs/2206.04887, and its code, https://github.com/Zihao-Kevin/DLM.

The objective has minima that show nothing: a dummy whose soft label equals its prediction has no
gradient, and k = 0 explains it perfectly; k < 0 explains the opposite of the update.

Departures, beside those of :mod:`attacks.gradient_matching`:
- Tries are compared by the angle between dummy gradient and update, which those minima do not fake.
- ``scale = "last-bias"`` starts k from the last bias, at any learning rate, and moves it as slowly
  as the published k moves at its true value, 100; ``"published"`` starts k itself from a sweep made
  for a learning rate of 0.01.
- ``scale = "closed-form"`` eliminates k by its best value not below 0. It is no safer: without the
  inertia of k nearly every start ends in the empty minimum. Kept to show that.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from attacks.dummy_gradients import Clues, Weights
from attacks.gradient_matching import GradientMatching
from leakbed.contracts import UnfitViewError
from leakbed.naming import unknown

INERTIA = 100.0  # k moves by 1 / INERTIA of its start per unit of its variable, as published
SHARES = (1.0, 0.8, 0.6, 0.4)  # starts of k, by try, as shares of its upper bound; see `_bound`
SCALES = ("last-bias", "published", "closed-form")


@dataclass(frozen=True, kw_only=True)
class DeepLeakageFromModel(GradientMatching):
    """Gradient matching with an unknown step size.

    Attributes:
        scale: What k is and where it starts: ``"last-bias"``, ``"published"`` or ``"closed-form"``.
        sweep: Starts of the published k, by try.
    """

    name: ClassVar[str] = "dlm"
    source: ClassVar[str] = "Zhao, Luo, Ding, CPAL 2024, https://arxiv.org/abs/2206.04887"

    scale: str = "last-bias"
    sweep: tuple[float, ...] = (60, 80, 100, 120, 140, 160, 180, 200, 220, 240)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: One is outside the values it may take.
        """
        super().__post_init__()
        if self.scale not in SCALES:
            raise ValueError(unknown("scale", self.scale, SCALES))
        if not self.sweep:
            raise ValueError("sweep is empty; it must hold at least one start of k")

    def unknowns(self, clues: Clues, attempt: int) -> Float[Tensor, " targets unknowns"]:
        """Return where k starts, in the units of its variable.

        Args:
            clues: About the targets.
            attempt: Number of the try, from 0.

        Returns:
            One number per target, or none where k is eliminated.

        Raises:
            UnfitViewError: The last layer has no bias to start k from.
        """
        targets = len(clues.last)
        if self.scale == "closed-form":
            return clues.last.new_empty(targets, 0)
        if self.scale == "published":
            k = self.sweep[attempt % len(self.sweep)]
            return clues.last.new_full((targets, 1), k)
        if clues.last.dim() != 2:  # noqa: PLR2004  targets x classes
            raise UnfitViewError(
                "scale = 'last-bias' needs a last layer with a bias; use scale = 'published'"
            )
        return clues.last.new_full((targets, 1), INERTIA * SHARES[attempt % len(SHARES)])

    def objective(
        self, gradient: Weights, update: Weights, *, unknowns: Float[Tensor, " unknowns"]
    ) -> Float[Tensor, ""]:
        """Return the squared distance of the dummy gradient from k times the update.

        Args:
            gradient: Of the dummy images and labels.
            update: The weights the victim started from less those it sent.
            unknowns: The variable behind k.

        Returns:
            From the last bias: as a share of what it would be without any gradient, at first.
        """
        if self.scale == "closed-form":
            along = _inner(gradient, update).clamp(min=0.0).square() / _inner(update, update)
            return _inner(gradient, gradient) - along
        if self.scale == "published":
            return _gap(gradient, update, k=unknowns[0])
        bound = _bound(update)
        gap = _gap(gradient, update, k=bound * unknowns[0] / INERTIA)
        return gap / (bound.square() * _inner(update, update))

    def mismatch(
        self, gradient: Weights, update: Weights, *, objective: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Return the squared sine of the angle between dummy gradient and update.

        Args:
            gradient: Of the dummy images and labels where the try ended.
            update: The weights the victim started from less those it sent.
            objective: Its value there.

        Returns:
            From 0, parallel, to 1, at a right angle or opposite.
        """
        del objective
        along = _inner(gradient, update).clamp(min=0.0).square()
        return 1 - along / (_inner(gradient, gradient) * _inner(update, update))


def _inner(one: Weights, other: Weights) -> Float[Tensor, ""]:
    """Return the inner product over all tensors."""
    return torch.stack([(one[name] * other[name]).sum() for name in one]).sum()


def _gap(gradient: Weights, update: Weights, *, k: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the squared distance of the gradient from k times the update."""
    gaps = [(gradient[name] - k * update[name]).square().sum() for name in gradient]
    return torch.stack(gaps).sum()


def _bound(update: Weights) -> Float[Tensor, ""]:
    """Return the largest k there can be.

    The gradient of the last bias is the mean of (prediction - label), whose negative entries sum to
    no less than -1; they are -1 / k of the update's, and close to it while predictions are poor.
    """
    last_bias = list(update.values())[-1]
    return 1 / (-last_bias).clamp(min=0.0).sum()
