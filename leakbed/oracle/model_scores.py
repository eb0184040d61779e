"""Scores that need a network: stolen models, inferred attributes, generated images of a class.

**Stolen bottoms.** The adversary holds the top already, so a stolen bottom is worth what the two do
together. Published code composes the victim's bottom with the clone's untouched top instead, which
measures nothing that was stolen, and draws its test images with replacement; here every test image
counts once.

**The probe** is the baseline of inferred attributes. An adversary that infers an attribute is worth
what it finds beyond this: whoever knew the attribute of some smashed rows of honest training would
fit a linear head to them and read the others.

**Generated images** should show a class, not any one private sample, so no original stands beside
them. A judge, a classifier trained on all private rows and
measured on held-out ones, says whether it shows the class; its nearest private image of the class
by |Pearson| says how real it looks; its mean distance to the other images says whether there is
more than one of them. Each number stands beside held-out images of the class and of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam

from leakbed.models import Architecture
from leakbed.models.networks import FlattenLinear
from leakbed.oracle.metrics import binomial_interval, correlations
from leakbed.oracle.scoring import Scores, Summary, summarise
from leakbed.seeds import generator, scoped
from leakbed.tensors import predicted

if TYPE_CHECKING:
    import numpy as np

_BATCH = 256  # test images in one forward pass; bounds memory at the widest layer


@dataclass(frozen=True, kw_only=True)
class CloneScores:
    """What stolen bottoms do under the server's top.

    Attributes:
        accuracy: Test accuracy of each clone; higher leaks more.
        agreement: Share of test images on which a clone predicts what the victim predicts.
        untrained_accuracy: Accuracy of a bottom that nothing was fitted to.
        untrained_agreement: Its agreement with the victim.
        victim_accuracy: Accuracy of the victim's own bottom: the upper bound.
        images: Test images behind each number.
    """

    accuracy: Summary
    agreement: Summary
    untrained_accuracy: float
    untrained_agreement: float
    victim_accuracy: float
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as plain JSON values, for a card."""
        return {
            "accuracy": self.accuracy.as_dict(),
            "agreement": self.agreement.as_dict(),
            "untrained_accuracy": self.untrained_accuracy,
            "untrained_agreement": self.untrained_agreement,
            "victim_accuracy": self.victim_accuracy,
            "images": self.images,
        }


def score_clones(
    clones: Mapping[str, Tensor],
    *,
    architecture: Architecture,
    victim_bottom: nn.Module,
    server_top: nn.Module,
    images: Float[Tensor, " images channels height width"],
    labels: Int[Tensor, " images"],
    stream: int,
    limit: int = 1000,
) -> CloneScores:
    """Measure each clone under the server's top, beside the victim and an untrained bottom.

    Buffers that a clone does not bring (BatchNorm statistics) are those of a fresh bottom. A clone
    with non-finite outputs predicts class 0, as a failure would.

    Args:
        clones: Parameters of one stolen bottom per target, stacked, named as in the bottom.
        architecture: The layers the bottoms share.
        victim_bottom: The node's own bottom.
        server_top: The part the server holds.
        images: Test images; only the first ``limit`` count.
        labels: Their labels.
        stream: Seed of the untrained bottom, unlike the victim's and the adversary's.
        limit: Most test images to use.

    Returns:
        Accuracy and agreement per clone, and what to compare them with.
    """
    images, labels = images[:limit], labels[:limit]
    fresh = architecture.bottom(stream).to(images.device).eval()
    top, victim = deepcopy(server_top).eval(), deepcopy(victim_bottom).eval()
    true = _predictions(victim, {}, top=top, images=images)
    untrained = _predictions(fresh, {}, top=top, images=images)
    targets = len(next(iter(clones.values())))
    stolen = torch.stack(
        [
            _predictions(fresh, _one(clones, index), top=top, images=images)
            for index in range(targets)
        ]
    )
    return CloneScores(
        accuracy=summarise((stolen == labels).double().mean(1)),
        agreement=summarise((stolen == true).double().mean(1)),
        untrained_accuracy=_share(untrained, labels),
        untrained_agreement=_share(untrained, true),
        victim_accuracy=_share(true, labels),
        images=len(images),
    )


