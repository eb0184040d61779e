"""The informed ceiling: how often the best possible guess names the row behind a message.

The guesser knows the protocol, the weights before the message, all other rows and labels, and every
seed but those of the noise and of the data split. N candidates are equally likely; each would have
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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leakbed.contracts.noise_laws import (
    Arrays,
    Axial,
    Channel,
    Fixed,
    Laplace,
    Law,
    NoCeilingError,
    Normal,
)
from leakbed.seeds import generator

Family = Literal["fixed", "normal", "laplace", "axial"]

_FAMILIES: Mapping[type, Family] = dict(
    zip((Fixed, Normal, Laplace, Axial), ("fixed", "normal", "laplace", "axial"), strict=True)
)
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a message, relative to its norm
_CLEAR = 1e-6  # of a number sent in the clear, relative: some units in the last place
_CHUNK = 4096  # entries at once, so that sums over long messages are in double precision
_BATCH = 1000  # drawn messages at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Messages:
    """What each candidate would send, as flat vectors with the law of their noise.

    Attributes:
        means: Without noise.
        family: Of the noise.
        sizes: How many entries each block of equal noise has.
        scales: Deviation of each block; of Laplace noise both scales, of axial noise none.
        clear: What is sent beside it in the clear: labels, a loss.
        axis: Of axial noise: each row's axis, with the deviations along and across it.
        radius: As for :class:`leakbed.contracts.noise_laws.Normal`.
    """

    means: Float[Tensor, " candidates entries"]
    family: Family
    sizes: tuple[int, ...]
    scales: Float[Tensor, " candidates blocks"]
    clear: Float[Tensor, " candidates columns"]
    axis: tuple[Tensor, Tensor, Tensor] | None = None
    radius: float | None = None

    def __len__(self) -> int:
        """Return the number of candidates."""
        return len(self.means)

    @classmethod
    def of_rows(cls, law: Law) -> "Messages":
        """Return messages of one row each: a batch whose rows do not depend on each other.

        Args:
            law: Of a batch that holds one candidate a row.

        Returns:
            As many messages as it has rows.

        Raises:
            NoCeilingError: If the law is of something else.
        """
        if isinstance(law, Channel | Axial) or len(law.mean) != 1:
            raise NoCeilingError(f"{type(law).__name__} is no law of single rows")
        (mean,) = law.mean.values()
        rows = mean.flatten(1)
        (named,) = law.mean
        if isinstance(law, Normal):
            scales = law.deviation[named].double().reshape(-1, 1).expand(len(rows), 1)
        elif isinstance(law, Laplace):
            pair = [each.double().reshape(-1, 1) for each in law.scales[named]]
            scales = torch.cat([each.expand(len(rows), 1) for each in pair], 1)
        else:
            scales = torch.zeros(len(rows), 1, dtype=torch.float64)
        return cls(
            means=rows,
            family=_family(law),
            sizes=(rows.shape[1],),
            scales=scales,
            clear=_nothing(len(rows)),
            radius=law.radius if isinstance(law, Normal) else None,
        )

    @classmethod
    def of(cls, laws: Sequence[Law]) -> "Messages":
        """Return messages of one law each.

        Args:
            laws: One for each candidate, all of one kind.

        Returns:
            As many messages.

        Raises:
            NoCeilingError: If the laws are of several kinds, or of labels.
        """
        kinds = {type(law) for law in laws}
        if len(kinds) != 1 or isinstance(laws[0], Channel):
            raise NoCeilingError(
                f"the candidates' messages have laws of {len(kinds)} kinds "
                f"({', '.join(sorted(each.__name__ for each in kinds))}); the ceiling compares "
                "messages of one kind"
            )
        means = torch.stack([flat(law.mean) for law in laws if not isinstance(law, Channel)])
        blocks = [_blocks(law) for law in laws]
        return cls(
            means=means,
            family=_family(laws[0]),
            sizes=blocks[0][0],
            scales=torch.stack([scales for _, scales in blocks]),
            clear=_nothing(len(laws)),
            axis=_axes(laws),
            radius=laws[0].radius if isinstance(laws[0], Normal) else None,
        )

    def beside(self, *columns: Sequence[float] | Tensor) -> "Messages":
        """Return the messages with numbers that travel beside them in the clear.

        Args:
            *columns: One number for each candidate.

        Returns:
            They, of which two are told apart by those numbers too.
        """
        more = [torch.as_tensor(each, dtype=torch.float64).reshape(-1, 1) for each in columns]
        return replace(self, clear=torch.cat([self.clear, *more], 1))

    def picked(self, chosen: Int[Tensor, " chosen"]) -> "Messages":
        """Return some candidates' messages, in the order of their numbers.

        Args:
            chosen: Numbers of candidates.

        Returns:
            Theirs.
        """
        axis = None
        if self.axis is not None:
            axis = self.axis[0][chosen], self.axis[1][chosen], self.axis[2][chosen]
        return replace(
            self,
            means=self.means[chosen],
            scales=self.scales[chosen],
            clear=self.clear[chosen],
            axis=axis,
        )

    @property
    def equal_noise(self) -> bool:
        """Whether the noise is normal and the same whatever the candidate."""
        return self.family == "normal" and bool((self.scales == self.scales[:1]).all())

    @property
    def mu(self) -> float | None:
        """The message is mu-Gaussian DP; None where nothing bounds it."""
        if self.radius is None or not self.equal_noise or len(self.scales[0].unique()) != 1:
            return None
        return self.radius / float(self.scales[0, 0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Ceiling:
    """What the best possible guess reaches.

    Attributes:
        value: Mean over all candidates.
        error: Standard error of the draws alone; the spread over messages is larger.
        guesses: How many names the guess may give.
        candidates: Among how many.
        records: How often each candidate is named when it is the truth.
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
    chosen = torch.arange(len(messages)) if truths is None else truths
    weights = torch.ones(len(messages), dtype=torch.float64) if prior is None else prior.double()
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
            guesses=length,
            candidates=len(messages),
            records=torch.cat(named[length]),
        )
        for length in guesses
    }


