"""An audit of a defence's claim: an epsilon that the mechanism certainly exceeds.

A mechanism is given one of two adjacent worst inputs, and a score tells which from what it sends.
Two messages are drawn a time: with equal inputs, where noise that is too small or does not compose
shows, and with inputs that alternate, where noise that is used again cancels in the difference. The
threshold is chosen on one half of the draws and judged on the other, by one-sided Clopper-Pearson
bounds, so that the epsilon found is exceeded but for a chance of one in a thousand.

How often a normal mechanism errs at one threshold says how often it does at all others. So where
the stated law is normal of one size, epsilon follows by Gaussian differential privacy. Of other
noise, or of no stated law, the ratio of the two rates alone is a bound, far weaker, and what is
claimed of two messages adds up. (An earlier version took all noise for normal and refuted true
claims: of Laplace noise of epsilon 1, at least 5.1 "found" for two messages that are worth 2;
corrected 2026-11-29.)

Source: Nasr et al. "Tight Auditing of Differentially Private Machine Learning", USENIX Security
2023, https://arxiv.org/abs/2302.07956, for the bound by Gaussian differential privacy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil, exp, inf, log, sqrt

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, norm
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.noise_laws import Clean, Normal

_SURE = 0.9995  # of each of two rates
_MESSAGES = 2
_ENTRIES = 4
_FAR = 1e4  # times a clipping norm: what is clipped ends on it


class NoAuditError(ValueError):
    """A defence claims nothing that can be audited; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit of one mechanism found.

    Attributes:
        name: The defence's.
        inputs: ``"equal"`` or ``"alternating"`` in the two messages, or ``"one label"``.
        claimed: Epsilon of what was drawn, by the defence's claim.
        found: An epsilon that the mechanism exceeds.
        delta: Of both.
        draws: How many of each input.
    """

    name: str
    inputs: str
    claimed: float
    found: float
    delta: float
    draws: int

    @property
    def holds(self) -> bool:
        """Whether the claim was not refuted."""
        return self.found <= self.claimed

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "is REFUTED"
        one = self.inputs == "one label"
        what = self.inputs if one else f"two messages of {self.inputs} inputs"
        return (
            f"{self.name}, {what}: the claim {verdict}: epsilon {self.claimed:.3g} "
            f"claimed, at least {self.found:.3g} found (delta {self.delta:g}, {self.draws} draws)"
        )


def audit(defense: Defense, *, draws: int | None = None, stream: int = 0) -> list[Audit]:
    """Return what audits of a defence's claim found.

    Args:
        defense: With the settings to be audited.
        draws: Of each input; None for 100,000 rows or labels, or 4,000 updates.
        stream: Of the defence's noise.

    Returns:
        One for each kind of input.

    Raises:
        NoAuditError: If it claims nothing, or not of a message.
    """
    if not defense.claiming:
        raise NoAuditError(
            f"{defense.name} claims no differential privacy under these settings, so there is "
            "nothing to audit; set those under which it does"
        )
    if len(defense.protects) != 1:
        kinds = ", ".join(sorted(map(str, defense.protects))) or "nothing"
        raise NoAuditError(f"{defense.name} protects {kinds}; an audit is of one kind of message")
    (kind,) = defense.protects
    if kind == Protects.LABELS:
        return [_labels(defense, draws=draws or 100_000, stream=stream)]
    if kind not in {Protects.UPDATE, Protects.SMASHED, Protects.CUT_GRADIENT}:
        raise NoAuditError(
            f"{defense.name} protects {kind}, which is no message; its steps are not audited here"
        )
    count = draws or (4000 if kind == Protects.UPDATE else 100_000)
    normal = _is_normal(defense, kind)
    claimed, delta = _claimed(defense, kind, normal=normal)
    audits = []
    for inputs, signs in (("equal", (1, 1)), ("alternating", (1, -1))):
        scores = [
            _scores(defense, kind, signs, swapped=swapped, count=count, stream=stream)
            for swapped in (False, True)
        ]
        found = certain(*scores, delta=delta, normal=normal)
        audits.append(
            Audit(
                name=defense.name,
                inputs=inputs,
                claimed=claimed,
                found=found,
                delta=delta,
                draws=count,
            )
        )
    return audits


def certain(
    first: Float[Tensor, " draws"],
    second: Float[Tensor, " draws"],
    *,
    delta: float,
    normal: bool = True,
) -> float:
    """Return an epsilon that a mechanism exceeds, from scores of its messages on two inputs.

    Args:
        first: How strongly messages of the first input speak for it.
        second: Of messages of the second, of the same score.
        delta: In (0, 1).
        normal: Whether the noise is known to be normal, of one size.

    Returns:
        At least 0; no better than the score.
    """
    scores = first.double(), second.double()
    if normal:
        return epsilon_of(_told_apart(*scores, _lower), delta=delta)
    return max(0.0, _told_apart(*scores, partial(_ratio, delta=delta)))


def epsilon_of(mu: float, *, delta: float) -> float:
    """Return the epsilon of mu-Gaussian DP at a delta.

    Args:
        mu: At least 0; infinite where two inputs are always told apart.
        delta: In (0, 1).

    Returns:
        At least 0.
    """
    if mu == inf:
        return inf
    if mu <= 0 or _delta(0.0, mu) <= delta:
        return 0.0
    return float(brentq(lambda e: _delta(e, mu) - delta, 0.0, mu * mu + 40 * mu + 10))


def mu_of(epsilon: float, *, delta: float) -> float:
    """Return the mu whose Gaussian DP is (epsilon, delta).

    Args:
        epsilon: Above 0.
        delta: In (0, 1).

    Returns:
        Above 0.
    """
    return float(brentq(lambda mu: _delta(epsilon, mu) - delta, 1e-6, epsilon + 50))


def _delta(epsilon: float, mu: float) -> float:
    first = norm.cdf(mu / 2 - epsilon / mu)
    second = epsilon + norm.logcdf(-mu / 2 - epsilon / mu)
    return float(first - exp(min(second, 700.0)))


def _is_normal(defense: Defense, kind: Protects) -> bool:
    """Say whether a defence states normal noise of one size."""
    law = defense.law(_clean(kind, 1, _FAR))
    return isinstance(law, Normal) and len({float(v) for v in law.deviation.values()}) == 1


def _claimed(defense: Defense, kind: Protects, *, normal: bool) -> tuple[float, float]:
    """Return the epsilon that a defence claims of the messages together, and its delta."""
    delta, covers = float(getattr(defense, "delta", 1e-5)), defense.covers or 1
    epsilon = getattr(defense, "epsilon", None)
    if epsilon is not None and not normal:
        times = ceil(_MESSAGES / covers)
        return times * float(epsilon), min(times * delta, 1.0)
    law = defense.law(_clean(kind, 1, _FAR))
    if epsilon is not None:
        mu = mu_of(float(epsilon), delta=delta) / sqrt(covers)
    elif isinstance(law, Normal) and normal and law.radius is not None:
        apart = law.radius if kind == Protects.UPDATE else 2 * law.radius
        mu = apart / float(next(iter(law.deviation.values())))
    else:
        raise NoAuditError(f"{defense.name} says no epsilon, and its law bounds no message")
    return epsilon_of(mu * sqrt(_MESSAGES), delta=delta), delta


def _clean(kind: Protects, rows: int, place: float) -> Clean:
    """Return a message far out on one axis, which a clipping norm brings back to it."""
    if kind == Protects.UPDATE:
        after = torch.zeros(_ENTRIES)
        after[0] = place
        return Clean(kind=kind, arrays={"w": after}, before={"w": torch.zeros(_ENTRIES)})
    array = torch.zeros(rows, _ENTRIES)
    array[:, 0] = place
    return Clean(kind=kind, arrays={kind: array})


def _scores(
    defense: Defense,
    kind: Protects,
    signs: tuple[int, ...],
    *,
    swapped: bool,
    count: int,
    stream: int,
) -> Float[Tensor, " draws"]:
    """Return how strongly each draw's messages speak for the first input."""
    send = _row_messages if kind != Protects.UPDATE else _updates
    states = send(defense, kind, count, stream + swapped)
    total = torch.zeros(count, dtype=torch.float64)
    for at, sign in enumerate(signs):
        first = (sign > 0) is not swapped
        # Of an update presence is claimed: it is there or nothing is. Of a row, any other one.
        place = _FAR if first else 0.0 if kind == Protects.UPDATE else -_FAR
        total += sign * states(at, place).double()
    return total


