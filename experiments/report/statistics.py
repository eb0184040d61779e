"""Measures of a report: a mean with its error, pooled over seeds, and when two of them differ.

A pooled mean is over all targets of all seeds; its error is the larger of the spread over targets
and the spread over seeds, since targets of one seed share one victim. Rates also have the exact
binomial interval, which is what keeps 8 hits of 8 from having no error at all; of several seeds it
reaches at least two standard errors between seeds to either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from leakbed.oracle.metrics import PERCENTAGES, RATES, binomial_interval

_SMALL = 0.01  # errors under this would be rounded to half or twice their size
_ROUNDING = 1e-9  # differences under this are arithmetic, not findings


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number with what is known of its error.

    Attributes:
        mean: Over all targets of all seeds.
        std: Over the same; ``None`` for a single target.
        stderr: Standard error of the mean; ``None`` for a single target.
        interval: Of a rate, the exact 95 % interval over all samples, and of several seeds whatever
            two standard errors between them reach beyond it, within [0, 1].
    """

    mean: float
    std: float | None = None
    stderr: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def error(self) -> float | None:
        """The standard error to compare with: for a rate no less than its interval allows."""
        if self.interval is None or self.stderr is None:
            return self.stderr
        return max(self.stderr, (self.interval[1] - self.interval[0]) / 4)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The ends that a report prints: of a rate its interval, else two errors to either side."""
        if self.interval is not None or self.stderr is None:
            return self.interval
        return self.mean - 2 * self.stderr, self.mean + 2 * self.stderr


def pooled(tables: Sequence[Mapping[str, Any]], name: str) -> Measure | None:
    """Return one measure over several seeds' tables.

    Args:
        tables: ``scores`` or ``utility`` of cards; an entry is a number or a summary.
        name: The entry to pool.

    Returns:
        ``None`` where no table has a finite number of that name.
    """
    found = [(entry, table) for table in tables if (entry := _summary(table.get(name)))]
    if not found:
        return None
    means = [entry["mean"] for entry, _ in found]
    values = [value for entry, _ in found for value in entry["values"]]
    rows = sum(len(entry["values"]) * int(number(table.get("rows")) or 1) for entry, table in found)
    errors = [*_within(found), *(_stderr(part) for part in (values, means) if len(part) > 1)]
    mean = fmean(values or means)
    spread = values if len(values) > 1 else means
    return Measure(
        mean=mean,
        std=stdev(spread) if len(spread) > 1 else None,
        stderr=max(errors, default=None),
        interval=_interval(mean, rows, seeds=means) if name in RATES and rows else None,
    )


def difference(first: Measure, second: Measure) -> float | None:
    """Return ``first - second`` if it exceeds two standard errors, else ``None``.

    A measure whose error is unknown (a single target) decides nothing.

    Args:
        first: A measure.
        second: Another, taken as independent of it.

    Returns:
        The difference of the means, or ``None`` if it may be chance.
    """
    if first.error is None or second.error is None:
        return None
    gap = first.mean - second.mean
    limit = 2 * (first.error**2 + second.error**2) ** 0.5
    return gap if abs(gap) > max(limit, _ROUNDING) else None


def number(value: object) -> float | None:
    """Return a JSON value as a number; ``None`` if it is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _interval(mean: float, rows: int, *, seeds: Sequence[float]) -> tuple[float, float]:
    """Return a rate's exact interval, widened to two standard errors between seeds."""
    low, high = binomial_interval(round(mean * rows), rows)
    reach = 2 * _stderr(seeds) if len(seeds) > 1 else 0.0
    return max(min(low, mean - reach), 0.0), min(max(high, mean + reach), 1.0)


def _within(found: Sequence[tuple[Mapping[str, Any], Any]]) -> list[float]:
    """Return the error of the mean that the seeds' own errors make, where each seed has one.

    It is more than the spread of the values where an error was bounded from below.
    """
    parts = [(len(entry["values"]), entry["stderr"]) for entry, _ in found]
    total = sum(count for count, _ in parts)
    if total == 0 or any(error is None for _, error in parts):
        return []
    return [sum((count * error) ** 2 for count, error in parts) ** 0.5 / total]


def _stderr(values: Sequence[float]) -> float:
    return float(stdev(values) / len(values) ** 0.5)


def _summary(entry: object) -> dict[str, Any] | None:
    """Return an entry as mean and values; ``None`` for anything else or not finite."""
    if (single := number(entry)) is not None:
        return {"mean": single, "values": [], "stderr": None}
    if not isinstance(entry, Mapping) or number(entry.get("mean")) is None:
        return None
    values = entry.get("values") or []
    return {
        "mean": entry["mean"],
        "values": [value for value in values if value is not None],
        "stderr": number(entry.get("stderr")),
    }


def value_text(metric: str, value: float) -> str:
    """Return a value as a report prints it: rates in percent, small errors in scientific form."""
    if metric in PERCENTAGES:
        shown = f"{100 * value:.0f}%"
    elif metric == "psnr":
        shown = f"{value:.1f} dB"
    else:
        shown = f"{value:.2g}" if metric.endswith("mse") else f"{value:.2f}"
    return shown.replace("-0.00", "0.00").replace("-", "\N{MINUS SIGN}")


def error_text(metric: str, measure: Measure) -> str:
    """Return what is known of a measure's error: an interval of a rate, else two errors."""
    if measure.interval is not None:
        low, high = (f"{100 * end:.0f}" for end in measure.interval)
        return f"{low} to {high}%"
    if measure.stderr is None:
        return "one target"
    both = 2 * measure.stderr
    if not 0 < both < _SMALL:
        return f"± {value_text(metric, both)}"
    return f"± {100 * both:.1g}%" if metric in PERCENTAGES else f"± {both:.1g}"


def text(metric: str, measure: Measure) -> str:
    """Return a value and its error, such as ``0.97 ± 0.02`` or ``94% (79 to 99%)``."""
    error = error_text(metric, measure)
    value = value_text(metric, measure.mean)
    return f"{value} {error}" if error.startswith("±") else f"{value} ({error})"