def label_ceiling(
    messages: Messages,
    labels: Int[Tensor, " candidates"],
    *,
    draws: int = 4,
    stream: int,
    truths: Int[Tensor, " truths"] | None = None,
) -> tuple[float, float]:
    """Return how often the best guess of a row's label is right, for who has no inputs.

    The guesser has a pool of labelled candidates, one of which sent the message, and adds up their
    posterior by label. It bounds no seat that holds the inputs: a picture itself says the label.

    Args:
        messages: Of all candidates, without labels in the clear.
        labels: Theirs.
        draws: Of the noise, for each candidate as the truth.
        stream: As for :func:`ceiling`.
        truths: As for :func:`ceiling`.

    Returns:
        The mean over candidates, and its standard error from the draws alone.
    """
    chosen = torch.arange(len(messages)) if truths is None else truths
    of = nn.functional.one_hot(labels).double()
    even = torch.zeros(len(messages), dtype=torch.float64)
    scored = _scored(messages, level=1.0, coordinates=None)
    best = [
        (belief @ of).max(1).values
        for _, belief in _drawn(scored, chosen, even, draws=draws, stream=stream)
    ]
    masses = torch.cat(best).reshape(-1, draws)
    within = masses.var(1).sum() if draws > 1 else masses.var() * len(masses)
    return float(masses.mean()), sqrt(float(within) / draws) / len(masses)


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
    beside = _nothing(len(recorded)) if clear is None else clear
    likely = _Direct(messages).likelihood(recorded, beside)
    if prior is not None:
        likely = likely + prior.double().log()
    if (lost := torch.isneginf(likely).all(1)).any():
        raise NoCeilingError(
            f"{int(lost.sum())} of {len(recorded)} recorded messages could have been sent by no "
            "candidate: the model, the order of its arrays, or the training before it is another"
        )
    return likely.softmax(1)


def flat(arrays: Arrays) -> Float[Tensor, " entries"]:
    """Return a message as one vector, arrays in the order of their names' mapping."""
    return torch.cat([value.flatten() for value in arrays.values()])


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
        part = messages.means[:, columns].double() - centre[columns]
        part = (part / scale[columns]).float()
        gram += (part @ part.T).double()
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.max().clamp_min(0) * torch.finfo(torch.float32).eps / 8
    return Points(places=vectors[:, kept] * values[kept].sqrt())


def _scored(
    messages: Messages, *, level: float, coordinates: Points | None
) -> "_InPlane | _Direct":
    """Return the cheaper way that is exact to draw messages and score all candidates."""
    if messages.equal_noise:
        return _InPlane(messages, coordinates or points(messages), level=level)
    return _Direct(replace(messages, scales=messages.scales * level))


def _drawn(
    scored: "_InPlane | _Direct", truths: Tensor, log_prior: Tensor, *, draws: int, stream: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield truths, each as often as noise is drawn, and what the guesser then believes."""
    random = generator(stream)
    for part in truths.split(max(1, _BATCH // draws)):
        each = part.repeat_interleave(draws)
        yield each, (scored.drawn(each, random) + log_prior).softmax(1)


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
        allowed = _same(self._clear[truths], self._clear)
        return scores.double().masked_fill(~allowed, -torch.inf)


class _Direct:
    def __init__(self, messages: Messages) -> None:
        self._messages = messages

    def drawn(
        self, truths: Int[Tensor, " drawn"], random: torch.Generator
    ) -> Float[Tensor, " drawn candidates"]:
        parts = [
            self.likelihood(_draw(self._messages, part, random), self._messages.clear[part])
            for part in truths.split(50)
        ]
        return torch.cat(parts)

    def likelihood(
        self, drawn: Float[Tensor, " drawn entries"], clear: Float[Tensor, " drawn columns"]
    ) -> Float[Tensor, " drawn candidates"]:
        found = _LIKELIHOODS[self._messages.family](self._messages, drawn)
        return found.masked_fill(~_same(clear, self._messages.clear), -torch.inf)


def _draw(
    messages: Messages, truths: Int[Tensor, " drawn"], random: torch.Generator
) -> Float[Tensor, " drawn entries"]:
    """Return one message of each truth."""
    means = messages.means[truths]
    if messages.family == "fixed":
        return means
    if messages.axis is not None:
        axis, along, across = (each[truths].to(means) for each in messages.axis)
        noise = torch.randn(axis.shape, generator=random).to(means) * across.unsqueeze(-1)
        on_axis = (noise * axis).sum(-1)
        wanted = torch.randn(along.shape, generator=random).to(means) * along
        return means + (noise + (wanted - on_axis).unsqueeze(-1) * axis).flatten(1)
    scales, count = messages.scales[truths].to(means), len(messages.sizes)
    sizes = torch.tensor(messages.sizes)
    if messages.family == "normal":
        noise = torch.randn(means.shape, generator=random).to(means)
        return means + noise * scales.repeat_interleave(sizes, 1)
    pair = []
    for each in (scales[:, :count], scales[:, count:]):
        uniform = torch.rand(means.shape, generator=random).clamp_min(1e-7).to(means) - 0.5
        noise = -uniform.sign() * torch.log1p(-2 * uniform.abs())
        pair.append(noise * each.repeat_interleave(sizes, 1))
    return means + pair[0] - pair[1]


def _fixed(messages: Messages, drawn: Tensor) -> Tensor:
    """0 where a candidate sends the message, up to rounding; else minus infinity."""
    means = messages.means.double()
    limit = ROUNDING * float(means.norm(dim=1).max())
    # Two messages lie at least as far apart as some of their entries do, which most pairs settle.
    some = slice(-_CHUNK, None)
    near = torch.cdist(drawn[:, some].double(), means[:, some]) <= limit
    found = torch.full_like(near, -torch.inf, dtype=torch.float64)
    for message, candidate in (pairs.unbind(1) for pairs in near.nonzero().split(_BATCH)):
        apart = (drawn[message].double() - means[candidate]).norm(dim=1)
        found[message, candidate] = torch.where(apart > limit, -torch.inf, 0.0).double()
    return found


def _normal(messages: Messages, drawn: Tensor) -> Tensor:
    found = torch.zeros(len(drawn), len(messages), dtype=torch.float64)
    centre = messages.means.mean(0)
    for block, columns in enumerate(_columns(messages.sizes)):
        means = messages.means[:, columns] - centre[columns]
        seen = drawn[:, columns] - centre[columns]
        deviation = messages.scales[:, block]
        squares = seen.double().square().sum(1, keepdim=True) + means.double().square().sum(1)
        distance = squares - 2 * (seen @ means.T).double()
        found -= distance / (2 * deviation.square()) + means.shape[1] * deviation.log()
    return found


def _laplace(messages: Messages, drawn: Tensor) -> Tensor:
    found = torch.zeros(len(drawn), len(messages), dtype=torch.float64)
    count = len(messages.sizes)
    for block, columns in enumerate(_columns(messages.sizes)):
        for candidate in range(len(messages)):
            gap = (drawn[:, columns] - messages.means[candidate, columns]).abs().double()
            pair = messages.scales[candidate, [block, count + block]].tolist()
            found[:, candidate] += _difference(gap, *pair).sum(1)
    return found


def _difference(gap: Tensor, first: float, second: float) -> Tensor:
    """Return the log-density of a difference of two Laplace variables.

    b1 exp(-x / b1) - b2 exp(-x / b2), over 2 (b1^2 - b2^2); where both are b, (1 + x / b)
    exp(-x / b) / 4b.
    """
    large, small = max(first, second), min(first, second)
    if large - small < 1e-6 * large:
        return torch.log1p(gap / large) - gap / large - log(4 * large)
    rest = torch.log1p(-(small / large) * torch.exp(gap / large - gap / small))
    return log(large) - gap / large + rest - log(2 * (large**2 - small**2))


def _axial(messages: Messages, drawn: Tensor) -> Tensor:
    if messages.axis is None:
        raise NoCeilingError("noise along an axis needs the axis")
    axis, along, across = (each.double() for each in messages.axis)
    rows, entries = axis.shape[1:]
    gap = (drawn.double().unsqueeze(1) - messages.means.double()).unflatten(2, (rows, entries))
    on_axis = (gap * axis).sum(-1)
    off = (gap.square().sum(-1) - on_axis.square()).clamp_min(0)
    size = float(torch.linalg.vector_norm(messages.means.double(), dim=1).max()) * ROUNDING
    found = _line(on_axis.square(), along, 1, size) + _line(off, across, entries - 1, size)
    return found.sum(-1)


def _line(squares: Tensor, deviation: Tensor, axes: int, rounding: float) -> Tensor:
    """Return normal log-densities, up to a constant of the axes; on a point where there is none."""
    width = deviation.clamp_min(1e-30)
    normal = -squares / (2 * width.square()) - axes * width.log()
    point = torch.zeros_like(squares).masked_fill(squares > rounding**2, -torch.inf)
    return torch.where(deviation > 0, normal, point)


_LIKELIHOODS = {"fixed": _fixed, "normal": _normal, "laplace": _laplace, "axial": _axial}


def _same(drawn: Tensor, candidates: Tensor) -> Tensor:
    """Say which candidates' numbers in the clear are those of a message, up to rounding."""
    gap = (drawn.unsqueeze(1) - candidates).abs()
    return (gap <= _CLEAR * candidates.abs().clamp_min(1e-3)).all(2)


def _named(belief: Tensor, truths: Tensor, guesses: int) -> Tensor:
    """Return the chance that each truth is among the likeliest; of equals, some share."""
    own = belief.gather(1, truths.unsqueeze(1))
    better, equal = (belief > own).sum(1), (belief == own).sum(1)
    return ((guesses - better) / equal).clamp(0, 1).double()


def _summed(
    masses: Tensor, weights: Tensor, *, guesses: int, candidates: int, records: Tensor
) -> Ceiling:
    shares = weights / weights.sum()
    draws = masses.shape[1]
    within = masses.var(1) if draws > 1 else masses.var(0).expand(len(masses))
    return Ceiling(
        value=float(shares @ masses.mean(1)),
        error=sqrt(float((shares.square() * within).sum()) / draws),
        guesses=guesses,
        candidates=candidates,
        records=records,
    )


def _columns(sizes: Sequence[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _family(law: Law) -> Family:
    return _FAMILIES[type(law)]


def _blocks(law: Law) -> tuple[tuple[int, ...], Tensor]:
    """Return the sizes of a law's blocks of equal noise, and their scales."""
    if isinstance(law, Channel):
        raise NoCeilingError("a channel of labels is no law of a message")
    counts = [value.numel() for value in law.mean.values()]
    if isinstance(law, Laplace):
        pairs = [law.scales[name] for name in law.mean]
        both = [*(first for first, _ in pairs), *(second for _, second in pairs)]
        return tuple(counts), torch.stack([each.double().reshape(()) for each in both])
    if not isinstance(law, Normal):
        return (sum(counts),), torch.zeros(1, dtype=torch.float64)
    sizes: list[int] = []
    scales: list[Tensor] = []
    for name, count in zip(law.mean, counts, strict=True):
        each = law.deviation[name].double().reshape(-1)
        sizes += [count // len(each)] * len(each)
        scales.append(each)
    return tuple(sizes), torch.cat(scales)


def _axes(laws: Sequence[Law]) -> tuple[Tensor, Tensor, Tensor] | None:
    axial = [law for law in laws if isinstance(law, Axial)]
    if not axial:
        return None
    return (
        torch.stack([law.axis for law in axial]),
        torch.stack([law.along for law in axial]),
        torch.stack([law.across for law in axial]),
    )


def _nothing(count: int) -> Float[Tensor, " candidates 0"]:
    return torch.zeros(count, 0, dtype=torch.float64)
