"""Gradients Scrutinizer: a node compares the cut gradients of equal labels with those of others.

In honest classification the gradients of samples with one label are more alike than those of
different labels; a hijacker's gradients do not know labels. The score weighs the gap between both
kinds of pairs, their overlap and how smooth they run over the steps.

Source: Fu, Ma, Zhu, Hu, Zhao, Jia, Xu, Jin, Zhang. "Focusing on Pinocchio's Nose: A Gradients
Scrutinizer to Thwart Split-Learning Hijacking Attacks Using Intrinsic Attributes", NDSS 2023,
https://dx.doi.org/10.14722/ndss.2023.24874; formula and constants from its code.
Departures from the source:
- The overlap subtracts the larger lower end throughout; published code takes the smaller one for
  honest runs, which overstates their overlap.
- A pair of a sample with itself is no pair.
- A batch without two equal labels, or without two different ones, is left out.
"""

from dataclasses import dataclass, replace
from math import exp, log
from typing import ClassVar

import torch
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.defending import TrainingStep

_WEIGHT, _EXPONENT = 7.0, 0.4  # lambda, and 1 - 0.6, of the published code
_HISTORY = "history"  # one row per step: the step, mean and deviation of same, of different pairs
_LEAST_STEPS = 4  # a parabola fits three points whatever they are


@dataclass(frozen=True, kw_only=True)
class GradientsScrutinizer(Defense):
    """Raise the alarm when gradients do not know labels.

    The published constants raise false alarms where honest gradients are weakly separated:
    calibrate ``offset`` for a model and a cut.

    Attributes:
        every: Steps between two scores.
        slope: Of the score sigmoid(slope * (G E V - offset)).
        offset: Its product G E V at which the score is 1/2.
        threshold: Scores below it raise the alarm.
        stop: Whether the node refuses to train on after an alarm.
    """

    name: ClassVar[str] = "gradients-scrutinizer"
    source: ClassVar[str] = "Fu et al., NDSS 2023, https://dx.doi.org/10.14722/ndss.2023.24874"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.TRAINING})
    labels: ClassVar[frozenset[str]] = frozenset({"shared", "client"})

    every: int = 50
    slope: float = 5.0
    offset: float = 0.7
    threshold: float = 0.5
    stop: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range.
        """
        if self.every < _LEAST_STEPS or self.slope <= 0 or not 0 <= self.threshold <= 1:
            raise ValueError(
                f"gradients-scrutinizer needs every >= {_LEAST_STEPS}, slope > 0 and a threshold "
                f"in [0, 1], got {self.every}, {self.slope} and {self.threshold}"
            )

    def inspect(self, state: DefenseState, step: TrainingStep) -> DefenseState:
        """Note how alike the batch's gradients are; score every so many steps.

        Args:
            state: With the steps before.
            step: Its cut gradients and labels are looked at.

        Returns:
            The next state.
        """
        number = state.messages + 1
        history = state.tensors.get(_HISTORY, torch.zeros(0, 5, dtype=torch.float64))
        pairs = likeness(step.cut_gradient, step.labels)
        if pairs is not None:
            row = torch.cat([torch.tensor([float(number)], dtype=torch.float64), pairs])
            history = torch.cat([history, row[None]])
        after = replace(state, tensors={_HISTORY: history})
        if number % self.every or len(history) < _LEAST_STEPS:
            return after
        score = self.score(history)
        return after.judged(score, suspicious=score < self.threshold, worse=min)

    def score(self, history: Tensor) -> float:
        """Return how much the gradients know of labels: 1 for honest ones.

        Args:
            history: One row per step: its number, mean and deviation of the likeness of pairs with
                the same label, then of pairs with different ones.

        Returns:
            In [0, 1].
        """
        same, same_width, other, other_width = history[-1, 1:].tolist()
        gap = (same - other) / (same + other) if same + other > 0 else 0.0
        rough = (_roughness(history[:, (0, 1)]) + _roughness(history[:, (0, 3)])) / 2
        shared = _overlap((same, same_width), (other, other_width))
        sign = 1.0 if gap >= 0 else -1.0
        product = sign * abs(gap) ** _EXPONENT
        product *= -log(_WEIGHT * rough + exp(-2.0)) * -log(shared + exp(-1.0))
        return 1 / (1 + exp(-self.slope * (product - self.offset)))


def likeness(gradients: Tensor, labels: Tensor) -> Tensor | None:
    """Return mean and deviation of the likeness of pairs with the same label, then of the others.

    Args:
        gradients: One row per sample.
        labels: Theirs.

    Returns:
        Four numbers, each in [0, 1] (1 is the same direction); None where one kind has no pair.
    """
    rows = torch.nn.functional.normalize(gradients.flatten(1).double(), dim=1)
    alike = 0.5 + 0.5 * rows @ rows.T
    equal = labels[:, None] == labels[None, :]
    apart = ~torch.eye(len(labels), dtype=torch.bool)
    same, other = alike[equal & apart], alike[~equal]
    if not len(same) or not len(other):
        return None
    spread = same.std(correction=0), other.std(correction=0)
    return torch.stack([same.mean(), spread[0], other.mean(), spread[1]])


def _roughness(points: Tensor) -> float:
    """Return the root mean square error of a parabola through (step, likeness)."""
    steps = points[:, 0] / points[-1, 0]  # scaled, for the fit's sake: the error is the same
    powers = torch.stack([steps.square(), steps, torch.ones_like(steps)], dim=1)
    fitted = powers @ torch.linalg.lstsq(powers, points[:, 1:]).solution
    return float((fitted - points[:, 1:]).square().mean().sqrt())


def _overlap(left: tuple[float, float], right: tuple[float, float]) -> float:
    """Return what share of their union the intervals mean -+ deviation have in common."""
    upper = sorted((left[0] + left[1], right[0] + right[1]))
    lower = sorted((left[0] - left[1], right[0] - right[1]))
    union = upper[1] - lower[0]
    return max(0.0, upper[0] - lower[1]) / union if union > 0 else 1.0
