"""What each candidate would send: flat vectors with the law of their noise, drawn and scored.

A density is up to a factor that is the same for all candidates. Noise that has no width along some
axes is scored as if it had a width that is smaller than any other: a message on such a point is
likelier than any density allows, and one off it is impossible.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

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

Family = Literal["fixed", "normal", "laplace", "axial"]

_FAMILIES: Mapping[type, Family] = dict(
    zip((Fixed, Normal, Laplace, Axial), ("fixed", "normal", "laplace", "axial"), strict=True)
)
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a message, relative to its norm
_CLEAR = 1e-6  # of a number sent in the clear, relative: from there on it is another
_SOME, _PAIRS = 4096, 1000  # entries that are compared first, and pairs that are compared whole
_POINT = 1e3  # log-likelihood of a point on each axis: above that of any width a float can have


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
        across: Of normal noise, by block: of how many more entries all candidates have the same
            mean. Of those a message holds the squared norm of the noise alone, behind the others.
        others: Messages of other noise that are read beside these, behind them in one vector.
    """

    means: Float[Tensor, " candidates entries"]
    family: Family
    sizes: tuple[int, ...]
    scales: Float[Tensor, " candidates blocks"]
    clear: Float[Tensor, " candidates columns"]
    axis: tuple[Tensor, Tensor, Tensor] | None = None
    radius: float | None = None
    across: tuple[int, ...] = ()
    others: tuple["Messages", ...] = ()

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
            others=tuple(each.picked(chosen) for each in self.others),
        )

    def of_copies(self, times: int) -> "Messages":
        """Return messages that a sample is in several times, each of its rows clipped by itself."""
        return replace(self, radius=self.radius and self.radius * sqrt(times))

    def at_level(self, level: float) -> "Messages":
        """Return them with the noise of every entry times a factor."""
        axis = self.axis and (self.axis[0], self.axis[1] * level, self.axis[2] * level)
        others = tuple(each.at_level(level) for each in self.others)
        return replace(self, scales=self.scales * level, axis=axis, others=others)

    def drawn(
        self, truths: Int[Tensor, " drawn"], random: torch.Generator
    ) -> Float[Tensor, " drawn numbers"]:
        """Return one message of each truth.

        Args:
            truths: Numbers of candidates.
            random: Of the noise.

        Returns:
            As :meth:`likelihood` reads them.
        """
        parts = [_draw(each, truths, random) for each in (self, *self.others)]
        return parts[0] if len(parts) == 1 else torch.cat([each.double() for each in parts], 1)

    def likelihood(
        self, drawn: Float[Tensor, " drawn numbers"], clear: Float[Tensor, " drawn columns"]
    ) -> Float[Tensor, " drawn candidates"]:
        """Return each candidate's log-likelihood, up to what is the same for all candidates.

        Args:
            drawn: Messages; those of several noises one behind another.
            clear: What was sent beside them.

        Returns:
            Minus infinity where a candidate cannot have sent the message.
        """
        parts = drawn.split([each.columns for each in (self, *self.others)], 1)
        found = torch.zeros(len(drawn), len(self), dtype=torch.float64)
        for each, part in zip((self, *self.others), parts, strict=True):
            found += _LIKELIHOODS[each.family](each, part)
        return found + nearness(clear, self.clear)

    @property
    def columns(self) -> int:
        """How many numbers a drawn message has, without those of others."""
        return self.means.shape[1] + len(self.across)

    @property
    def equal_noise(self) -> bool:
        """Whether the noise is normal and the same whatever the candidate."""
        if self.family != "normal" or self.others:
            return False
        return bool((self.scales == self.scales[:1]).all())

    @property
    def groups(self) -> Int[Tensor, " candidates"]:
        """Numbers that candidates share whose means are the same to the last bit; the first has 0.

        Nothing else hides what is sent without noise: who makes it again as it was made gets the
        same bits. (Earlier versions joined what rounding might have moved apart, so that updates of
        small steps, or arrays of small numbers, shared one place; corrected 2026-11-29.)
        """
        known: dict[bytes, int] = {}
        rows = (self.means + 0.0).cpu().numpy()  # -0 is 0
        return torch.tensor([known.setdefault(row.tobytes(), len(known)) for row in rows])

    @property
    def mu(self) -> float | None:
        """The message is mu-Gaussian DP; None where nothing bounds it."""
        if self.radius is None or not self.equal_noise or len(self.scales[0].unique()) != 1:
            return None
        return self.radius / float(self.scales[0, 0])


def flat(arrays: Arrays) -> Float[Tensor, " entries"]:
    """Return a message as one vector, arrays in the order of their names' mapping."""
    return torch.cat([value.flatten() for value in arrays.values()])


def axes(
    products: Float[Tensor, "candidates candidates"],
) -> tuple[Float[Tensor, "candidates axes"], Float[Tensor, " axes"]]:
    """Return the axes along which candidates differ, and by how much.

    Differences small beside others stay, since noise may be smaller still: what is left out is what
    the products' own rounding hides.

    Args:
        products: Of the candidates' messages with each other, in double precision.

    Returns:
        Unit vectors and lengths; a candidate's place is its row of their product.
    """
    values, vectors = torch.linalg.eigh(products)
    hidden = len(products) * torch.finfo(products.dtype).eps
    kept = values > values.max().clamp_min(0) * hidden
    return vectors[:, kept], values[kept].sqrt()


