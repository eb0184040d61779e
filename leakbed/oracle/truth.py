"""What the oracle knows: the private images and labels behind each target.

A :class:`Truth` also carries the candidates of the identification game (private images, the truths
among them) and the public images that evidence-free baselines are drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leakbed.seeds import generator


class TruthError(ValueError):
    """A truth whose parts contradict each other."""


class GuessShapeError(ValueError):
    """A guess that does not have the shape of the truth it is scored against."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """The private samples behind each target.

    Attributes:
        images: Private inputs, pixel values in [0, 1].
        labels: Their labels.
        num_classes: Number of labels, which are 0 to ``num_classes - 1``.
        candidates: Private images among which a guess must identify its truth.
        positions: Where in ``candidates`` each true image is.
        public_images: Images anyone may own, for baselines; ``None`` leaves those baselines out.
        public_labels: Their labels.
    """

    images: Float[Tensor, " targets rows channels height width"]
    labels: Int[Tensor, " targets rows"]
    num_classes: int
    candidates: Float[Tensor, " candidates channels height width"]
    positions: Int[Tensor, " targets rows"]
    public_images: Float[Tensor, " public channels height width"] | None = None
    public_labels: Int[Tensor, " public"] | None = None

    def __post_init__(self) -> None:
        """Check that the parts belong together.

        Raises:
            TruthError: There is no target, labels or positions do not fit the images, or a
                position does not hold its image.
        """
        grid = self.images.shape[:2]
        if min(grid) < 1:
            raise TruthError(f"a truth of {grid[0]} targets x {grid[1]} rows holds nothing")
        for name, value in (("labels", self.labels), ("positions", self.positions)):
            if value.shape != grid:
                raise TruthError(
                    f"{name} of shape {tuple(value.shape)} beside {grid[0]} targets x {grid[1]} "
                    "rows of images; give one per image"
                )
        if not torch.equal(self.candidates[self.positions], self.images):
            raise TruthError("the candidates do not hold the true images at `positions`")

    @classmethod
    def among(
        cls,
        private_images: Float[Tensor, " private channels height width"],
        private_labels: Int[Tensor, " private"],
        *,
        rows: Int[Tensor, " targets rows"],
        num_classes: int,
        stream: int,
        public_images: Float[Tensor, " public channels height width"] | None = None,
        public_labels: Int[Tensor, " public"] | None = None,
        limit: int = 1000,
    ) -> Truth:
        """Draw the identification candidates from all private images.

        Args:
            private_images: Every private image of the cell.
            private_labels: Their labels.
            rows: Index of the private image behind each target and row.
            num_classes: Number of labels.
            stream: Seed of the draw; targets of every attack of a cell should share it.
            public_images: Images for the baselines.
            public_labels: Their labels.
            limit: Candidates to draw; fewer when there are fewer private images, more when the
                truths alone are more.

        Returns:
            A truth whose candidates are the true images and a random draw of the others.
        """
        true = torch.unique(rows)
        order = torch.randperm(len(private_images), generator=generator(stream))
        others = order[~torch.isin(order, true)][: max(0, limit - len(true))]
        return cls(
            images=private_images[rows],
            labels=private_labels[rows],
            num_classes=num_classes,
            candidates=private_images[torch.cat([true, others])],
            positions=torch.searchsorted(true, rows),
            public_images=public_images,
            public_labels=public_labels,
        )

    @property
    def targets(self) -> int:
        """Number of attacked messages."""
        return self.images.shape[0]

    @property
    def rows(self) -> int:
        """Private samples behind each target."""
        return self.images.shape[1]

    def deranged(self) -> Truth:
        """Return the truth with every target's samples exchanged for another target's.

        Scoring a guess against it is the negative control: the guess was made from evidence of
        other data. Only defined for two targets or more.
        """
        order = derange(self.targets)
        return replace(
            self,
            images=self.images[order],
            labels=self.labels[order],
            positions=self.positions[order],
        )


def derange(count: int) -> Int[Tensor, " count"]:
    """Return an order of ``count`` things that leaves none in its place.

    A rotation by a third of the length: in a list sorted by class few meet their own class, and
    (unlike by half) no two trade places, which would count each pair of a symmetric metric twice.

    Args:
        count: How many things, at least two.

    Returns:
        The index to take for each place.

    Raises:
        TruthError: There are fewer than two things, so one would stay.
    """
    if count < 2:  # noqa: PLR2004
        raise TruthError(
            f"{count} target cannot be exchanged for another; attack two or more for a control"
        )
    return torch.arange(count).roll(max(1, count // 3))