def _predictions(
    bottom: nn.Module, weights: Mapping[str, Tensor], *, top: nn.Module, images: Tensor
) -> Tensor:
    """Return each image's class under a bottom with other weights; -1 where nothing is finite."""
    with torch.no_grad():
        logits = [
            top(functional_call(bottom, dict(weights), (batch,)))
            for batch in torch.split(images, _BATCH)
        ]
    return predicted(torch.cat(logits))


def _one(clones: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """Return the parameters of one clone of the stack."""
    return {name: value[index].detach() for name, value in clones.items()}


def _share(first: Tensor, second: Tensor) -> float:
    """Return the share of places in which two rows of classes agree."""
    return float((first == second).double().mean())


_STEPS = 1000  # of the fit; about a hundred suffice for 3,000 features


def linear_probe(
    smashed: Float[Tensor, " rows *cut"],
    values: Int[Tensor, " rows"],
    *,
    samples: Int[Tensor, " rows"],
    stream: int,
) -> dict[str, Any]:
    """Fit a logistic regression to half of the samples and score it on the other half.

    Features are scaled to unit variance; the penalty is scikit-learn's own, chosen on nothing.

    Args:
        smashed: Rows of honest training.
        values: The attribute of each.
        samples: Which sample each row is of: rows of one sample are on one side.
        stream: Draws the halves.

    Returns:
        ``attribute_accuracy`` with its spread as of any score, over ``targets`` rows, and how many
        others it was ``fitted`` to; nothing where there are too few samples to halve.
    """
    fitted = _half(samples, stream)
    if not fitted.any() or fitted.all():
        return {}
    features = smashed.flatten(1).double().numpy()
    fit, test = fitted.numpy(), ~fitted.numpy()
    guessed = _told(features[fit], values.numpy()[fit], features[test])
    hits = torch.from_numpy(guessed == values.numpy()[test])
    interval = binomial_interval(int(hits.sum()), hits.numel())
    return {
        "attribute_accuracy": summarise(hits.double(), interval=interval).as_dict(),
        "targets": hits.numel(),
        "rows": 1,
        "fitted": int(fitted.sum()),
    }


def _half(samples: Int[Tensor, " rows"], stream: int) -> Bool[Tensor, " rows"]:
    """Return which rows a probe is fitted to: those of a random half of the samples."""
    known = torch.unique(samples)
    order = torch.randperm(len(known), generator=generator(stream))
    return torch.isin(samples, known[order[: len(known) // 2]])


def _told(features: np.ndarray, values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the values of other rows, by a line fitted to these; one value alone needs no line."""
    from sklearn.dummy import DummyClassifier  # noqa: PLC0415  a second to import
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    several = len(set(values.tolist())) > 1
    head = LogisticRegression(max_iter=_STEPS) if several else DummyClassifier()
    guessed: np.ndarray = (
        make_pipeline(StandardScaler(), head).fit(features, values).predict(others)
    )
    return guessed


REAL = "real-images"
"""The baseline that no generator need beat: held-out images of the class itself."""

_STEPS, _BATCH, _RATE = 600, 64, 2e-3  # 97 % on the held-out tenth of mnist-5k, in 10 seconds
_CHUNK = 256


class NoSuchImagesError(ValueError):
    """There are no real images of the class to compare with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """A classifier of the oracle's own.

    Attributes:
        network: In evaluation.
        accuracy: On held-out images.
        rows: Private images it was trained on.
        held_out: Images behind the accuracy.
    """

    network: nn.Module
    accuracy: float
    rows: int
    held_out: int

    def says(self, images: Float[Tensor, " batch *image"], label: int) -> Bool[Tensor, " batch"]:
        """Return which images it takes for a class."""
        return _classes(self.network, images) == label


def train_judge(
    images: Float[Tensor, " rows *image"],
    labels: Int[Tensor, " rows"],
    *,
    test_images: Float[Tensor, " test *image"],
    test_labels: Int[Tensor, " test"],
    num_classes: int,
    stream: int,
) -> Judge:
    """Train a judge.

    Args:
        images: All private rows.
        labels: Their labels.
        test_images: Held-out rows.
        test_labels: Their labels.
        num_classes: Number of labels.
        stream: Draws its weights and batches.

    Returns:
        The judge, with its accuracy.

    Raises:
        NoSuchImagesError: If nothing is held out.
    """
    if not len(test_images):
        raise NoSuchImagesError(
            "no row is held out, so nobody can say what the judge is worth; leave data.test to "
            "its default or set it above 0"
        )
    with scoped(stream):
        network = _network(images.shape[1:], num_classes)
        adam = Adam(network.parameters(), lr=_RATE)
        for _ in range(_STEPS):
            rows = torch.randint(len(images), (_BATCH,))
            adam.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            adam.step()
    right = _classes(network.eval(), test_images) == test_labels
    return Judge(
        network=network,
        accuracy=float(right.double().mean()),
        rows=len(images),
        held_out=len(test_images),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Prototypes:
    """The class that images should show, and how to tell.

    Attributes:
        judge: Tells classes apart.
        label: The class.
        num_classes: How many there are.
        real: Private images of the class.
        held_out: Held-out images of the class.
        others: Held-out images of other classes.
    """

    judge: Judge
    label: int
    num_classes: int
    real: Float[Tensor, " real *image"]
    held_out: Float[Tensor, " held *image"]
    others: Float[Tensor, " others *image"]

    def __post_init__(self) -> None:
        """Check that there is something to compare with.

        Raises:
            NoSuchImagesError: If the class has fewer than two private or held-out images.
        """
        few = {"private": len(self.real), "held-out": len(self.held_out)}
        for name, count in few.items():
            if count < 2:  # noqa: PLR2004  one image has no distance to another
                raise NoSuchImagesError(
                    f"there are {count} {name} images of class {self.label}, too few to compare "
                    "with; take another class or more data"
                )

    def score(self, images: Float[Tensor, " count *image"]) -> Scores:
        """Score images.

        Args:
            images: Two or more; clipped to [0, 1].

        Returns:
            ``class_rate`` with its exact interval, ``nearest_real`` and ``diversity``, where 1 is
            that of the private images of the class.
        """
        finite = images.isfinite().flatten(1).all(1)
        shown = torch.where(finite[:, None, None, None], images, 0.5).clamp(0, 1)
        hits = self.judge.says(shown, self.label) & finite
        interval = binomial_interval(int(hits.sum()), len(hits))
        spread = _distances(shown) / _distances(self.real).mean()
        return Scores(
            metrics={
                "class_rate": summarise(hits.double(), interval=interval),
                "nearest_real": summarise(correlations(shown, self.real).amax(1)),
                "diversity": summarise(spread),
            },
            targets=len(images),
            rows=1,
            candidates=len(self.real),
            failures=int((~finite).sum()),
        )

    def baselines(self) -> dict[str, Scores]:
        """Return what needs no victim: chance, real images of the class, and of other classes."""
        chance = torch.full((len(self.held_out),), 1 / self.num_classes)
        expected = Scores(
            metrics={"class_rate": summarise(chance)},
            targets=len(self.held_out),
            rows=1,
            candidates=len(self.real),
        )
        found = {"chance": expected, REAL: self.score(self.held_out)}
        return found | ({"other-classes": self.score(self.others)} if len(self.others) > 1 else {})

    def nearest(self, images: Float[Tensor, " count *image"]) -> Int[Tensor, " count"]:
        """Return which private image of the class is nearest to each image, by |Pearson|."""
        return correlations(images, self.real).argmax(1)


def _classes(network: nn.Module, images: Tensor) -> Int[Tensor, " batch"]:
    with torch.no_grad():
        return torch.cat([predicted(network(chunk)) for chunk in images.split(_CHUNK)])


def _distances(images: Tensor) -> Float[Tensor, " count"]:
    """Return the mean Euclidean distance of each image to the others."""
    flat = images.flatten(1).double()
    return torch.cdist(flat, flat).sum(1) / (len(flat) - 1)


def _network(image_shape: torch.Size, num_classes: int) -> nn.Sequential:
    """Return a small convolutional classifier, of another form than any of the catalogue's."""
    channels, height, width = image_shape
    flat = 32 * (height // 4) * (width // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        FlattenLinear(flat, 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )
