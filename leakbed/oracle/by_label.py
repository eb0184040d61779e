"""Scores label by label: which classes of samples an attack reads, and which it does not."""

from __future__ import annotations

from statistics import fmean

from leakbed.oracle.scores import Scores
from leakbed.oracle.truth import Truth


def by_label(scores: Scores, truth: Truth) -> dict[int, dict[str, float]]:
    """Return the mean of every metric over the targets of each true label.

    Args:
        scores: Of a guess.
        truth: It was scored against.

    Returns:
        By label, those without a target left out; empty where a target hides several samples.
    """
    if truth.rows != 1:
        return {}
    labels = truth.labels.flatten().tolist()
    return {
        label: {
            name: fmean(
                value for value, own in zip(summary.values, labels, strict=True) if own == label
            )
            for name, summary in scores.metrics.items()
        }
        for label in sorted(set(labels))
    }
