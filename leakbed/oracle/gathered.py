"""Several messages of each candidate, read together without holding them all.

Squared distances of messages with noise of their own add up. So of each message the products of the
candidates' differences are added to one matrix, and the message is dropped; in the end candidates
are points again, as far apart as all their messages together. What was recorded is a point among
them: noise across all differences says nothing of the candidate.

Where normal noise follows the candidate, likelihoods add up instead of distances, and noise across
the differences tells its own size. So of each message the differences are kept, and of the noise
across them its squared norm: that is all that a likelihood depends on. Messages of other noise are
kept whole.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.oracle.messages import ROUNDING, Family, Messages, axes

_CHUNK = 65536  # entries at once
_MEMORY = 2**32  # bytes of what is kept of messages whose likelihoods add up


@dataclass(kw_only=True, eq=False)
class Gathered:
    """What a row left on the wire; candidate 0 is the truth.

    Attributes:
        count: How many messages.
    """

    count: int = 0
    _sums: "dict[tuple[Family, bool], _Sum | _Noiseless]" = field(default_factory=dict)
    _kept: list[tuple[Messages, Tensor]] = field(default_factory=list)
    _clear: list[Tensor] = field(default_factory=list)

    def add(
        self, messages: Messages, seen: Float[Tensor, " entries"], *, apart: bool = False
    ) -> Float[Tensor, " entries"]:
        """Read one more message.

        Args:
            messages: Of all candidates.
            seen: What was recorded.
            apart: Whether it can be left out of what is read together; its noise must be none, or
                normal and the same for all candidates.

        Returns:
            How far that is from the truth's; in units of the noise, where that is normal.

        Raises:
            NoCeilingError: If what must be kept of all messages is beyond memory.
        """
        scale = torch.ones(messages.means.shape[1], dtype=torch.float64)
        if messages.family == "normal":
            scale = messages.scales[0].repeat_interleave(torch.tensor(messages.sizes))
        residual = (seen.double() - messages.means[0].double()) / scale
        self.count += 1
        self._clear.append(messages.clear)
        if messages.equal_noise or messages.family == "fixed":
            kind = messages.family, apart
            made = _Noiseless() if messages.family == "fixed" else _Sum()
            self._sums.setdefault(kind, made).add(messages, residual, scale)
            return residual
        follows = messages.family == "normal"
        self._kept.append(_reduced(messages, seen) if follows else (messages, seen))
        held = sum(each.means.numel() * each.means.element_size() for each, _ in self._kept)
        if held > _MEMORY:
            raise NoCeilingError(
                f"no ceiling of several messages together: what {self.count} of them tell of "
                f"{len(messages)} candidates is more than {_MEMORY / 2**30:.0f} GiB; ask for fewer "
                "candidates"
            )
        return residual

    def together(self, *, apart: bool = True) -> tuple[Messages, Float[Tensor, " 1 numbers"]]:
        """Return all messages as one of each candidate, and what was recorded in its place.

        What was sent without noise and is not what the truth sends is a
        :class:`~leakbed.contracts.noise_laws.NoCeilingError`.

        Args:
            apart: Whether those are read that can be left out.

        Returns:
            Short messages, as likely as all messages together.
        """
        sums = [(key, each) for key, each in self._sums.items() if apart or not key[1]]
        parts = [each.together() for _, each in sums] + self._kept
        (first, _), *rest = parts
        others = tuple(each for each, _ in rest)
        made = replace(first, clear=torch.cat(self._clear, 1), others=others, radius=None)
        return made, torch.cat([seen.double() for _, seen in parts]).unsqueeze(0)


@dataclass(kw_only=True, eq=False)
class _Sum:
    """Messages of normal noise that is the same for all candidates."""

    gram: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    seen: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, messages: Messages, residual: Tensor, scale: Tensor) -> None:
        gram, seen = _products(messages.means, residual, scale)
        self.gram, self.seen = self.gram + gram, self.seen + seen

    def together(self) -> tuple[Messages, Tensor]:
        places, seen = _places(self.gram, self.seen)
        return _placed(places, "normal"), seen


@dataclass(kw_only=True, eq=False)
class _Noiseless:
    """Messages without noise: which candidates send the same in all of them."""

    groups: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    off: float = 0.0  # squared distance of what was recorded from the truth
    size: float = 0.0  # squared norm of the truth

    def add(self, messages: Messages, residual: Tensor, scale: Tensor) -> None:
        del scale
        both = self.groups * len(messages) + messages.groups
        self.groups = both.unique(return_inverse=True)[1]
        self.off += float(residual.square().sum())
        self.size += float(messages.means[0].double().square().sum())

    def together(self) -> tuple[Messages, Tensor]:
        if self.off > ROUNDING**2 * self.size:
            raise NoCeilingError(
                "recorded messages are not what the row sends: the model, the order of its "
                "arrays, or the training before it is another, perhaps on another device"
            )
        return _placed(self.groups.double().unsqueeze(1), "fixed"), torch.zeros(1).double()


def _placed(places: Tensor, family: Family) -> Messages:
    return Messages(
        means=places,
        family=family,
        sizes=(places.shape[1],),
        scales=torch.ones(len(places), 1, dtype=torch.float64),
        clear=torch.zeros(len(places), 0, dtype=torch.float64),
    )


def _reduced(messages: Messages, seen: Tensor) -> tuple[Messages, Tensor]:
    """Return what likelihoods of normal noise that follows the candidate depend on."""
    means, points, squares = [], [], []
    start = 0
    for size in messages.sizes:
        block = slice(start, start + size)
        residual = seen[block].double() - messages.means[0, block].double()
        gram, along = _products(messages.means[:, block], residual, torch.ones(size).double())
        places, point = _places(gram, along)
        means.append(places)
        points.append(point)
        squares.append((residual.square().sum() - point.square().sum()).clamp_min(0))
        start += size
    sizes = tuple(each.shape[1] for each in means)
    across = tuple(size - own for size, own in zip(messages.sizes, sizes, strict=True))
    made = replace(messages, means=torch.cat(means, 1), sizes=sizes, across=across)
    return made, torch.cat([*points, torch.stack(squares)])


def _products(means: Tensor, residual: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products of candidates' differences from the truth, and with a residual."""
    gram = torch.zeros(len(means), len(means), dtype=torch.float64)
    seen = torch.zeros(len(means), dtype=torch.float64)
    for start in range(0, len(scale), _CHUNK):
        part = slice(start, start + _CHUNK)
        apart = (means[:, part] - means[0, part]).double() / scale[part]
        gram += apart @ apart.T
        seen += apart @ residual[part]
    return gram, seen


def _places(gram: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return coordinates of candidates, the truth at 0, and of a message among them."""
    vectors, lengths = axes(gram)
    places = vectors * lengths
    return places - places[:1], vectors.T @ seen / lengths
