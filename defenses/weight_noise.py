"""Weight noise: a node adds random noise to the weights it sends back.

The published form scales Laplace or normal noise by the size of each tensor; the corrected form
clips the whole update first, so that the noise bounds what one round can reveal.

Source: Zhao, Luo, Ding. "Deep Leakage from Model in Federated Learning", CPAL 2024,
https://arxiv.org/abs/2206.04887.
Departures from the source:
- Published code noises both snapshots an attacker holds. A server knows the weights it sent, so
  here their noise moves into the upload: the difference has the published distribution, the
  starting point is exact.
- ``form = "corrected"`` is ours: the published form divides a tensor by a factor and multiplies it
  back after adding noise, so nothing is ever clipped and no privacy guarantee follows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.naming import unknown

_ROW_NORM = 0.2  # the published code's constant
_LEGAL = {"form": ("published", "corrected"), "distribution": ("normal", "laplace")}


@dataclass(frozen=True, kw_only=True)
class WeightNoise(Defense):
    """Add noise to uploaded weights.

    The corrected form is the Gaussian mechanism on one node's update in one round, with noise
    multiplier ``scale`` (neighbouring data sets differ in that node's whole data); over several
    rounds compose it with an accountant.

    Attributes:
        scale: Published form: scale of the noise before the per-tensor factor. Corrected form:
            standard deviation in units of ``clip``.
        form: ``"published"`` or ``"corrected"``.
        distribution: ``"normal"`` or ``"laplace"``; the corrected form is normal only.
        clip: L2 norm to which the corrected form clips the whole update.
    """

    name: ClassVar[str] = "weight-noise"
    source: ClassVar[str] = "Zhao, Luo, Ding, CPAL 2024, https://arxiv.org/abs/2206.04887"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.UPDATE})
    claims: ClassVar[str] = (
        "in the corrected form, the Gaussian mechanism on one node's update of one round, clipped "
        "to clip; nothing in the published form"
    )

    scale: float = 0.01
    form: str = "published"
    distribution: str = "normal"
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range or has no such name.
        """
        for setting, legal in _LEGAL.items():
            if (value := getattr(self, setting)) not in legal:
                raise ValueError(unknown(setting, value, legal))
        if self.scale < 0 or self.clip <= 0:
            raise ValueError(
                f"weight-noise needs scale >= 0 and clip > 0, got {self.scale} and {self.clip}"
            )
        if self.form == "corrected" and self.distribution != "normal":
            raise ValueError("weight-noise: the corrected form is normal; drop distribution")

    def protect_update(
        self,
        state: DefenseState,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> tuple[DefenseState, Mapping[str, Tensor]]:
        """Return the weights with noise; integer buffers pass unchanged.

        Args:
            state: Fixes the noise of this message.
            before: The weights the node received.
            after: The weights it would send.

        Returns:
            The same state, and the weights to send.
        """
        generator = state.generator()
        if self.form == "corrected":
            return state, self._corrected(before, after, generator)
        return state, {
            name: self._published(before[name], value, generator)
            if value.is_floating_point()
            else value
            for name, value in after.items()
        }

    def _published(self, before: Tensor, after: Tensor, generator: torch.Generator) -> Tensor:
        noise = [_factor(w) * self._draw(w, generator) for w in (before, after)]
        return after + noise[1] - noise[0]

    def _corrected(
        self,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        floating = [name for name, value in after.items() if value.is_floating_point()]
        moves = {name: after[name] - before[name] for name in floating}
        norm = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(move) for move in moves.values()])
        )
        shrink = (self.clip / norm.clamp_min(1e-12)).clamp_max(1.0)
        noisy = {
            name: before[name] + move * shrink + self.clip * self._draw(move, generator)
            for name, move in moves.items()
        }
        return {name: noisy.get(name, value) for name, value in after.items()}

    def _draw(self, like: Tensor, generator: torch.Generator) -> Tensor:
        if self.distribution == "normal":
            noise = torch.randn(like.shape, generator=generator)
        else:
            # Laplace by inversion: torch.distributions takes no generator.
            uniform = torch.rand(like.shape, generator=generator).clamp_min(1e-7) - 0.5
            noise = -uniform.sign() * torch.log1p(-2 * uniform.abs())
        return (self.scale * noise).to(like)


def _factor(weight: Tensor) -> Tensor:
    """Return the published per-tensor factor: its largest row norm over 0.2, at least 1."""
    if weight.dim() > 1:
        # Over input channels only, for convolutions too, as in the published code.
        largest = torch.linalg.vector_norm(weight, dim=1).max()
    else:
        largest = torch.linalg.vector_norm(weight)
    factor: Tensor = (largest / _ROW_NORM).clamp_min(1.0)
    return factor
