"""SplitGuard: a node sends batches with wrong labels now and then, and watches the gradients.

A server that learns the task answers wrong labels with gradients of another direction and size; a
hijacker does not look at labels, so its gradients cannot differ. The score is near 1 for the first.

Source: Erdogan, Kupcu, Cicek. "SplitGuard: Detecting and Mitigating Training-Hijacking Attacks in
Split Learning", WPES 2022, https://arxiv.org/abs/2108.09052; formula and constants from its code.
Departures from the source:
- Sets of gradients are kept as sums, from which the score is the same.
- The published code has no decision; here the alarm is a score below ``threshold`` after at least
  ``fakes`` fake batches.
- Wrong labels are shifted by 1 to classes - 1 (published: 1 to 8 of 10).
- A score without a direction to compare (a gradient of zeros) is 0.25, as of a server that tells
  nothing apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import acos, exp
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.defending import TrainingStep

_SETS = ("fake", "first", "second")  # F, R1 and R2 of the paper


@dataclass(frozen=True, kw_only=True)
class SplitGuard(Defense):
    """Probe the server with wrong labels; the node does not learn from its answers to them.

    A hijacker whose gradients grow or swing from batch to batch can look honest: the sets then
    differ by their ages, not by their labels.

    Attributes:
        probability: Of a batch being fake, after the warm-up.
        warm_up: Batches before the first that may be fake.
        slope: The a of the score 1 / (1 + exp(-a S)) ** b.
        exponent: Its b.
        threshold: Scores below it raise the alarm.
        fakes: Fake batches before the first decision.
        stop: Whether the node refuses to train on after an alarm.
    """

    name: ClassVar[str] = "splitguard"
    source: ClassVar[str] = "Erdogan, Kupcu, Cicek, WPES 2022, https://arxiv.org/abs/2108.09052"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.TRAINING})
    labels: ClassVar[frozenset[str]] = frozenset({"shared"})

    probability: float = 0.1
    warm_up: int = 20
    slope: float = 5.0
    exponent: float = 2.0
    threshold: float = 0.5
    fakes: int = 10
    stop: bool = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range.
        """
        if not 0 < self.probability < 1 or self.warm_up < 0 or self.fakes < 1:
            raise ValueError(
                "splitguard needs 0 < probability < 1, warm_up >= 0 and fakes >= 1, got "
                f"{self.probability}, {self.warm_up} and {self.fakes}"
            )
        if not 0 <= self.threshold <= 1 or min(self.slope, self.exponent) <= 0:
            raise ValueError(
                "splitguard needs a threshold in [0, 1], slope > 0 and exponent > 0, got "
                f"{self.threshold}, {self.slope} and {self.exponent}"
            )

    def protect_labels(
        self, state: DefenseState, labels: Int[Tensor, " batch"], *, classes: int
    ) -> tuple[DefenseState, Int[Tensor, " batch"]]:
        """Send wrong labels with some probability, all shifted by the same number.

        Args:
            state: Fixes the draw of this batch.
            labels: The true ones.
            classes: Labels are 0 to ``classes - 1``.

        Returns:
            The state, ``probing`` where the labels are wrong, and the labels.
        """
        fake, shift, _ = _drawn(state)
        if state.messages < self.warm_up or fake >= self.probability:
            return state, labels
        shift = 1 + int(shift * (classes - 1))
        return replace(state, probing=True), (labels + shift) % classes

    def inspect(self, state: DefenseState, step: TrainingStep) -> DefenseState:
        """Put the gradient into its set; after a fake batch, score all there are.

        Args:
            state: ``probing`` says whether the batch was fake.
            step: Its first weights' gradient is looked at.

        Returns:
            The next state.
        """
        if state.messages < self.warm_up:
            return state
        regular = _SETS[1 + int(_drawn(state)[2] < 1 / 2)]
        place = "fake" if state.probing else regular
        tensors = _added(state.tensors, place, step.first_gradient.flatten().double())
        after = replace(state, tensors=tensors)
        if not state.probing or not all(f"{name}.sum" in tensors for name in _SETS):
            return after
        return self._judged(after, self.score(tensors))

    def score(self, tensors: Mapping[str, Tensor]) -> float:
        """Return how well the server tells wrong labels from right ones: 1 for honest ones.

        Args:
            tensors: For each set the sums of its gradients and of their norms, and their number.

        Returns:
            In [0, 1].
        """
        fake, first, second = (_means(tensors, name) for name in _SETS)
        regular = (first[0] + second[0]) / 2, (first[1] + second[1]) / 2
        of_fakes, of_regulars = abs(fake[1] - regular[1]), abs(first[1] - second[1])
        total = of_fakes + of_regulars
        apart = 0.0
        if total > 0:
            apart = _angle(fake[0], regular[0]) * of_fakes / total
            apart -= _angle(first[0], second[0]) * of_regulars / total
        return float((1 / (1 + exp(-self.slope * apart))) ** self.exponent)

    def _judged(self, state: DefenseState, score: float) -> DefenseState:
        if state.tensors["fake.count"] < self.fakes:
            return state
        return state.judged(score, suspicious=score < self.threshold, worse=min)


def _drawn(state: DefenseState) -> tuple[float, float, float]:
    """Return a batch's draws: whether it is fake, its shift, and the set of a regular one."""
    fake, shift, place = torch.rand(3, generator=state.generator(), dtype=torch.float64).tolist()
    return fake, shift, place


def _added(tensors: Mapping[str, Tensor], place: str, gradient: Tensor) -> dict[str, Tensor]:
    """Return the sets with one gradient more."""
    new = {"sum": gradient, "norms": gradient.norm(), "count": torch.ones(())}
    added = {f"{place}.{k}": v + tensors.get(f"{place}.{k}", 0) for k, v in new.items()}
    return {**tensors, **added}


def _means(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, float]:
    """Return a set's mean gradient and the mean of its norms."""
    count = tensors[f"{name}.count"]
    return tensors[f"{name}.sum"] / count, float(tensors[f"{name}.norms"] / count)


def _angle(left: Tensor, right: Tensor) -> float:
    """Return the angle between two vectors in radians; 0 where one of them has no direction."""
    lengths = float(left.norm() * right.norm())
    if lengths <= 0:
        return 0.0
    return acos(min(1.0, max(-1.0, float(left @ right) / lengths)))
