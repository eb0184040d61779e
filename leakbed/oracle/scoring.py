"""Score a guess against the truth: match rows, measure every metric, count failures.

Each target's guessed rows are matched to its true rows, every image is measured, and a target's
score is the mean over its rows. Metrics that read absolute intensities (MSE, PSNR, SSIM) see the
guess clipped to [0, 1]. Those that forgive scale and polarity (correlation, identification, affine
MSE) see it as the attack returned it: clipping an inverted digit in [-1, 0] would turn it black and
call a recovered shape a failure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leakbed import metrics
from leakbed.contracts import Guess
from leakbed.metrics import BEST_IS_ONE, binomial_interval
from leakbed.oracle.grouping import best_named
from leakbed.oracle.matching import match_images, match_labels
from leakbed.oracle.ranking import leak_auc, ranked
from leakbed.oracle.scores import Scores, Summary, best_evidence_free, summarise
from leakbed.oracle.truth import GuessShapeError, Truth

GREY = 0.5
"""What a failed target scores as: the constant image that knows nothing, not a missing number."""


def score(guess: Guess, truth: Truth, *, baselines: Mapping[str, Scores] | None = None) -> Scores:
    """Score a guess with every metric it allows.

    Labels and attributes follow the order in which the images matched. Where there are no usable
    images, as many labels of a target agree as can (its labels as a multiset), and likewise as many
    attributes. Clusters get the best names there are. Scores rank samples only where a target hides
    one, of two labels both there.

    Args:
        guess: What the attack returned.
        truth: The private samples of the same targets.
        baselines: From :func:`leakbed.oracle.baselines` of the same truth; adds the skills.

    Returns:
        One summary per metric; none at all for a guess of nothing that is scored.

    Raises:
        GuessShapeError: The guess has another number of targets or rows, other image sizes, or
            attributes where the truth names none.
    """
    if mismatch := _mismatch(guess, truth):
        raise GuessShapeError(mismatch)
    gave_up = _gave_up(guess, truth)
    found: dict[str, Summary] = {}
    usable, order = ~gave_up, None
    if guess.images is not None:
        images = guess.images.detach().to(truth.images.device)
        usable = usable & images.isfinite().flatten(1).all(1)
        images = torch.where(usable[:, None, None, None, None], images, GREY)
        order = match_images(images, truth.images)
        found |= _image_summaries(_reorder(images, order), truth)
    hits = _label_hits(guess, truth, order=order, ordered=usable, gave_up=gave_up)
    found |= {name: _rate(each & ~gave_up[:, None]) for name, each in hits.items()}
    if guess.scores is not None and ranked(truth):
        ranks = guess.scores.detach().to(truth.labels.device).flatten()
        usable = usable & ranks.isfinite()
        found["leak_auc"] = leak_auc(ranks, truth.labels.flatten(), usable=usable)
    scores = Scores(
        metrics={name: found[name] for name in metrics.HIGHER_LEAKS_MORE if name in found},
        targets=truth.targets,
        rows=truth.rows,
        candidates=len(truth.candidates),
        failures=int((~usable).sum()),
    )
    return with_skill(scores, baselines) if baselines else scores


def with_skill(scores: Scores, baselines: Mapping[str, Scores]) -> Scores:
    """Return the scores with ``<metric>_skill`` beside every metric that has one.

    A metric whose best baseline is perfect already (one class only) gets no skill.

    Args:
        scores: Scores of a guess.
        baselines: Baselines of the same truth.

    Returns:
        The scores and their skills.
    """
    found = dict(scores.metrics)
    for name in BEST_IS_ONE:
        best = best_evidence_free(baselines, name)
        if name in scores.metrics and best is not None and best[1] < 1:
            values = [metrics.skill(value, best[1]) for value in scores.metrics[name].values]
            found[f"{name}_skill"] = summarise(torch.tensor(values, dtype=torch.float64))
    return replace(scores, metrics=found)


def _mismatch(guess: Guess, truth: Truth) -> str | None:
    """Say what shows that a guess is not about these targets."""
    if guess.attributes is not None and truth.attribute is None:
        return (
            "the guess has attributes and the truth names none; ask the answer key for the truth "
            "with the attribute that the attack infers"
        )
    wanted = {
        "images": tuple(truth.images.shape),
        "labels": tuple(truth.labels.shape),
        "clusters": tuple(truth.labels.shape),
        "scores": tuple(truth.labels.shape),
        "attributes": tuple(truth.labels.shape),
        "failed": (truth.targets,),
    }
    for name, shape in wanted.items():
        value: Tensor | None = getattr(guess, name)
        if value is not None and tuple(value.shape) != shape:
            return (
                f"the guess's {name} have shape {tuple(value.shape)}, the truth's {shape}; an "
                "attack answers for every target and row of its view, in the view's order"
            )
    return None


def _gave_up(guess: Guess, truth: Truth) -> Bool[Tensor, " targets"]:
    """Return the targets on which the attack itself says that it broke down."""
    if guess.failed is None:
        return torch.zeros(truth.targets, dtype=torch.bool, device=truth.images.device)
    return guess.failed.to(truth.images.device)


def _label_hits(
    guess: Guess,
    truth: Truth,
    *,
    order: Int[Tensor, " targets rows"] | None,
    ordered: Bool[Tensor, " targets"],
    gave_up: Bool[Tensor, " targets"],
) -> dict[str, Bool[Tensor, " targets rows"]]:
    """Return what is right of everything that is guessed of labels, by metric."""
    found: dict[str, Tensor] = {}
    for name, own, true in (
        ("label_accuracy", guess.labels, truth.labels),
        ("attribute_accuracy", guess.attributes, truth.attributes),
    ):
        if own is not None and true is not None:
            found[name] = _hits(own.to(true.device), true, order=order, ordered=ordered)
    if guess.clusters is not None:
        clusters = guess.clusters.to(truth.labels)
        found["cluster_accuracy"] = best_named(clusters, truth.labels, usable=~gave_up)
    return found


def _hits(
    guessed: Int[Tensor, " targets rows"],
    true: Int[Tensor, " targets rows"],
    *,
    order: Int[Tensor, " targets rows"] | None,
    ordered: Bool[Tensor, " targets"],
) -> Bool[Tensor, " targets rows"]:
    """Return where values agree, in the images' order or, without one, where as many as can do."""
    if true.shape[1] == 1:  # one sample has one order, and thousands of targets are slow to match
        return guessed == true
    freely = match_labels(guessed, true)
    chosen = freely if order is None else torch.where(ordered[:, None], order, freely)
    return guessed.gather(1, chosen) == true


