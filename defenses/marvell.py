"""Marvell: normal noise on cut gradients, shaped so that two classes look as alike as it can buy.

Each class's rows are modelled as an isotropic Gaussian around their mean. Of all normal noise with
a given power, Marvell adds that which minimises the sum of both Kullback-Leibler divergences
between the perturbed classes, hence a bound on the AUC of *any* score of one row.

Source: Li, Sun, Yang, Gao, Zhang, Xie, Smith, Wang. "Label Leakage and Protection in Two-party
Split Learning", ICLR 2022, https://arxiv.org/abs/2102.08504, and its code.
Departures from the source:
- The code alternates one-dimensional problems until they settle; here they are nested, which is
  exact: see :mod:`leakbed.class_noise`.
- A batch of one class, which the code sends as it is, gets isotropic noise of the power solved
  last; before any, of the power as if the missing class had the opposite mean, which is what an
  untrained model's gradients look like.
- A class of one row has no variance to speak of: variances are at least a billionth of the larger
  one, or of the distance between the means.
- Not here: the mode that raises the power until a wanted divergence is reached.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leakbed.class_noise import Noise, least_divergence, measured
from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.defending import Run

_BINARY = 2
_INSTEAD = "use 'iso-noise', 'gradient-compression', 'label-dp' or 'dp-cut-gradient' instead"


@dataclass(frozen=True, kw_only=True)
class Marvell(Defense):
    """Make the cut gradients of two classes alike; claims no differential privacy.

    Attributes:
        scale: Power of the noise, in squared distances between the class means, above 0.
    """

    name: ClassVar[str] = "marvell"
    source: ClassVar[str] = "Li et al., ICLR 2022, https://arxiv.org/abs/2102.08504"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If the scale is not above 0.
        """
        if self.scale <= 0:
            raise ValueError(f"marvell needs scale > 0, got {self.scale}")

    def check_run(self, run: Run) -> None:
        """Refuse more than two classes.

        Args:
            run: Its number of classes is looked at.

        Raises:
            IllegalCombinationError: If there are not two.
        """
        if run.classes != _BINARY:
            raise IllegalCombinationError(
                f"marvell is solved for two classes, this task has {run.classes}; {_INSTEAD}"
            )

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Float[Tensor, " batch *cut"]
    ) -> NoReturn:
        """Refuse: the noise depends on the labels.

        Args:
            state: Unused.
            gradient: Unused.

        Raises:
            IllegalCombinationError: Always.
        """
        del state, gradient
        raise IllegalCombinationError(
            "marvell needs the labels of a gradient's rows, and whoever sends this one has none; "
            f"apply it where the labels are, or {_INSTEAD}"
        )

    def protect_labelled_gradient(
        self,
        state: DefenseState,
        gradient: Float[Tensor, " batch *cut"],
        labels: Int[Tensor, " batch"],
    ) -> tuple[DefenseState, Float[Tensor, " batch *cut"]]:
        """Return the gradient with noise.

        Args:
            state: Fixes the noise of this message, and knows the power solved last.
            gradient: The gradient the label holder would send.
            labels: Of its rows, 0 or 1.

        Returns:
            The state with the power of this batch, and the gradient to send.

        Raises:
            IllegalCombinationError: If a label is another.
        """
        if ((labels != 0) & (labels != 1)).any():
            raise IllegalCombinationError(
                f"marvell is solved for labels 0 and 1, here is {int(labels.max())}; {_INSTEAD}"
            )
        rows, positive = gradient.flatten(1), labels == 1
        if not 0 < int(positive.sum()) < len(rows):
            return state, gradient + self._isotropic(state, rows).reshape(gradient.shape)
        found = measured(rows, positive)
        power = self.scale * found.distance
        if power == 0:  # the means are the same
            return state, gradient
        noise = _drawn(state, rows, positive, least_divergence(found, power=power))
        # A mean loss divides rows by their number, so the power of another batch scales with it.
        kept = {"power": torch.tensor(power * len(rows) ** 2, dtype=torch.float64)}
        return replace(state, tensors=kept), gradient + noise.reshape(gradient.shape)

    def _isotropic(
        self, state: DefenseState, rows: Float[Tensor, " batch entries"]
    ) -> Float[Tensor, " batch entries"]:
        """Return the noise of a batch of one class."""
        if "power" in state.tensors:
            power = float(state.tensors["power"]) / len(rows) ** 2
        else:
            power = self.scale * float((2 * rows.mean(0)).square().sum())
        noise = torch.randn(rows.shape, generator=state.generator()).to(rows)
        return sqrt(power / rows.shape[1]) * noise


def _drawn(
    state: DefenseState,
    rows: Float[Tensor, " batch entries"],
    positive: Bool[Tensor, " batch"],
    noise: Noise,
) -> Float[Tensor, " batch entries"]:
    """Return one draw of the noise for each row of a batch."""
    line = rows[positive].mean(0) - rows[~positive].mean(0)
    line = line / torch.linalg.vector_norm(line)
    generator = state.generator()
    on_line = torch.randn(len(rows), 1, generator=generator).to(rows)
    everywhere = torch.randn(rows.shape, generator=generator).to(rows)
    pairs = torch.tensor(
        [
            [noise.negative_along - noise.negative_across, noise.negative_across],
            [noise.positive_along - noise.positive_across, noise.positive_across],
        ]
    )
    scales = pairs.clamp_min(0).sqrt()[positive.long()].to(rows)
    drawn: Tensor = scales[:, :1] * on_line * line + scales[:, 1:] * everywhere
    return drawn