Sender = Callable[[int, float], Tensor]


def _row_messages(defense: Defense, kind: Protects, count: int, stream: int) -> Sender:
    """All draws are rows of one message."""
    state = defense.begin(stream)

    def send(at: int, place: float) -> Tensor:
        array = _clean(kind, count, place).array
        here = DefenseState(stream=state.stream, messages=at, tensors=state.tensors)
        hook = defense.protect_smashed if kind == Protects.SMASHED else defense.protect_cut_gradient
        return hook(here, array)[1][:, 0].detach()

    return send


def _updates(defense: Defense, kind: Protects, count: int, stream: int) -> Sender:
    """Every draw is a node of its own."""

    def send(at: int, place: float) -> Tensor:
        clean, sent = _clean(kind, 1, place), torch.empty(count)
        for draw in range(count):
            state = DefenseState(stream=stream * count * 10 + draw, messages=at)
            sent[draw] = defense.protect_update(state, clean.before, clean.arrays)[1]["w"][0]
        return sent

    return send


Bound = Callable[[Tensor, Tensor, Tensor], NDArray[np.float64]]
"""Of two inputs' scores at each threshold."""


def _told_apart(first: Tensor, second: Tensor, bound: Bound) -> float:
    """Return a bound that the two inputs' scores certainly exceed."""
    half = len(first) // 2
    chosen, judged = (first[:half], second[:half]), (first[half:], second[half:])
    thresholds = torch.cat(chosen).quantile(
        torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
        if 2 * half <= 2**24
        else torch.tensor([0.5])
    )
    best = int(bound(*chosen, thresholds).argmax())
    return float(bound(*judged, thresholds[best : best + 1])[0])


