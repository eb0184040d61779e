"""DP-SGD on the top: the server's own weights learn privately; the message leaves as it is.

Each sample's gradient of the top's weights is clipped, normal noise is added to their sum. What is
sent to the node is the gradient of the *smashed data*, which is neither clipped nor noised: as
published, this is no defence of the message, and here to be measured as that.

Source: Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang. "Deep Learning with Differential
Privacy", CCS 2016, https://arxiv.org/abs/1607.00133; against label inference as in the code of Liu,
Lyu, Cui, Tao (TIFS 2024, https://arxiv.org/abs/2203.05222), by opacus on the top alone.
Departures from the source:
- Opacus gives each sample's gradient and the noise multiplier; clipping and noise are these few
  lines instead of its optimiser, so that the noise comes from the defence's own stream.
- Batches are not drawn by Poisson sampling, in neither code, though the accountant takes it so. A
  node that knows its batches gains from that: at epsilon 10, rate 0.02 and 240 steps (4 passes) it
  would be 20 without the sampling, and 52 for another label instead of another sample.
- The horizon is the run's and is checked; that code calibrates for all epochs, attacks the first.
- A top with BatchNorm is refused, that code exchanges it for another layer.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.defending import Run
from leakbed.privacy_claims import check_budget, refuse_mixing

_SLACK = 1e-9  # a rate is a quotient of whole numbers, typed in as decimals


@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """Train the top by DP-SGD.

    Attributes:
        epsilon: Of one sample in the top's weights over the horizon, above 0.
        delta: With it, in (0, 1).
        clip: L2 norm to which each sample's gradient of the top's weights is clipped.
        rate: Share of a node's samples that is in one of its batches, at most; in (0, 1].
        steps: How many a node takes in the whole run, at most.
    """

    name: ClassVar[str] = "dp-sgd"
    source: ClassVar[str] = "Abadi et al., CCS 2016, https://arxiv.org/abs/1607.00133"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.TOP})
    labels: ClassVar[frozenset[str]] = frozenset({"shared", "server"})
    claims: ClassVar[str] = (
        "(epsilon, delta) of adding or removing one sample, in the top's weights alone and not in "
        "any message, given the smashed data received, and as if batches were drawn by Poisson "
        "sampling, which they are not; samples' gradients clipped to clip, over steps batches of a "
        "share of rate"
    )

    epsilon: float = 10.0
    delta: float = 1e-5
    clip: float = 1.0
    rate: float = 0.01
    steps: int = 1000

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range.
        """
        check_budget(self.name, epsilon=self.epsilon, delta=self.delta, clip=self.clip)
        if not 0 < self.rate <= 1 or self.steps < 1:
            raise ValueError(
                "dp-sgd needs 0 < rate <= 1 and steps of 1 or more, got "
                f"{self.rate} and {self.steps}"
            )

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise on a batch's sum, in units of ``clip``."""
        return _multiplier(self.epsilon, self.delta, self.rate, self.steps)

    def check_run(self, run: Run) -> None:
        """Refuse a run beyond the horizon, and a top in which samples mix.

        Args:
            run: Of one node's rows.

        Raises:
            IllegalCombinationError: If it is one of these.
        """
        rate = run.batch_size / run.rows
        if rate > self.rate + _SLACK or run.steps > self.steps:
            raise IllegalCombinationError(
                f"dp-sgd claims epsilon = {self.epsilon} for {self.steps} batches of a share of "
                f"{self.rate}; this run takes {run.steps} of {rate:g}; set steps and rate to these"
            )
        refuse_mixing(self.name, run.top)

    def protect_weight_gradients(
        self, state: DefenseState, gradients: Mapping[str, Float[Tensor, " batch *weight"]]
    ) -> tuple[DefenseState, Mapping[str, Float[Tensor, " *weight"]]]:
        """Return the mean of clipped gradients with noise.

        Args:
            state: Fixes the noise of this step.
            gradients: Of each sample's own loss, by parameter name.

        Returns:
            The same state, and one gradient for each parameter.
        """
        generator = state.generator()
        parts = [each.reshape(len(each), -1).norm(dim=1) for each in gradients.values()]
        norms = torch.stack(parts).norm(dim=0)
        shrink = (self.clip / norms.clamp_min(1e-30)).clamp_max(1.0)
        deviation = self.noise_multiplier * self.clip
        made = {}
        for name, each in gradients.items():
            total = torch.einsum("b,b...->...", shrink, each)
            noise = torch.randn(total.shape, generator=generator).to(total)
            made[name] = (total + deviation * noise) / len(each)
        return state, made


@cache
def _multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    from opacus.accountants.utils import get_noise_multiplier  # noqa: PLC0415  seconds to import

    with warnings.catch_warnings():
        # The search passes by multipliers at the end of the orders it tries: less tight, not wrong.
        warnings.filterwarnings("ignore", message="Optimal order is the")
        found: float = get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=delta,
            sample_rate=rate,
            steps=steps,
            accountant="rdp",
        )
    return found
