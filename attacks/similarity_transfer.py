"""Similarity attack by transfer: a party embeds its own inputs with a model trained on other data.

A small network learns public images and their labels; all but its last layer then maps the party's
own inputs, which fall near others of their class, and a few known samples name them. No message is
read: a feature party knows this much before the protocol begins, so only what other attacks find
beyond it is the protocol's leak.

Source: meant as the third attack of Liu, Lyu, Cui, Tao, *Similarity-Based Label Inference Attack
Against Training and Inference of Split Learning*, IEEE TIFS 2024, https://arxiv.org/abs/2203.05222.
**Its definition could not be read**: the paper's text was not available to us, and its code has
only left-overs of such an attack (feature extractors trained on ImageNet, batch sizes called
"transfer"). What follows is our choice and must not be taken for the paper's:
- The extractor is trained on the adversary's public images; nothing is downloaded. With
  ``data.public_from`` these are another data set. Without it they are of the same distribution and
  have the same labels, the best that such a party can hope for.
- The network is ``two-blocks``, small enough to train beside every cell.
- Embeddings are compared by direction, like the published code's smashed data.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attacks.owned_images import owned_images
from attacks.similarity_clustering import SimilarityClustering
from attacks.similarity_distance import SimilarityDistance
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
from leakbed.models import Architecture
from leakbed.naming import unknown
from leakbed.seeds import derive, generator

BY = ("clustering", "distance")
_LEAST = 4  # pixels a side, which two pools halve twice
_CHUNK = 512  # images embedded at once


@dataclass(frozen=True, kw_only=True)
class SimilarityTransfer:
    """Label inference from a party's own inputs and a public extractor.

    Attributes:
        by: How embeddings get labels: ``"clustering"`` or ``"distance"``, see the attacks of those
            names.
        epochs: Passes over the public images.
        batch_size: Public images in one step.
        rate: Adam's step size.
        partial: Let pass that no label of some class is known; such a class is then never guessed.
    """

    by: str = "clustering"
    epochs: int = 10
    batch_size: int = 64
    rate: float = 1e-3
    partial: bool = False

    name: ClassVar[str] = "similarity-transfer"
    source: ClassVar[str] = "after Liu et al., IEEE TIFS 2024, https://arxiv.org/abs/2203.05222"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is none of its legal values.
        """
        if self.by not in BY:
            raise ValueError(unknown("by", self.by, BY))
        if min(self.epochs, self.batch_size) < 1 or self.rate <= 0:
            raise ValueError(
                f"epochs = {self.epochs}, batch_size = {self.batch_size} and rate = {self.rate} "
                "must all be positive"
            )

    @property
    def threat(self) -> ThreatModel:
        """A feature party before the protocol begins."""
        return ThreatModel(
            seat=Seat.CLIENT,
            evidence=frozenset({Evidence.NOTHING}),
            needs=frozenset(
                {Knowledge.OWN_IMAGES, Knowledge.PUBLIC_IMAGES, Knowledge.KNOWN_LABELS}
            ),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Guess the label of every input.

        Args:
            view: With ``own_images``, ``public_images``, ``public_labels`` and ``known_labels``.
            seed: Draws the extractor, the order of its images and the starts of k-means.

        Returns:
            Labels, or clusters where none is known and ``by`` allows it.

        Raises:
            MissingKnowledgeError: Inputs, public images or their labels are missing.
            UnfitViewError: Inputs are too small for its network.
        """
        if view.own_images is None:
            raise MissingKnowledgeError(
                "similarity-transfer embeds the party's own inputs and the view has none; only a "
                "feature party, seat 'client', has them"
            )
        if min(view.image_shape[1:]) < _LEAST:
            raise UnfitViewError(
                f"similarity-transfer trains convolutions with pools, and these inputs are "
                f"{view.image_shape[1]}x{view.image_shape[2]}, under {_LEAST}x{_LEAST}; use "
                "another attack on tables and narrow strips"
            )
        images, labels = owned_images(view)
        if labels is None:
            raise MissingKnowledgeError(
                "similarity-transfer trains on public labels and the view has none"
            )
        extractor = self._trained(images, labels, stream=derive(seed, "extractor"))
        with torch.no_grad():
            parts = view.own_images.split(_CHUNK)
            embedded = torch.cat([extractor(part).flatten(1) for part in parts])
        kind = SimilarityClustering if self.by == "clustering" else SimilarityDistance
        attack = kind(evidence="smashed", unified=True, partial=self.partial)
        return attack.run(replace(view, smashed=embedded), seed=derive(seed, "compare"))

    def _trained(
        self,
        images: Float[Tensor, " public channels height width"],
        labels: Int[Tensor, " public"],
        *,
        stream: int,
    ) -> nn.Sequential:
        """Return all but the last layer of a network that has learned the public images."""
        channels, height, width = images.shape[1:]
        architecture = Architecture(
            name="two-blocks",
            image_shape=(channels, height, width),
            num_classes=int(labels.max()) + 1,
        )
        network = architecture.build(derive(stream, "weights")).to(images.device)
        adam = torch.optim.Adam(network.parameters(), lr=self.rate)
        order = generator(derive(stream, "order"))
        for _ in range(self.epochs):
            for rows in torch.randperm(len(images), generator=order).split(self.batch_size):
                if len(rows) == 1 and len(images) > 1:
                    continue  # BatchNorm has no spread of one image
                adam.zero_grad()
                loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
                loss.backward()
                adam.step()
        return network.eval()[:-1]