def _lower(first: Tensor, second: Tensor, thresholds: Tensor) -> NDArray[np.float64]:
    """Return a mu that the two inputs' scores exceed at each threshold, but for a chance."""
    right, wrong = _rates(first, second, thresholds)
    return np.asarray(norm.ppf(right) - norm.ppf(wrong), dtype=np.float64)


def _ratio(
    first: Tensor, second: Tensor, thresholds: Tensor, *, delta: float
) -> NDArray[np.float64]:
    """Return an epsilon of whatever noise that the two inputs' scores exceed likewise."""
    right, wrong = _rates(first, second, thresholds)
    ways = (right - delta) / wrong, (1 - wrong - delta) / (1 - right)
    return np.asarray(np.log(np.maximum(*ways).clip(1e-300)), dtype=np.float64)


def _rates(
    first: Tensor, second: Tensor, thresholds: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how often the first input's scores exceed thresholds at least, the other's at most."""
    right, wrong = (
        len(scores) - torch.searchsorted(scores.sort().values, thresholds, right=True)
        for scores in (first, second)
    )
    return _least(right, len(first)), 1 - _least(len(second) - wrong, len(second))


def _least(counts: Tensor, of: int) -> NDArray[np.float64]:
    """Return the one-sided Clopper-Pearson bounds below rates."""
    bounds: NDArray[np.float64] = beta.ppf(1 - _SURE, counts.numpy(), of - counts.numpy() + 1)
    bounds[counts.numpy() == 0] = 0.0
    return bounds


def _labels(defense: Defense, *, draws: int, stream: int) -> Audit:
    """Audit labels answered at random: every pair of labels, every answer."""
    prior = getattr(defense, "prior", ())
    classes = len(prior) or 3
    answers = torch.stack(
        [
            torch.bincount(
                defense.noised_labels(stream + label, torch.full((draws,), label), classes=classes),
                minlength=classes,
            )
            for label in range(classes)
        ]
    ).tolist()
    sure = 1 - (1 - _SURE) / (classes**3)  # every pair and answer is looked at
    found = 0.0
    for one in answers:
        for other in answers:
            for mine, theirs in zip(one, other, strict=True):
                low = float(beta.ppf(1 - sure, mine, draws - mine + 1)) if mine else 0.0
                rest = draws - theirs
                high = 1 - (float(beta.ppf(1 - sure, rest, theirs + 1)) if rest else 0.0)
                found = max(found, log(low / high) if low > 0 else 0.0)
    return Audit(
        name=defense.name,
        inputs="one label",
        claimed=float(getattr(defense, "epsilon", inf)),
        found=found,
        delta=0.0,
        draws=draws,
    )
