"""DP cut gradient: the message itself is the Gaussian mechanism.

Each sample's row of the cut gradient is clipped to a norm, and normal noise is added to every row.

Source: the Gaussian mechanism, calibrated exactly: Balle, Wang. "Improving the Gaussian Mechanism
for Differential Privacy", ICML 2018, https://arxiv.org/abs/1805.06530, by Google's dp-accounting;
clipping as in Abadi et al., CCS 2016, https://arxiv.org/abs/1607.00133.
Departures from the source: it is ours to put it on the message; DP-SGD on the top, which is
published as a defence against reading labels from cut gradients, leaves the message as it is.
"""

from dataclasses import dataclass
from functools import cached_property
from math import inf, sqrt
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.defending import Run

_SENSITIVITY = 2.0  # another label can turn a row of norm C into its opposite


@dataclass(frozen=True, kw_only=True)
class DPCutGradient(Defense):
    """Clip every row of a cut gradient and add normal noise.

    A node knows which of its samples is in which batch, so nothing is gained by sampling. What is
    bounded is what a sample's own rows say of its label, given the top's weights. Those learn from
    labels too, and later rows are made with them: stack ``dp-sgd`` to bound that way, and add both
    epsilons and deltas. A layer that mixes the samples of a batch, such as BatchNorm in the top,
    voids the claim.

    Attributes:
        epsilon: Of one sample's label over the horizon, above 0.
        delta: With it, in (0, 1).
        clip: L2 norm to which a sample's gradient is clipped, as it is before the mean over the
            batch divides it.
        horizon: How often a sample's row is sent in the whole run, at most.
    """

    name: ClassVar[str] = "dp-cut-gradient"
    source: ClassVar[str] = "Balle, Wang, ICML 2018, https://arxiv.org/abs/1805.06530"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})
    claims: ClassVar[str] = (
        "(epsilon, delta) of one sample's label in its own rows of the cut gradient, given the "
        "top's weights; rows clipped to clip, replaced ones 2 clip apart, sent horizon times"
    )

    epsilon: float = 8.0
    delta: float = 1e-5
    clip: float = 1.0
    horizon: int = 1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range.
        """
        if not 0 < self.epsilon < inf or not 0 < self.delta < 1:
            raise ValueError(
                "dp-cut-gradient needs a finite epsilon > 0 and 0 < delta < 1, got "
                f"{self.epsilon} and {self.delta}"
            )
        if self.clip <= 0 or self.horizon < 1:
            raise ValueError(
                "dp-cut-gradient needs clip > 0 and a horizon of 1 or more, got "
                f"{self.clip} and {self.horizon}"
            )

    @cached_property
    def sigma(self) -> float:
        """Standard deviation of the noise, in units of ``clip``."""
        from dp_accounting import get_sigma_gaussian  # noqa: PLC0415  a second in every process

        once: float = get_sigma_gaussian(self.epsilon, self.delta)
        return _SENSITIVITY * sqrt(self.horizon) * once

    def check_run(self, run: Run) -> None:
        """Refuse a run that sends rows more often than the claim covers.

        Args:
            run: Its passes are looked at.

        Raises:
            IllegalCombinationError: If it does.
        """
        if run.passes > self.horizon:
            raise IllegalCombinationError(
                f"dp-cut-gradient claims epsilon = {self.epsilon} for rows that are sent "
                f"{self.horizon} times, this run sends some {run.passes} times; set horizon = "
                f"{run.passes}, which adds noise, or train less"
            )

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Float[Tensor, " batch *cut"]
    ) -> tuple[DefenseState, Float[Tensor, " batch *cut"]]:
        """Return the gradient with clipped rows and noise.

        Args:
            state: Fixes the noise of this message.
            gradient: The gradient the label holder would send.

        Returns:
            The same state, and the gradient to send.
        """
        rows = gradient.flatten(1)
        clip = self.clip / len(rows)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        clipped = rows * (clip / norms.clamp_min(1e-30)).clamp_max(1.0)
        noise = torch.randn(rows.shape, generator=state.generator()).to(rows)
        return state, (clipped + self.sigma * clip * noise).reshape(gradient.shape)
