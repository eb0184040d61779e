"""What every score is worth without evidence: guesses that no message was needed for.

Each baseline is a guess scored like any attack's, matching included. ``nearest-public`` alone looks
at the truth to choose (the public image of highest |Pearson|): it says what owning the distribution
is worth at best, is printed beside the others, and never enters the skill or the control.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from scipy.stats import binom
from torch import Tensor

from leakbed.attributes import Attribute
from leakbed.contracts import Guess
from leakbed.metrics import correlations
from leakbed.oracle.ranking import GUESSING, ranked
from leakbed.oracle.scores import Scores, Summary, summarise
from leakbed.oracle.scoring import GREY, score
from leakbed.oracle.truth import Truth, derange

_MOST_NEAREST = 5000
"""Samples whose nearest public image is looked for: of an epoch of 60,000 it would take minutes."""


def baselines(
    truth: Truth, *, unordered_labels: bool = False, clusters: bool = False
) -> dict[str, Scores]:
    """Score every guess that needs no evidence.

    Args:
        truth: The private samples to guess.
        unordered_labels: Whether the attack guesses labels or attributes without images, so that
            a target's count as a multiset; chance is then higher. Images are then not scored: of
            thousands of samples that would take longer than the attack.
        clusters: Whether it guesses which samples share a label; labels then count as clusters too.

    Returns:
        Scores by baseline: ``constant`` (0.5), ``public-intensity`` (each channel's public mean:
        the constant of lowest expected MSE), ``mean-public`` (the mean image), ``another-row``
        (another target's true samples), ``nearest-public``, ``chance``, ``majority-label``,
        ``majority-attribute`` (both of the public images).
        Baselines that nothing is known for (no public images, a single private image) are left out,
        and ``nearest-public`` of more than 5,000 samples.
    """
    found = {}
    for name, guess in _guesses(truth).items():
        asked = replace(
            guess,
            images=None if unordered_labels else guess.images,
            clusters=guess.labels if clusters else None,
        )
        scores = score(asked, truth)
        if scores.metrics:
            found[name] = scores
    found["chance"] = _chance(truth, unordered=unordered_labels)
    return found


def _guesses(truth: Truth) -> dict[str, Guess]:
    """Return every evidence-free guess that can be formed."""
    found = {"constant": Guess(images=torch.full_like(truth.images, GREY))}
    other = _another_row(truth)
    if other is not None:
        found["another-row"] = other
    public = truth.public_images
    if public is not None:
        intensity = public.mean((0, 2, 3))[:, None, None]
        found["public-intensity"] = Guess(images=intensity.expand_as(truth.images))
        found["mean-public"] = Guess(images=public.mean(0).expand_as(truth.images))
        if truth.labels.numel() <= _MOST_NEAREST:
            found["nearest-public"] = _nearest(truth, public)
    if truth.public_labels is not None:
        majority = torch.bincount(truth.public_labels).argmax()
        found["majority-label"] = Guess(labels=majority.expand_as(truth.labels))
    if truth.attribute is not None:
        found |= _attributes(truth, truth.attribute, found)
    return found


def _attributes(truth: Truth, attribute: Attribute, found: Mapping[str, Guess]) -> dict[str, Guess]:
    """Return the guesses that have labels with their attributes too, and the majority's."""
    told = {
        name: replace(guess, attributes=attribute.of(guess.labels))
        for name, guess in found.items()
        if guess.labels is not None and name != "majority-label"
    }
    if truth.public_labels is not None:
        majority = torch.bincount(attribute.of(truth.public_labels)).argmax()
        told["majority-attribute"] = Guess(attributes=majority.expand_as(truth.labels))
    return told


def _another_row(truth: Truth) -> Guess | None:
    """Return another target's samples; for a single target, other candidates (labels unknown)."""
    if truth.targets > 1:
        order = derange(truth.targets)
        return Guess(images=truth.images[order], labels=truth.labels[order])
    free = torch.ones(len(truth.candidates), dtype=torch.bool)
    free[truth.positions.flatten()] = False
    others = truth.candidates[free]
    if len(others) < truth.rows:
        return None
    return Guess(images=others[None, : truth.rows])


def _nearest(truth: Truth, public: Tensor) -> Guess:
    """Return the public image nearest to each true one by |Pearson|, with its label."""
    nearest = correlations(truth.images.flatten(0, 1), public).argmax(1).view(truth.labels.shape)
    labels = truth.public_labels[nearest] if truth.public_labels is not None else None
    return Guess(images=public[nearest], labels=labels)


def _chance(truth: Truth, *, unordered: bool) -> Scores:
    """Return the expected scores of a uniform draw: no guess is drawn, so nothing is random."""
    identified = torch.full((truth.targets,), 1 / len(truth.candidates))
    expected: dict[str, Summary] = {
        "identification": summarise(identified),
        "label_accuracy": _uniform(truth.labels, truth.num_classes, unordered=unordered),
    }
    if ranked(truth):
        expected["leak_auc"] = summarise(torch.full((truth.targets,), GUESSING))
    if truth.attribute is not None and truth.attributes is not None:
        values = len(truth.attribute.values)
        expected["attribute_accuracy"] = _uniform(truth.attributes, values, unordered=unordered)
    return Scores(
        metrics=expected,
        targets=truth.targets,
        rows=truth.rows,
        candidates=len(truth.candidates),
    )


def _uniform(values: Tensor, count: int, *, unordered: bool) -> Summary:
    """Return the expected share of values that uniform draws among so many agree with."""
    if unordered and values.shape[1] > 1:
        return summarise(torch.tensor([_multiset_chance(row, count) for row in values]))
    return summarise(torch.full((len(values),), 1 / count))


def _multiset_chance(labels: Tensor, num_classes: int) -> float:
    """Return the expected share of a multiset of labels that uniform labels cover.

    The number of uniform labels in a class is binomial; class by class, it covers at most as many
    as there are.
    """
    rows = len(labels)
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    chances = binom.pmf(range(rows + 1), rows, 1 / num_classes)
    covered = sum(
        chance * min(drawn, count) for count in counts for drawn, chance in enumerate(chances)
    )
    return float(covered / rows)
