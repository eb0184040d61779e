"""The cosine score: gradients at the cut of two labels point away from each other.

With two labels the error of a sample has one sign for one label and the other for the other, and
the gradient is the error times how the output moves, which is much the same for all samples. So one
gradient of a known label tells all others: the score is their cosine with it.

Source: Li, Sun, Yang, Gao, Zhang, Xie, Smith, Wang, *Label Leakage and Protection in Two-Party
Split Learning*, ICLR 2022, https://arxiv.org/abs/2102.08504 (section 3.3), and its code,
https://github.com/OscarcarLi/label-protection.

What the direction is compared with is declared, because it decides the threat model:
- ``"known"`` (published): gradients of samples known to have label 1; the mean of the cosines where
  several are known. Known samples of label 0 are not used.
- ``"rarer"`` (ours): no label is known. The strongest direction of all unit gradients parts them in
  two, and the side with fewer is label 1: it needs labels that are rare.

Departures:
- All attacked samples are scored together, where the paper scores each batch.
- The paper only scores. A cosine above 0 is guessed to be label 1, as its argument says.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from attacks.binary_gradients import binary_gradients
from leakbed.contracts import (
    Evidence,
    Guess,
    Knowledge,
    MissingKnowledgeError,
    Seat,
    ThreatModel,
    UnfitViewError,
    View,
)
from leakbed.naming import unknown
from leakbed.seeds import derive, scoped

REFERENCES = ("known", "rarer")
SEATS = ("client", "server")
_LEAST = 2  # a single gradient has no rarer side


@dataclass(frozen=True, kw_only=True)
class CosineScore:
    """Label scores by the direction of cut gradients.

    Attributes:
        reference: ``"known"`` compares with known samples of label 1 (published), ``"rarer"`` with
            the rarer side of the strongest direction.
        seat: The ``"client"`` where the server holds the labels (published); the ``"server"`` where
            nodes hold the head.
    """

    reference: str = "known"
    seat: str = "client"

    name: ClassVar[str] = "cosine-score"
    source: ClassVar[str] = "Li et al., ICLR 2022, https://arxiv.org/abs/2102.08504"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is none of its legal values.
        """
        if self.reference not in REFERENCES:
            raise ValueError(unknown("reference", self.reference, REFERENCES))
        if self.seat not in SEATS:
            raise ValueError(unknown("seat", self.seat, SEATS))

    @property
    def threat(self) -> ThreatModel:
        """A party that receives the gradient at the cut, and may know a few labels."""
        known = self.reference == "known"
        return ThreatModel(
            seat=Seat(self.seat),
            evidence=frozenset({Evidence.CUT_GRADIENT}),
            needs=frozenset({Knowledge.KNOWN_LABELS}) if known else frozenset(),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Score every sample.

        Args:
            view: With ``cut_gradient``, in two classes, and ``known_labels`` if compared with them.
            seed: Draws where the search for the strongest direction starts.

        Returns:
            Scores in [-1, 1] and labels; a gradient that is not finite is a failure.
        """
        gradients = binary_gradients(view, name=self.name)
        failed = ~gradients.isfinite().all(1)
        unit = normalize(torch.where(failed.unsqueeze(1), 0.0, gradients), dim=1)
        if self.reference == "known":
            reference = unit[self._known(view, ~failed)].mean(0)
        else:
            reference = _rarer(unit, seed)
        scores = unit @ reference
        labels = (scores > 0).long()
        return Guess(
            scores=torch.where(failed, torch.nan, scores).unsqueeze(1),
            labels=labels.unsqueeze(1),
            failed=failed,
        )

    def _known(self, view: View, usable: Bool[Tensor, " targets"]) -> Bool[Tensor, " targets"]:
        """Return which usable gradients are known to have label 1."""
        known = None if view.known_labels is None else usable & (view.known_labels[:, 0] == 1)
        if known is None or not bool(known.any()):
            raise MissingKnowledgeError(
                "cosine-score compares gradients with one of a sample known to have label 1, and "
                "the view has none; set known_per_class = 1, attack more targets so that label 1 "
                "is among them, or compare with the 'rarer' side"
            )
        return known


def _rarer(unit: Float[Tensor, " targets features"], seed: int) -> Float[Tensor, " features"]:
    """Return the strongest direction of all gradients, towards the side that has fewer."""
    if len(unit) < _LEAST:
        raise UnfitViewError(
            "cosine-score finds the rarer side of several gradients and the view has one; attack "
            "more targets"
        )
    with scoped(derive(seed, "strongest-direction")):
        _, _, directions = torch.svd_lowrank(unit, q=min(6, *unit.shape))
    strongest = directions[:, 0]
    ahead = int((unit @ strongest > 0).sum())
    return strongest if 2 * ahead <= len(unit) else -strongest
