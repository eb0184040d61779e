"""Marvell: normal noise on cut gradients, shaped so that two classes look as alike as it can buy.

Each class's rows are modelled as an isotropic Gaussian around their mean. Of all normal noise with
a given power, Marvell adds that which minimises the sum of both Kullback-Leibler divergences
between the perturbed classes, hence a bound on the AUC of *any* score of one row.

Source: Li, Sun, Yang, Gao, Zhang, Xie, Smith, Wang. "Label Leakage and Protection in Two-party
Split Learning", ICLR 2022, https://arxiv.org/abs/2102.08504, and its code.
Departures from the source:
- The code alternates one-dimensional problems until they settle. Here two of them are nested and
  the third has a closed form: exact, since the problem is a geometric program, convex in logarithms
  of the variances, and so is its minimum over any of them.
- A batch of one class, which the code sends as it is, gets isotropic noise of the power solved
  last; before any, of the power as if the missing class had the opposite mean, which is what an
  untrained model's gradients look like.
- A class of one row has no variance to speak of: variances are at least a billionth of the larger
  one, or of the distance between the means.
- Not here: the mode that raises the power until a wanted divergence is reached.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from typing import ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.defending import Run

_BINARY = 2
_INSTEAD = "use 'iso-noise', 'gradient-compression', 'label-dp' or 'dp-cut-gradient' instead"
_NARROWEST = 1e-9  # of the scale of the problem: far below any noise that is bought
_PRECISION = 1e-9  # of a variance, relative
_WHOLE_AXIS = 4.0  # from this divergence on, the bound is 1


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Two classes of rows as Marvell sees them.

    Attributes:
        share: Of the positive rows, in (0, 1).
        positive: Variance of an entry of the positive rows.
        negative: Of the negative rows.
        distance: Squared, between the means.
        entries: Of a row.
    """

    share: float
    positive: float
    negative: float
    distance: float
    entries: int

    def mirrored(self) -> "Classes":
        """Return them with positive and negative exchanged."""
        return replace(self, share=1 - self.share, positive=self.negative, negative=self.positive)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Variances of normal noise, for each class along the line of the means and across it."""

    positive_along: float
    positive_across: float
    negative_along: float
    negative_across: float

    def power(self, of: Classes) -> float:
        """Return the expected squared norm of a row's noise."""
        across = of.entries - 1
        positive = self.positive_along + across * self.positive_across
        negative = self.negative_along + across * self.negative_across
        return of.share * positive + (1 - of.share) * negative

    def mirrored(self) -> "Noise":
        """Return it with positive and negative exchanged."""
        return Noise(
            positive_along=self.negative_along,
            positive_across=self.negative_across,
            negative_along=self.positive_along,
            negative_across=self.positive_across,
        )


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


def measured(rows: Float[Tensor, " batch entries"], positive: Bool[Tensor, " batch"]) -> Classes:
    """Return the two classes of a batch.

    Args:
        rows: Cut gradients.
        positive: Which are of the positive class; some are and some are not.

    Returns:
        Their shares, spreads and distance.
    """
    ones, zeros = rows[positive].double(), rows[~positive].double()
    distance = float((ones.mean(0) - zeros.mean(0)).square().sum())
    spreads = [float(each.var(0, correction=0).mean()) for each in (ones, zeros)]
    least = _NARROWEST * max(*spreads, distance / rows.shape[1])
    return Classes(
        share=len(ones) / len(rows),
        positive=max(spreads[0], least),
        negative=max(spreads[1], least),
        distance=distance,
        entries=rows.shape[1],
    )


def divergence(classes: Classes, noise: Noise) -> float:
    """Return the sum of both Kullback-Leibler divergences between the perturbed classes.

    Args:
        classes: Before the noise.
        noise: Added to them.

    Returns:
        From 0 (alike); higher leaks more.
    """
    along = classes.positive + noise.positive_along, classes.negative + noise.negative_along
    across = classes.positive + noise.positive_across, classes.negative + noise.negative_across
    total = (classes.entries - 1) * (across[0] / across[1] + across[1] / across[0])
    total += (along[1] + classes.distance) / along[0] + (along[0] + classes.distance) / along[1]
    return total / 2 - classes.entries


def highest_auc(divergence: float) -> float:
    """Return the bound on the leak AUC of any score of one row.

    Args:
        divergence: The sum of both divergences.

    Returns:
        1/2 for classes that are alike; 1 where the divergence bounds nothing.
    """
    if divergence >= _WHOLE_AXIS:
        return 1.0
    return min(1.0, 1 / 2 + sqrt(divergence) / 2 - divergence / 8)


def least_divergence(classes: Classes, *, power: float) -> Noise:
    """Return the noise that makes two classes most alike.

    Args:
        classes: Variances above 0.
        power: Expected squared norm of a row's noise, at most; above 0.

    Returns:
        The minimiser of :func:`divergence`, with no less noise along the line than across it.
    """
    if classes.negative > classes.positive:
        return least_divergence(classes.mirrored(), power=power).mirrored()
    # The wider class needs no noise across the line; the other wants as much as makes them equal.
    rest = 1 - classes.share

    def along(across: float) -> Noise:
        return _along(classes, across=across, power=power - (classes.entries - 1) * rest * across)

    most = min(classes.positive - classes.negative, power / (rest * classes.entries))
    if classes.entries == 1:
        most = 0.0
    base = classes.negative
    least = _least(
        lambda x: divergence(classes, along(_above(x, base, most))), log(base), log(base + most)
    )
    return along(_above(least, base, most))


def _along(classes: Classes, *, across: float, power: float) -> Noise:
    """Return the best noise along the line, given that across it and the power that is left."""
    share, rest = classes.share, 1 - classes.share
    most = max(across, power / rest)

    def best(negative: float) -> Noise:
        # For a given variance of one class, the other's optimum is the root of a quadratic.
        wide = classes.negative + negative
        wanted = sqrt(wide * (wide + classes.distance)) - classes.positive
        affordable = max(0.0, (power - rest * negative) / share)
        return Noise(
            positive_along=min(max(wanted, 0.0), affordable),
            positive_across=0.0,
            negative_along=negative,
            negative_across=across,
        )

    low, high = log(classes.negative + across), log(classes.negative + most)
    least = _least(
        lambda x: divergence(classes, best(_above(x, classes.negative, most, at_least=across))),
        low,
        high,
    )
    return best(_above(least, classes.negative, most, at_least=across))


def _above(logarithm: float, base: float, most: float, *, at_least: float = 0.0) -> float:
    """Return what was added to a variance, given the logarithm of the sum."""
    return min(max(exp(logarithm) - base, at_least), most)


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one minimum on an interval takes it, its ends included."""
    if high - low <= _PRECISION:
        return low
    found = minimize_scalar(
        function, bounds=(low, high), method="bounded", options={"xatol": _PRECISION}
    )
    return min((low, float(found.x), high), key=function)


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
    return scales[:, :1] * on_line * line + scales[:, 1:] * everywhere
