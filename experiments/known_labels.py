"""What of the truth an attack is told, and what of its guess is left to be scored.

Some attacks know the labels of a few attacked samples: a party knows some of its own customers.
The harness tells them the first targets of each class, in the order the messages were sent, and
scores the others alone: a label that was given is no leak. A feature party has its own inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiments.guesses import picked
from leakbed.contracts import Guess, Knowledge, ThreatModel
from leakbed.oracle.answer_key import AnswerKey
from leakbed.targets import MisfitError, Target


@dataclass(frozen=True, kw_only=True, eq=False)
class Told:
    """The truth an attack is given; None for what its threat model does not name.

    Attributes:
        labels: Of every target.
        known_labels: Of a few targets, -1 elsewhere.
        own_images: The inputs behind the targets.
    """

    labels: Int[Tensor, " targets rows"] | None = None
    known_labels: Int[Tensor, " targets rows"] | None = None
    own_images: Float[Tensor, " targets channels height width"] | None = None


def tell(
    threat: ThreatModel,
    targets: Sequence[Target],
    answers: Path | None,
    *,
    known_per_class: int | None,
) -> Told:
    """Open the answer key for as much as a threat model grants, and no further.

    Args:
        threat: The attack's.
        targets: Its targets.
        answers: The answer key; None where there is none, and then nothing is told.
        known_per_class: How many targets of each class are known; None is 1.

    Returns:
        What it is given.
    """
    needed = threat.needs & {Knowledge.LABELS, Knowledge.KNOWN_LABELS, Knowledge.OWN_IMAGES}
    count = 1 if known_per_class is None else known_per_class
    known = None
    if Knowledge.KNOWN_LABELS in needed and count == 0:
        known = torch.full((len(targets), 1), -1)
    if answers is None or needed <= ({Knowledge.KNOWN_LABELS} if count == 0 else set()):
        return Told(known_labels=known)
    key = AnswerKey.read(answers)
    labels = key.labels_of(targets)
    if Knowledge.KNOWN_LABELS in needed and count > 0:
        known = first_of_each_class(labels, count)
    return Told(
        labels=labels if Knowledge.LABELS in needed else None,
        known_labels=known,
        own_images=_inputs(key, targets) if Knowledge.OWN_IMAGES in needed else None,
    )


def _inputs(key: AnswerKey, targets: Sequence[Target]) -> Float[Tensor, " targets *image"]:
    """Return the inputs behind rows at a cut; of a party that holds strips, its own."""
    images = key.truth(targets).images
    if images.shape[1] != 1:
        raise MisfitError(
            f"{images.shape[1]} samples stand behind each message; a party is told its inputs row "
            "by row, so attack rows at a cut"
        )
    return images[:, 0]


def first_of_each_class(
    labels: Int[Tensor, " targets rows"], count: int
) -> Int[Tensor, " targets rows"]:
    """Return the labels of the first targets of each class, -1 elsewhere.

    Args:
        labels: Of all targets, in the order their messages were sent.
        count: Targets to know of each class; all of a class that has fewer.

    Returns:
        What the adversary knows.

    Raises:
        MisfitError: If several samples stand behind a target.
    """
    if labels.shape[1] != 1:
        raise MisfitError(
            f"{labels.shape[1]} samples stand behind each message; a label is known of one sample, "
            "so attack rows at a cut, or updates of one step on one sample"
        )
    flat = labels.flatten()
    known = torch.full_like(flat, -1)
    for label in flat.unique():
        first = (flat == label).nonzero().flatten()[:count]
        known[first] = label
    return known.unsqueeze(1)


def unknown_only(
    targets: Sequence[Target], guess: Guess, known_labels: Int[Tensor, " targets rows"] | None
) -> tuple[list[Target], Guess]:
    """Return what is scored: the targets whose label was not given, and the guess of them.

    Args:
        targets: All that were attacked.
        guess: Of all of them.
        known_labels: What the attack was told, -1 elsewhere; None if nothing.

    Returns:
        The others, in their order.

    Raises:
        MisfitError: If every label was given, so that nothing is left to infer.
    """
    if known_labels is None or bool((known_labels < 0).all()):
        return list(targets), guess
    unknown = (known_labels < 0).all(1)
    if not bool(unknown.any()):
        raise MisfitError(
            f"the labels of all {len(targets)} targets are known, so none is left to infer; attack "
            "more targets or lower known_per_class"
        )
    left = [target for target, free in zip(targets, unknown.tolist(), strict=True) if free]
    return left, picked(guess, unknown)
