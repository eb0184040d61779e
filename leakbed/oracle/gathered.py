"""Several messages of each candidate, read together without holding them all.

Squared distances of messages with noise of their own add up. So of each message the products of the
candidates' differences are added to one matrix, and the message is dropped; in the end candidates
are points again, as far apart as all their messages together. What was recorded is a point among
them: noise across all differences says nothing of the candidate.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from leakbed.contracts.noise_laws import NoCeilingError
from leakbed.oracle.ceiling import ROUNDING, Family, Messages

_CHUNK = 65536  # entries at once


@dataclass(kw_only=True, eq=False)
class Gathered:
    """What a row left on the wire; candidate 0 is the truth.

    Attributes:
        count: How many messages.
    """

    count: int = 0
    _family: Family | None = None
    _gram: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    _seen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    _off: float = 0.0  # squared distance of what was recorded from the truth
    _size: float = 0.0  # squared norm of the truth, without noise
    _clear: list[Tensor] = field(default_factory=list)

    def add(self, messages: Messages, seen: Float[Tensor, " entries"]) -> Float[Tensor, " entries"]:
        """Read one more message.

        Args:
            messages: Of all candidates.
            seen: What was recorded.

        Returns:
            How far that is from the truth's, in units of the noise.

        Raises:
            NoCeilingError: If messages are of several kinds of noise, or of noise that follows the
                candidate.
        """
        if not (messages.equal_noise or messages.family == "fixed"):
            raise NoCeilingError(
                f"no ceiling of several messages together: their noise is {messages.family} and "
                "not the same whatever the candidate; ask for single messages"
            )
        if self._family not in {None, messages.family}:
            raise NoCeilingError(
                f"no ceiling of several messages together: some are {self._family}, some "
                f"{messages.family}; ask for single messages"
            )
        if not self.count:
            self._gram = torch.zeros(len(messages), len(messages), dtype=torch.float64)
            self._seen = torch.zeros(len(messages), dtype=torch.float64)
        self.count, self._family = self.count + 1, messages.family
        scale = torch.ones(messages.means.shape[1], dtype=torch.float64)
        if messages.family == "normal":
            scale = messages.scales[0].repeat_interleave(torch.tensor(messages.sizes))
        residual = (seen.double() - messages.means[0].double()) / scale
        for start in range(0, len(scale), _CHUNK):
            part = slice(start, start + _CHUNK)
            apart = (messages.means[:, part] - messages.means[0, part]).double() / scale[part]
            self._gram += apart @ apart.T
            self._seen += apart @ residual[part]
        self._off += float(residual.square().sum())
        self._size += float(messages.means[0].double().square().sum())
        self._clear.append(messages.clear)
        return residual

    def together(self) -> tuple[Messages, Float[Tensor, " 1 entries"]]:
        """Return all messages as one of each candidate, and what was recorded in its place.

        Returns:
            Short messages, whose distances are those of all messages together.

        Raises:
            NoCeilingError: If what was sent without noise is not what the truth sends.
        """
        values, vectors = torch.linalg.eigh(self._gram)
        kept = values > values.max().clamp_min(0) * torch.finfo(torch.float32).eps / 8
        length = values[kept].sqrt()
        places, seen = vectors[:, kept] * length, vectors[:, kept].T @ self._seen / length
        if self._family == "fixed":
            rounding = ROUNDING**2 * self._size
            if self._off > rounding:
                raise NoCeilingError(
                    "recorded messages are not what the row sends: the model, the order of its "
                    "arrays, or the training before it is another"
                )
            places[self._gram.diagonal() <= rounding] = 0
            seen = torch.zeros_like(seen)
        made = Messages(
            means=places - places[0],
            family=self._family or "fixed",
            sizes=(places.shape[1],),
            scales=torch.ones(len(places), 1, dtype=torch.float64),
            clear=torch.cat(self._clear, 1),
        )
        return made, seen.unsqueeze(0)
