"""Local DP: a node clips its update and adds normal noise, as Flower's ``LocalDpMod`` does.

Source: ``flwr.clientapp.mod.LocalDpMod`` of Flower 1.41; the Gaussian mechanism of Dwork, Roth.
"The Algorithmic Foundations of Differential Privacy", 2014, appendix A,
https://doi.org/10.1561/0400000042.
Departures from the source; without these a test finds the two alike:
- Integer buffers, such as BatchNorm's counters, pass and are left out of the norm. Flower counts
  them: one that moved by 57 shrinks the whole update to a 57th, and is itself sent as it is.
- An update of zeros is sent as noise; Flower divides by its norm.
- The noise comes from the run's seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, log, sqrt
from typing import ClassVar

from torch import Tensor

from defenses.weight_noise import WeightNoise
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.privacy_claims import check_budget


@dataclass(frozen=True, kw_only=True)
class LocalDP(Defense):
    """Clip uploaded updates and add the noise of a privacy budget.

    The noise is the mod's: sensitivity * sqrt(2 ln(1.25 / delta)) / epsilon. That formula is proved
    for epsilon below 1 alone. At delta = 1e-5 it happens to hold up to 8.4; beyond, the noise is
    worth a larger epsilon than was asked for, at 48 one of 90.5. A sensitivity of ``clip``, the
    usual setting of the mod, bounds the presence of an update; two updates differ by up to twice
    as much.

    Attributes:
        epsilon: Put into the formula, for one update of one round; above 0.
        delta: With it, in (0, 1).
        clip: L2 norm to which the whole update is clipped; ``clipping_norm`` of the mod.
        sensitivity: Of the formula; None for ``clip``, 0 clips alone.
    """

    name: ClassVar[str] = "local-dp"
    source: ClassVar[str] = (
        "Flower's LocalDpMod; Dwork, Roth, 2014, https://doi.org/10.1561/0400000042"
    )
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.UPDATE})
    claims: ClassVar[str] = (
        "the Gaussian mechanism on the presence of one node's update in one round, clipped to "
        "clip, integer buffers left out; epsilon is what the formula was given, which it keeps below 1"
    )

    epsilon: float = 1.0
    delta: float = 1e-5
    clip: float = 1.0
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range.
        """
        check_budget(self.name, epsilon=self.epsilon, delta=self.delta, clip=self.clip)
        if self.sensitivity is not None and not 0 <= self.sensitivity < inf:
            raise ValueError(f"local-dp needs a finite sensitivity >= 0, got {self.sensitivity}")

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each weight, in the weights' own unit."""
        sensitivity = self.clip if self.sensitivity is None else self.sensitivity
        return sensitivity * sqrt(2 * log(1.25 / self.delta)) / self.epsilon

    def protect_update(
        self,
        state: DefenseState,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> tuple[DefenseState, Mapping[str, Tensor]]:
        """Return the weights of the clipped update with noise; integer buffers pass unchanged.

        Args:
            state: Fixes the noise of this message.
            before: The weights the node received.
            after: The weights it would send.

        Returns:
            The same state, and the weights to send.
        """
        noise = WeightNoise(form="corrected", scale=self.deviation / self.clip, clip=self.clip)
        return noise.protect_update(state, before, after)
