"""The norm score: of two labels, the rarer one has the longer gradients at the cut.

A model that has learnt that one label is rare gives it a small probability, so its samples have a
large error, and the gradient at the cut is that error times how the output moves. The score of a
sample is the length of its gradient.

Source: Li, Sun, Yang, Gao, Zhang, Xie, Smith, Wang, *Label Leakage and Protection in Two-Party
Split Learning*, ICLR 2022, https://arxiv.org/abs/2102.08504 (section 3.2), and its code,
https://github.com/OscarcarLi/label-protection.

Departures:
- All attacked samples are ranked together, where the paper ranks each batch. The loss is a batch's
  mean, so the gradients of a shorter last batch are longer, whatever their labels.
- The paper only scores. Labels are guessed where logarithms of the lengths part best into two
  groups (two-means, exact in one dimension); the longer ones are label 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attacks.binary_gradients import binary_gradients
from leakbed.contracts import Evidence, Guess, Seat, ThreatModel, UnfitViewError, View
from leakbed.naming import unknown

SEATS = ("client", "server")
_LEAST = 2  # a single length has nothing to be longer than


@dataclass(frozen=True, kw_only=True)
class NormScore:
    """Label scores by the length of cut gradients; label 1 is taken to be the rarer one.

    Attributes:
        seat: The ``"client"`` where the server holds the labels (published); the ``"server"`` where
            nodes hold the head.
    """

    seat: str = "client"

    name: ClassVar[str] = "norm-score"
    source: ClassVar[str] = "Li et al., ICLR 2022, https://arxiv.org/abs/2102.08504"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: The seat is none that receives cut gradients.
        """
        if self.seat not in SEATS:
            raise ValueError(unknown("seat", self.seat, SEATS))

    @property
    def threat(self) -> ThreatModel:
        """A party without labels that receives the gradient at the cut, and knows nothing else."""
        return ThreatModel(seat=Seat(self.seat), evidence=frozenset({Evidence.CUT_GRADIENT}))

    def run(self, view: View, *, seed: int) -> Guess:
        """Score every sample.

        Args:
            view: With ``cut_gradient`` of two samples or more, in two classes.
            seed: Not used; nothing is random.

        Returns:
            Scores and labels; a gradient that is not finite is a failure.

        Raises:
            UnfitViewError: There is a single sample.
        """
        del seed
        lengths = binary_gradients(view, name=self.name).norm(dim=1)
        if view.targets < _LEAST:
            raise UnfitViewError(
                "norm-score compares gradients of several samples and the view has one; attack "
                "more targets"
            )
        failed = ~lengths.isfinite()
        labels = torch.zeros(view.targets, dtype=torch.int64, device=lengths.device)
        labels[~failed] = _longer(lengths[~failed]).long()
        return Guess(scores=lengths.unsqueeze(1), labels=labels.unsqueeze(1), failed=failed)


def _longer(lengths: Float[Tensor, " targets"]) -> Bool[Tensor, " targets"]:
    """Return which lengths are the upper of two groups with the least spread of logarithms."""
    order = lengths.clamp(min=torch.finfo(lengths.dtype).tiny).double().log().sort()
    count = len(order.values)
    if count < _LEAST:
        return torch.zeros_like(lengths, dtype=torch.bool)
    below = torch.arange(1, count, device=lengths.device)
    sums = order.values.cumsum(0)
    means = sums[:-1] / below, (sums[-1] - sums[:-1]) / (count - below)
    between = below * (count - below) * (means[1] - means[0]).square()
    upper = torch.zeros_like(lengths, dtype=torch.bool)
    upper[order.indices[int(between.argmax()) + 1 :]] = True
    return upper
