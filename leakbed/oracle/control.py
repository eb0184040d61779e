"""Judge the negative control: an attack's guesses, scored against data they were not made from.

If such a guess beats every evidence-free baseline, the score measures something other than the
evidence (a truth that leaked into the attack, or a baseline too weak), and no number of that cell
should be believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from leakbed.metrics import BEST_IS_ONE, RATES
from leakbed.oracle.scores import Scores, best_evidence_free


class ControlVerdict(TypedDict):
    """What a negative control showed, as plain JSON values.

    Attributes:
        within: Whether no metric is above its limit; ``None`` if nothing could be compared (a
            single target has no standard error).
        scores: Mean of each compared metric on unrelated truth.
        baseline: For each compared metric the strongest evidence-free baseline: its name, its
            value, and the limit two standard errors above it.
        above: The metrics above their limit.
    """

    within: bool | None
    scores: dict[str, float]
    baseline: dict[str, dict[str, Any]]
    above: list[str]


def control_verdict(control: Scores, baselines: Mapping[str, Scores]) -> ControlVerdict:
    """Say whether a control stays within two standard errors of the evidence-free baselines.

    One-sided: a guess worse than every baseline (noise, on unrelated truth) hides no leak. The
    error is that of the difference of the two means. For rates it is at least that of a rate at
    the baseline, since a sample without a hit has no spread of its own.

    Args:
        control: The attack's guess scored against ``truth.deranged()``.
        baselines: Baselines of the truth.

    Returns:
        The verdict on the metrics whose perfect value is 1, as far as the guess has them.
    """
    scores: dict[str, float] = {}
    limits: dict[str, dict[str, Any]] = {}
    for metric in BEST_IS_ONE:
        best = best_evidence_free(baselines, metric)
        if metric not in control.metrics or best is None:
            continue
        name, value = best
        error = _error(metric, control, baselines[name])
        if error is not None:
            scores[metric] = control.metrics[metric].mean
            limits[metric] = {"name": name, "value": value, "limit": value + 2 * error}
    above = [metric for metric, mean in scores.items() if mean > limits[metric]["limit"] + 1e-9]
    return ControlVerdict(
        within=not above if scores else None, scores=scores, baseline=limits, above=above
    )


def _error(metric: str, control: Scores, baseline: Scores) -> float | None:
    """Return the standard error of the difference; ``None`` if there is a single target."""
    own, other = control.metrics[metric].stderr, baseline.metrics[metric].stderr
    if own is None or other is None:
        return None
    error = (own**2 + other**2) ** 0.5
    if metric in RATES:
        rate = baseline.metrics[metric].mean
        error = max(error, (rate * (1 - rate) / (control.targets * control.rows)) ** 0.5)
    return float(error)
