"""Smashed noise: a node adds random noise to the activations it sends at the cut.

Source: Titcombe, Hall, Papadopoulos, Romanini. "Practical Defences Against Model Inversion Attacks
for Split Neural Networks", 2021, https://arxiv.org/abs/2104.05743.
Departures from the source: normal noise instead of Laplace; optional clipping of each row, without
which additive noise carries no differential-privacy guarantee.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, Protects


@dataclass(frozen=True, kw_only=True)
class SmashedNoise(Defense):
    """Add normal noise to smashed data.

    With ``clip`` set, one message is the Gaussian mechanism on one sample's row (replacement
    neighbours, sensitivity ``2 * clip``); every epoch sends the row again, so compose over epochs.

    Attributes:
        sigma: Standard deviation of the noise, in units of the activations.
        clip: L2 norm to which each row is clipped first; None clips nothing.
    """

    name: ClassVar[str] = "smashed-noise"
    source: ClassVar[str] = "Titcombe et al., 2021, https://arxiv.org/abs/2104.05743"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED})

    sigma: float = 0.5
    clip: float | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range.
        """
        if self.sigma < 0 or (self.clip is not None and self.clip <= 0):
            raise ValueError(
                f"smashed-noise needs sigma >= 0 and clip > 0, got {self.sigma} and {self.clip}"
            )

    def protect_smashed(
        self, state: DefenseState, smashed: Float[Tensor, " batch *cut"]
    ) -> tuple[DefenseState, Float[Tensor, " batch *cut"]]:
        """Return the activations with noise.

        Args:
            state: Fixes the noise of this message.
            smashed: The activations the node would send.

        Returns:
            The same state, and the activations to send.
        """
        if self.clip is not None:
            norms = smashed.flatten(1).norm(dim=1).clamp_min(1e-12)
            shrink = (self.clip / norms).clamp_max(1.0)
            smashed = smashed * shrink.reshape(-1, *[1] * (smashed.dim() - 1))
        noise = torch.randn(smashed.shape, generator=state.generator())
        return state, smashed + self.sigma * noise.to(smashed)
