"""Baselines that read no message: a constant image, the mean public image, the majority label.

``constant-image``: every guess is the same grey. Its mean squared error is the images' own spread
around that grey, a figure that published reconstructions do not always beat.

``mean-image``: every guess is the mean of the adversary's own images, the best single guess in
squared error. A reconstruction that does not beat it has learnt nothing about its target.

``majority-label``: every guess is the most frequent label of the adversary's own images, of equally
frequent ones the smallest. On balanced data this is chance.

Own baselines.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from leakbed.contracts import (
    Evidence,
    Guess,
    Knowledge,
    MissingKnowledgeError,
    Seat,
    ThreatModel,
    View,
)


@dataclass(frozen=True, kw_only=True)
class ConstantImage:
    """Guess one grey everywhere.

    Attributes:
        value: The grey, from 0 to 1.
    """

    value: float = 0.5

    name: ClassVar[str] = "constant-image"
    source: ClassVar[str] = "own baseline: reads nothing"

    def __post_init__(self) -> None:
        """Check the setting.

        Raises:
            ValueError: The grey is outside [0, 1].
        """
        if not 0 <= self.value <= 1:
            raise ValueError(f"value is {self.value}; a grey lies between 0 and 1")

    @property
    def threat(self) -> ThreatModel:
        """Anyone: it reads nothing and knows nothing."""
        return ThreatModel(seat=Seat.EAVESDROPPER, evidence=frozenset({Evidence.NOTHING}))

    def run(self, view: View, *, seed: int) -> Guess:
        """Guess the grey for every private sample."""
        del seed
        shape = (view.targets, view.rows, *view.image_shape)
        return Guess(images=torch.full(shape, self.value, device=view.device))


@dataclass(frozen=True, kw_only=True)
class MeanImage:
    """Guess the mean public image everywhere."""

    name: ClassVar[str] = "mean-image"
    source: ClassVar[str] = "own baseline: reads nothing"

    @property
    def threat(self) -> ThreatModel:
        """Anyone who owns images of the same kind."""
        return ThreatModel(
            seat=Seat.EAVESDROPPER,
            evidence=frozenset({Evidence.NOTHING}),
            needs=frozenset({Knowledge.PUBLIC_IMAGES}),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Guess the mean for every private sample.

        Args:
            view: With ``public_images``.
            seed: Not used; nothing is random.

        Returns:
            Images.

        Raises:
            MissingKnowledgeError: There are no public images.
        """
        del seed
        if view.public_images is None or len(view.public_images) == 0:
            raise MissingKnowledgeError(
                "mean-image averages the adversary's own images and the view has none; give the "
                "adversary a public share of the data, or use constant-image"
            )
        mean = view.public_images.mean(0).to(view.device)
        return Guess(images=mean.expand(view.targets, view.rows, *mean.shape).clone())


@dataclass(frozen=True, kw_only=True)
class MajorityLabel:
    """Guess one label everywhere.

    Attributes:
        public: Count the public labels; otherwise every guess is label 0.
    """

    public: bool = True

    name: ClassVar[str] = "majority-label"
    source: ClassVar[str] = "own baseline: reads nothing"

    @property
    def threat(self) -> ThreatModel:
        """Anyone; who counts public labels owns labelled images of the same kind."""
        return ThreatModel(
            seat=Seat.EAVESDROPPER,
            evidence=frozenset({Evidence.NOTHING}),
            needs=frozenset({Knowledge.PUBLIC_LABELS}) if self.public else frozenset(),
        )

    def run(self, view: View, *, seed: int) -> Guess:
        """Guess the label for every private sample.

        Args:
            view: With ``public_labels`` where they are counted.
            seed: Not used; nothing is random.

        Returns:
            Labels.

        Raises:
            MissingKnowledgeError: The labels to count are missing.
        """
        del seed
        label = torch.zeros((), dtype=torch.int64)
        if self.public:
            if view.public_labels is None or len(view.public_labels) == 0:
                raise MissingKnowledgeError(
                    "majority-label counts the adversary's own labels and the view has none; give "
                    "the adversary a public share of the data, or set public = false"
                )
            label = view.public_labels.bincount(minlength=view.num_classes).argmax()
        labels = label.to(view.device).expand(view.targets, view.rows).clone()
        return Guess(labels=labels)
