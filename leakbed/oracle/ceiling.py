"""The informed ceiling: how often the best possible guess names the row behind a message.

The guesser knows the protocol, the weights before the message, all other rows and labels, and every
seed but those of the noise and of the data split. N candidates are equally likely, or as likely as
what the guesser knows beforehand makes them; each would have
sent a message that its :mod:`law <leakbed.contracts.noise_laws>` describes. A message of B rows is
answered by a list of the B likeliest candidates, since the oracle matches guessed images to rows
with the truth's help: an answer of B images is nearest to at most B candidates, so no attack from
the same seat identifies the row more often than

    ceiling(B) = E over candidates, E over noise [ posterior mass of the B likeliest candidates ].

It is a bound on the mean over candidates. For one fixed row there is none: who always names it is
always right. Chance is B / N.

Isotropic noise keeps distances and says nothing across them, so N messages of any length become N
points of fewer than N coordinates, and noise is drawn there: this is exact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.oracle.messages import Messages, axes, told_apart
from leakbed.seeds import generator

_CHUNK = 4096  # entries at once, so that sums over long messages are in double precision
_BATCH = 1000  # drawn messages at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Ceiling:
    """What the best possible guess reaches.

    Attributes:
        value: Mean over all candidates.
        error: Standard error of the draws, and of truths where some candidates alone were taken
            for it; the spread over messages is larger.
        guesses: How many names the guess may give.
        candidates: Among how many.
        records: How often each truth is named, of those that are possible at all.
    """

    value: float
    error: float
    guesses: int
    candidates: int
    records: Float[Tensor, " truths"]

    @property
    def chance(self) -> float:
        """Of a guess without any message."""
        return min(1.0, self.guesses / self.candidates)


def ceiling(
    messages: Messages,
    *,
    guesses: Sequence[int] = (1,),
    draws: int = 4,
    stream: int,
    prior: Float[Tensor, " candidates"] | None = None,
    level: float = 1.0,
    truths: Int[Tensor, " truths"] | None = None,
    coordinates: "Points | None" = None,
) -> dict[int, Ceiling]:
    """Return the ceiling by the number of names that a guess may give.

    Args:
        messages: Of all candidates.
        guesses: Lengths of the list.
        draws: Of the noise, for each candidate as the truth.
        stream: Of the noise; of its own, never that of the candidates.
        prior: Probability of each candidate; None for equal ones.
        level: Factor on the noise.
        truths: The candidates to take for the truth, drawn at random; None for each of them, by its
            probability.
        coordinates: From :func:`points` of the same messages, where several levels are wanted.

    Returns:
        One for each length.
    """
    weights = torch.ones(len(messages), dtype=torch.float64) if prior is None else prior.double()
    chosen = torch.arange(len(messages)) if truths is None else truths
    chosen = chosen[weights[chosen] > 0]
    scored = _scored(messages, level=level, coordinates=coordinates)
    masses: dict[int, list[Tensor]] = {length: [] for length in guesses}
    named: dict[int, list[Tensor]] = {length: [] for length in guesses}
    for each, belief in _drawn(scored, chosen, weights.log(), draws=draws, stream=stream):
        best = belief.topk(min(max(guesses), len(messages)), 1).values.cumsum(1)
        for length in guesses:
            masses[length].append(best[:, min(length, len(messages)) - 1])
            named[length].append(_named(belief, each, length).reshape(-1, draws).mean(1))
    return {
        length: _summed(
            torch.cat(masses[length]).reshape(-1, draws),
            weights[chosen],
            possible=int((weights > 0).sum()),
            guesses=length,
            candidates=len(messages),
            records=torch.cat(named[length]),
        )
        for length in guesses
    }


def label_ceiling(
    messages: Messages,
    labels: Float[Tensor, " candidates labels"],
    *,
    draws: int = 4,
    stream: int,
    prior: Float[Tensor, " candidates"] | None = None,
    truths: Int[Tensor, " truths"] | None = None,
) -> tuple[float, float]:
    """Return how often the best guess of a row's label is right, for who has no inputs.

    The guesser has candidates, one of which sent the message, and adds up their posterior by label:
    a pool of labelled rows, or answers at random behind each of which a label is more or less
    likely. It bounds no seat that holds the inputs: a picture itself says the label.

    Args:
        messages: Of all candidates, without labels in the clear.
        labels: Probability of each label, given the candidate; 0 and 1 where it is known.
        draws: Of the noise, for each candidate as the truth.
        stream: As for :func:`ceiling`.
        prior: As for :func:`ceiling`.
        truths: As for :func:`ceiling`.

    Returns:
        The mean over candidates, and its standard error as for :class:`Ceiling`.
    """
    weights = torch.ones(len(messages), dtype=torch.float64) if prior is None else prior.double()
    chosen = torch.arange(len(messages)) if truths is None else truths
    chosen = chosen[weights[chosen] > 0]
    scored = _scored(messages, level=1.0, coordinates=None)
    best = [
        (belief @ labels.double()).max(1).values
        for _, belief in _drawn(scored, chosen, weights.log(), draws=draws, stream=stream)
    ]
    masses, nobody = torch.cat(best).reshape(-1, draws), torch.empty(0)
    found = _summed(
        masses,
        weights[chosen],
        possible=int((weights > 0).sum()),
        guesses=1,
        candidates=len(messages),
        records=nobody,
    )
    return found.value, found.error


def beliefs(
    messages: Messages,
    recorded: Float[Tensor, " recorded entries"],
    *,
    clear: Float[Tensor, " recorded columns"] | None = None,
    prior: Float[Tensor, " candidates"] | None = None,
) -> Float[Tensor, " recorded candidates"]:
    """Return the posterior of each candidate, given recorded messages.

    Args:
        messages: Of the candidates.
        recorded: Flat, as :func:`flat` makes them.
        clear: What was sent beside them.
        prior: Probability of each candidate; None for equal ones.

    Returns:
        Rows that add up to 1.

    Raises:
        NoCeilingError: If no candidate at all could have sent a message.
    """
    beside = torch.zeros(len(recorded), 0) if clear is None else clear
    likely = messages.likelihood(recorded, beside)
    if prior is not None:
        likely = likely + prior.double().log()
    if (lost := torch.isneginf(likely).all(1)).any():
        raise NoCeilingError(
            f"{int(lost.sum())} of {len(recorded)} recorded messages could have been sent by no "
            "candidate: the model, the order of its arrays, or the training before it is another"
        )
    return likely.softmax(1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """Candidates as points: their distances are those of their messages, in units of the noise.

    Attributes:
        places: Centred coordinates.
    """

    places: Float[Tensor, " candidates coordinates"]


def points(messages: Messages) -> Points:
    """Return candidates' messages as points, of which there are no more axes than candidates.

    Args:
        messages: With normal noise that is the same for all.

    Returns:
        For :func:`ceiling`, at any level of the noise.
    """
    scale = messages.scales[0].repeat_interleave(torch.tensor(messages.sizes))
    centre = messages.means.double().mean(0)
    if messages.means.shape[1] <= len(messages):
        return Points(places=(messages.means.double() - centre) / scale)
    gram = torch.zeros(len(messages), len(messages), dtype=torch.float64)
    for start in range(0, messages.means.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        part = (messages.means[:, columns].double() - centre[columns]) / scale[columns]
        gram += part @ part.T
    vectors, lengths = axes(gram)
    return Points(places=vectors * lengths)


def _scored(
    messages: Messages, *, level: float, coordinates: Points | None
) -> "_Noiseless | _InPlane | _Direct":
    """Return the cheapest way that is exact to draw messages and score all candidates."""
    if messages.family == "fixed" and not messages.others:
        return _Noiseless(messages)
    if messages.equal_noise:
        return _InPlane(messages, coordinates or points(messages), level=level)
    return _Direct(messages.at_level(level))


def _drawn(
    scored: "_Noiseless | _InPlane | _Direct",
    truths: Tensor,
    log_prior: Tensor,
    *,
    draws: int,
    stream: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield truths, each as often as noise is drawn, and what the guesser then believes."""
    random = generator(stream)
    for part in truths.split(max(1, _BATCH // draws)):
        each = part.repeat_interleave(draws)
        yield each, (scored.drawn(each, random) + log_prior).softmax(1)


class _Noiseless:
    def __init__(self, messages: Messages) -> None:
        self._groups, self._clear = messages.groups, messages.clear

    def drawn(
        self, truths: Int[Tensor, " drawn"], random: torch.Generator
    ) -> Float[Tensor, " drawn candidates"]:
        del random
        another = self._groups[truths].unsqueeze(1) != self._groups
        return told_apart(truths, self._clear).masked_fill(another, -torch.inf)


class _InPlane:
    def __init__(self, messages: Messages, coordinates: Points, *, level: float) -> None:
        self._places, self._level = coordinates.places / level, level
        self._clear = messages.clear
        # Scores are differences of such squares; single precision would round large ones.
        exact = self._places.square().sum(1).max() > 1e4  # noqa: PLR2004
        self._places = self._places if exact else self._places.float()

    def drawn(
        self, truths: Int[Tensor, " drawn"], random: torch.Generator
    ) -> Float[Tensor, " drawn candidates"]:
        places = self._places
        noise = torch.randn(len(truths), places.shape[1], generator=random).to(places)
        message = places[truths] + noise
        scores = message @ places.T - places.square().sum(1) / 2
        return scores.double() + told_apart(truths, self._clear)


class _Direct:
    def __init__(self, messages: Messages) -> None:
        self._clear = messages.clear
        self._messages = replace(messages, clear=messages.clear[:, :0])

    def drawn(
        self, truths: Int[Tensor, " drawn"], random: torch.Generator
    ) -> Float[Tensor, " drawn candidates"]:
        parts = [
            self._messages.likelihood(
                self._messages.drawn(part, random), self._messages.clear[part]
            )
            for part in truths.split(50)
        ]
        return torch.cat(parts) + told_apart(truths, self._clear)


def _named(belief: Tensor, truths: Tensor, guesses: int) -> Tensor:
    """Return the chance that each truth is among the likeliest; of equals, some share."""
    own = belief.gather(1, truths.unsqueeze(1))
    better, equal = (belief > own).sum(1), (belief == own).sum(1)
    return ((guesses - better) / equal).clamp(0, 1).double()


def _summed(
    masses: Tensor,
    weights: Tensor,
    *,
    possible: int,
    guesses: int,
    candidates: int,
    records: Tensor,
) -> Ceiling:
    shares = weights / weights.sum()
    draws, count = masses.shape[1], len(masses)
    value = shares @ masses.mean(1)
    within = (masses.var(1) if draws > 1 else masses.var(0).expand(count)) / draws
    # The variance of the means over truths has that of the draws in it.
    between = (masses.mean(1) - value).square() * count / max(count - 1, 1)
    seen = count / possible
    squares = shares.square() * (seen * within + (1 - seen) * between)
    return Ceiling(
        value=float(value),
        error=sqrt(float(squares.sum())),
        guesses=guesses,
        candidates=candidates,
        records=records,
    )
