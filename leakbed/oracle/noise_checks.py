"""Is recorded noise what its law says? The oracle has the truth, so it can look at the noise.

A residual is a recorded message less what the truth would have sent, over the law's deviation.
Residuals of a sound run are independent standard normal numbers: their mean is 0, their variance 1,
their kurtosis 3, and no two messages' residuals go together. Each limit is one that a sound run
passes but for a chance of one in a million (over all pairs together, for pairs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from scipy.stats import binom, norm
from torch import Tensor

_CHANCE = 1e-6  # of a false alarm of each check


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        z: How many standard errors the noise is off.
        limit: From which on that is no chance.
        where: Which messages, for pairs.
    """

    check: str
    z: float
    limit: float
    where: tuple[int, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether the noise is what the law says, as far as this check sees."""
        return abs(self.z) <= self.limit

    def __str__(self) -> str:
        verdict = "as the law says" if self.sound else "NOT what the law says"
        place = f", messages {' and '.join(map(str, self.where))}" if self.where else ""
        return f"{self.check}: {verdict} (z {self.z:.1f}, limit {self.limit:.1f}{place})"


def check_noise(residuals: Sequence[Float[Tensor, " _"]]) -> list[Finding]:
    """Return what the checks found of some messages' residuals.

    Args:
        residuals: One vector for each message, at least one.

    Returns:
        Mean, variance and kurtosis of all, and the pair of messages that goes together most.
    """
    every = torch.cat([each.double() for each in residuals])
    limit = float(norm.isf(_CHANCE / 2))
    count = len(every)
    off = every - every.mean()
    variance = float(off.square().mean())
    kurtosis = float(off.pow(4).mean()) / variance**2 if variance else 0.0
    found = [
        Finding(check="mean", z=float(every.mean()) * sqrt(count), limit=limit),
        # The law's own mean is 0, so that a shift counts as a variance too.
        Finding(
            check="variance",
            z=(float(every.square().mean()) - 1) * sqrt(count / 2),
            limit=limit,
        ),
        Finding(check="kurtosis", z=(kurtosis - 3) * sqrt(count / 24), limit=limit),
    ]
    return found + _pairs(residuals)


def check_hits(hits: Sequence[float], ceilings: Sequence[float]) -> Finding:
    """Return whether the likeliest candidate is right as often on recorded messages as it should.

    Args:
        hits: Whether it was, for each recorded message; one of k equally likely counts 1 of k.
        ceilings: Of a list of one name, for the same messages.

    Returns:
        Of a normal approximation with half a hit taken off; the limit is 4.
    """
    expected, found = sum(ceilings), sum(hits)
    spread = sqrt(max(sum(p * (1 - p) for p in ceilings), 0.25))
    gap = found - expected
    z = 0.0 if abs(gap) <= 0.5 else (abs(gap) - 0.5) / spread * (1 if gap > 0 else -1)  # noqa: PLR2004
    return Finding(check="hits on recorded messages", z=z, limit=4.0)


def above(hits: int, of: int, *, ceiling: float, error: float) -> float:
    """Return how likely so many hits are if every guess is right as often as the ceiling allows.

    Args:
        hits: Of an attack's guesses.
        of: How many guesses.
        ceiling: For the list length of the attacked messages.
        error: Its standard error, of which three are granted.

    Returns:
        The chance of as many hits or more.
    """
    return float(binom.sf(hits - 1, of, min(1.0, ceiling + 3 * error)))


def _pairs(residuals: Sequence[Tensor]) -> list[Finding]:
    """Return the pair of equally long messages that goes together most, where there is a pair."""
    worst: Finding | None = None
    pairs = len(residuals) * (len(residuals) - 1) // 2
    limit = float(norm.isf(_CHANCE / (2 * max(pairs, 1))))
    for length in {len(each) for each in residuals}:
        places = [i for i, each in enumerate(residuals) if len(each) == length]
        if len(places) < 2 or length < 2:  # noqa: PLR2004  no pair
            continue
        rows = torch.stack([residuals[i].double() for i in places])
        rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)
        together = ((rows @ rows.T) * sqrt(length)).fill_diagonal_(0)
        flat = int(together.abs().argmax())
        one, other = divmod(flat, len(places))
        z = float(together[one, other])
        if worst is None or abs(z) > abs(worst.z):
            where = tuple(sorted((places[one], places[other])))
            worst = Finding(check="noise of two messages", z=z, limit=limit, where=where)
    return [] if worst is None else [worst]