def _reorder(
    images: Float[Tensor, " targets rows channels height width"],
    order: Int[Tensor, " targets rows"],
) -> Float[Tensor, " targets rows channels height width"]:
    """Return each target's rows in the given order."""
    return images[torch.arange(len(images), device=images.device)[:, None], order]


def _image_summaries(
    guess: Float[Tensor, " targets rows channels height width"], truth: Truth
) -> dict[str, Summary]:
    """Measure every image metric of matched rows."""
    raw, true = guess.flatten(0, 1), truth.images.flatten(0, 1)
    clipped = raw.clamp(0, 1)
    per_image = {
        "abs_pearson": metrics.abs_pearson(raw, true),
        "ssim": metrics.ssim(clipped, true),
        "mse": metrics.mse(clipped, true),
        "psnr": metrics.psnr(clipped, true),
        "affine_mse": metrics.affine_mse(raw, true),
    }
    hits = metrics.identification(raw, truth.candidates, truth.positions.flatten())
    shape = (truth.targets, truth.rows)
    found = {name: summarise(values.view(shape).mean(1)) for name, values in per_image.items()}
    return {"identification": _rate(hits.view(shape)), **found}


def _rate(hits: Bool[Tensor, " targets rows"]) -> Summary:
    """Summarise hits and misses, with the exact interval over all rows taken as independent."""
    interval = binomial_interval(int(hits.sum()), hits.numel())
    return summarise(hits.double().mean(1), interval=interval)