def nearness(
    drawn: Float[Tensor, " drawn columns"], candidates: Float[Tensor, " candidates columns"]
) -> Float[Tensor, " drawn candidates"]:
    """Return how well candidates' numbers in the clear are those of a message, but for rounding.

    An earlier version took for the same whatever was some units in the last place apart, which
    joined the losses of many candidates; corrected 2026-11-29.

    Args:
        drawn: Of messages.
        candidates: Of candidates.

    Returns:
        Log-likelihoods, of rounding by one unit in the last place; minus infinity far from it.
    """
    size = candidates.abs().clamp_min(1e-3)
    gap = (drawn.unsqueeze(1) - candidates).abs() / size
    found = -(gap / torch.finfo(torch.float32).eps).square().sum(2) / 2
    return found.masked_fill((gap > _CLEAR).any(2), -torch.inf)


def told_apart(
    truths: Int[Tensor, " drawn"], clear: Float[Tensor, " candidates columns"]
) -> Float[Tensor, " drawn candidates"]:
    """Return whether candidates send what a truth sends in the clear, to the last bit.

    Who makes the numbers again as they were made gets the same bits. An earlier version granted
    candidates the rounding of :func:`nearness`, so that losses some units in the last place apart
    hid each other; corrected 2026-11-29.

    Args:
        truths: Numbers of candidates.
        clear: Of all candidates.

    Returns:
        Log-likelihoods: 0, or minus infinity.
    """
    found = torch.zeros(len(truths), len(clear), dtype=torch.float64)
    for column in clear.unbind(1):
        found.masked_fill_(column[truths].unsqueeze(1) != column, -torch.inf)
    return found


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
        made = means + noise * scales.repeat_interleave(sizes, 1)
        if not messages.across:
            return made
        return torch.cat([made, scales.square() * _squares(messages, len(truths), random)], 1)
    pair = []
    for each in (scales[:, :count], scales[:, count:]):
        uniform = torch.rand(means.shape, generator=random).clamp_min(1e-7).to(means) - 0.5
        noise = -uniform.sign() * torch.log1p(-2 * uniform.abs())
        pair.append(noise * each.repeat_interleave(sizes, 1))
    return means + pair[0] - pair[1]


def _squares(messages: Messages, count: int, random: torch.Generator) -> Tensor:
    """Return squared norms of unit noise across all candidates' differences, by block."""
    seed = int(torch.randint(2**62, (1,), generator=random))
    found = np.random.default_rng(seed).chisquare(
        np.maximum(messages.across, 1), (count, len(messages.across))
    )
    return torch.from_numpy(found * (np.array(messages.across) > 0)).to(messages.means)


def _fixed(messages: Messages, drawn: Tensor) -> Tensor:
    """0 of the nearest, if it sends the message up to rounding; else minus infinity."""
    means = messages.means.double()
    limit = ROUNDING * float(means.norm(dim=1).max())
    # Two messages lie at least as far apart as some of their entries do, which most pairs settle.
    some = slice(-_SOME, None)
    near = torch.cdist(drawn[:, some].double(), means[:, some]) <= limit
    apart = torch.full_like(near, torch.inf, dtype=torch.float64)
    for message, candidate in (pairs.unbind(1) for pairs in near.nonzero().split(_PAIRS)):
        apart[message, candidate] = (drawn[message].double() - means[candidate]).norm(dim=1)
    least = apart.amin(1, keepdim=True).clamp_max(limit)
    return torch.zeros_like(apart).masked_fill(apart > least, -torch.inf)


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
    for block, count in enumerate(messages.across):
        deviation = messages.scales[:, block]
        squares = drawn[:, [messages.means.shape[1] + block]].double()
        found -= squares / (2 * deviation.square()) + count * deviation.log()
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
    axis = axis / torch.linalg.vector_norm(axis, dim=-1, keepdim=True)  # to double precision
    rows, entries = axis.shape[1:]
    gap = (drawn.double().unsqueeze(1) - messages.means.double()).unflatten(2, (rows, entries))
    on_axis = (gap * axis).sum(-1)
    off = (gap - on_axis.unsqueeze(-1) * axis).square().sum(-1)
    size = float(torch.linalg.vector_norm(messages.means.double(), dim=1).max()) * ROUNDING
    found = _line(on_axis.square(), along, 1, size) + _line(off, across, entries - 1, size)
    return found.sum(-1)


def _line(squares: Tensor, deviation: Tensor, axes: int, rounding: float) -> Tensor:
    """Return normal log-densities, up to a constant of the axes; of a point above any of them."""
    width = deviation.clamp_min(1e-30)
    normal = -squares / (2 * width.square()) - axes * width.log()
    point = torch.full_like(squares, axes * _POINT).masked_fill(squares > rounding**2, -torch.inf)
    return torch.where(deviation > 0, normal, point)


_LIKELIHOODS = {"fixed": _fixed, "normal": _normal, "laplace": _laplace, "axial": _axial}


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
