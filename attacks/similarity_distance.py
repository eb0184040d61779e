"""Similarity attack by distance: every sample has the label of the nearest known sample.

At a fresh model's cut the direction of a gradient says little but its label's, so cut gradients are
compared by angle; smashed data of a trained model lie near others of their class, so they are
compared by distance. One known sample of each class is enough to begin with.

Source: Liu, Lyu, Cui, Tao, *Similarity-Based Label Inference Attack Against Training and Inference
of Split Learning*, IEEE TIFS 2024, https://arxiv.org/abs/2203.05222, and its code,
https://github.com/ZeroWalker10/sl_similarity_label_inference.

Departures:
- Rows wider than ``width`` are projected at random. Published: a centred PCA fitted in one pass of
  the epoch and applied in a second, identical one (``reduction = "pca"``); no attacker has that.
- Smashed data are compared as they are, as the paper's abstract says. Published code: as directions
  (``unified = true``).
- Known samples are the first of each class and are never scored, as in this attack's own code.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attacks.similarity import LabelledRows, SimilaritySettings
from leakbed.contracts import Guess, Knowledge, MissingKnowledgeError, ThreatModel, View

_CHUNK = 8192  # rows compared at once


@dataclass(frozen=True, kw_only=True)
class SimilarityDistance(SimilaritySettings):
    """Label inference by the nearest known sample."""

    name: ClassVar[str] = "similarity-distance"
    source: ClassVar[str] = "Liu et al., IEEE TIFS 2024, https://arxiv.org/abs/2203.05222"

    @property
    def threat(self) -> ThreatModel:
        """A party that holds no labels, but knows a few of its samples' own."""
        return ThreatModel(
            seat=self.party(),
            evidence=self.reads(),
            needs=frozenset({Knowledge.KNOWN_LABELS}),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Guess the label of every sample.

        Args:
            view: With the messages of ``evidence`` and ``known_labels``.
            seed: Draws the random projection.

        Returns:
            Labels, and the distance to the nearest known sample as objective.
        """
        found = self.read(view, seed=seed, name=self.name)
        labels, distances = nearest_known(found, name=self.name)
        return Guess(
            labels=found.spread(labels, missing=0.0)[:, None],
            objective=found.spread(distances, missing=torch.inf),
            failed=~found.usable,
        )


def nearest_known(
    found: LabelledRows, *, name: str
) -> tuple[Int[Tensor, " usable"], Float[Tensor, " usable"]]:
    """Return the label of the known row nearest to each row, and how near it is.

    Args:
        found: Rows, of which a few are labelled.
        name: The attack's own, for the error.

    Returns:
        Labels and distances.

    Raises:
        MissingKnowledgeError: No label is known.
    """
    if len(found.known) == 0:
        raise MissingKnowledgeError(
            f"{name} gives every sample a known sample's label and none is known; set "
            "known_per_class = 1 or more, or use 'similarity-clustering', which also works blind"
        )
    known = found.rows[found.known]
    nearest = [torch.cdist(part, known).min(1) for part in found.rows.split(_CHUNK)]
    distances = torch.cat([each.values for each in nearest])
    return found.labels[torch.cat([each.indices for each in nearest])], distances
