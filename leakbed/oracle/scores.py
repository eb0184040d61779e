"""Numbers with their spread: what a metric says over all targets of one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from leakbed.metrics import HIGHER_LEAKS_MORE

NEEDS_TRUTH = frozenset({"nearest-public"})
"""Baselines that read the truth to choose their guess; never the best evidence-free one."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric over the targets.

    Attributes:
        mean: Over all targets, failed ones included.
        std: Sample standard deviation over targets; ``None`` for a single one.
        stderr: Standard error of the mean; ``None`` for a single target.
        values: One number per target, the mean over its rows.
        interval: Exact 95 % interval of a rate over all rows; ``None`` for other metrics.
    """

    mean: float
    std: float | None
    stderr: float | None
    values: tuple[float, ...]
    interval: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain JSON values."""
        return {
            "mean": self.mean,
            "std": self.std,
            "stderr": self.stderr,
            "values": list(self.values),
            "interval": list(self.interval) if self.interval else None,
        }


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Every metric that a guess allows.

    Attributes:
        metrics: By name; ``<name>_skill`` is the score over the best evidence-free baseline.
        targets: Attacked messages behind each mean.
        rows: Private samples behind each target.
        candidates: Private images among which identification chose.
        failures: Targets without a usable guess. They count in every mean: their images as
            mid-grey, their labels as wrong where the attack itself gave up.
    """

    metrics: Mapping[str, Summary]
    targets: int
    rows: int
    candidates: int
    failures: int = 0

    def means(self) -> dict[str, float]:
        """Return the mean of every metric."""
        return {name: summary.mean for name, summary in self.metrics.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as plain JSON values, for a card."""
        return {
            **{name: summary.as_dict() for name, summary in self.metrics.items()},
            "targets": self.targets,
            "rows": self.rows,
            "candidates": self.candidates,
            "failures": self.failures,
        }


def summarise(
    values: Float[Tensor, " targets"], *, interval: tuple[float, float] | None = None
) -> Summary:
    """Return mean and spread of one value per target.

    Args:
        values: One number per target.
        interval: Exact interval of the mean, where the values are rates.

    Returns:
        The summary; a single target has no spread.
    """
    wide = values.double()
    many = len(wide) > 1
    return Summary(
        mean=float(wide.mean()),
        std=float(wide.std()) if many else None,
        stderr=float(wide.std() / len(wide) ** 0.5) if many else None,
        values=tuple(wide.tolist()),
        interval=interval,
    )


def best_evidence_free(found: Mapping[str, Scores], metric: str) -> tuple[str, float] | None:
    """Return the name and mean of the strongest baseline that needs neither evidence nor truth.

    Args:
        found: Scores by baseline, from :func:`leakbed.oracle.baselines`.
        metric: A key of ``HIGHER_LEAKS_MORE``.

    Returns:
        ``None`` where no baseline has the metric.
    """
    means = {
        name: scores.metrics[metric].mean
        for name, scores in found.items()
        if metric in scores.metrics and name not in NEEDS_TRUTH
    }
    if not means:
        return None
    choose = max if HIGHER_LEAKS_MORE[metric] else min
    best = choose(means, key=lambda name: means[name])
    return best, means[best]
