"""What the defences of updates compute, for the catalogue's classes and for a stranger's client.

A rule says what is sent in place of a node's weights. It is written in operators that arrays of
numpy and of torch share; what they do not share (norms, thresholds, draws) each brings along. So
the catalogue's classes in ``defenses/`` compute as they always have, on torch's noise, and
:mod:`leakbed.mods` carries the same rules in numpy, where no torch is installed.

Sources and departures stand in ``defenses/weight_noise.py``, ``defenses/local_dp.py`` and
``defenses/weight_sparsification.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import numpy as np

from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.lookup import unknown_name
from leakbed.seeds import derive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from leakbed.events import Array

A = TypeVar("A", bound=Any)
"""An array of numpy or a tensor of torch."""

ROW_NORM = 0.2
"""The published code's constant: a tensor's noise grows with its largest row norm over it."""

_VARIANCE = "running_var"  # torch's name, in all dimensions of BatchNorm
_NOISE = {"form": ("published", "corrected"), "distribution": ("normal", "laplace")}

_FEW = 3  # names in an error


class UnfitUpdateError(ValueError):
    """An update to which a defence cannot do what it claims."""


class Numbers(Protocol[A]):
    """What arrays of a library do in a way of its own."""

    def is_fraction(self, array: A) -> bool:
        """Say whether an array holds fractions; counters are sent as they are."""

    def finite(self, array: A) -> bool:
        """Say whether no number of an array is infinite or none at all."""

    def shrink(self, moves: list[A], clip: float) -> Any:  # noqa: ANN401  a number of the library's
        """Return by what all are multiplied so that their common L2 norm is at most ``clip``."""

    def factor(self, weight: A) -> Any:  # noqa: ANN401  likewise
        """Return the published factor of a tensor: its largest row norm over 0.2, at least 1."""

    def not_negative(self, array: A) -> A:
        """Return an array with 0 in place of what is below."""

    def where(self, chosen: Any, one: A | float, other: A | float) -> A:  # noqa: ANN401  a mask
        """Return the entries of one array where they are chosen, else those of the other."""

    def kept(self, array: A, ratio: float) -> Any:  # noqa: ANN401  a mask
        """Return which entries are no smaller in size than that quantile of all sizes."""


@dataclass(frozen=True, kw_only=True)
class Noising:
    """The rule of weight noise; fields as in ``defenses/weight_noise.py``."""

    scale: float = 0.01
    form: str = "published"
    distribution: str = "normal"
    clip: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range or has no such name.
        """
        for setting, legal in _NOISE.items():
            if (value := getattr(self, setting)) not in legal:
                raise ValueError(unknown_name(setting, value, legal))
        if not 0 <= self.scale < inf or not 0 < self.clip < inf:
            raise ValueError(
                "weight-noise needs a finite scale >= 0 and a finite clip > 0, got "
                f"{self.scale} and {self.clip}"
            )
        if self.form == "corrected" and self.distribution != "normal":
            raise ValueError("weight-noise: the corrected form is normal; drop distribution")

    @property
    def claiming(self) -> bool:
        """Whether it is differentially private: in the corrected form, and with noise."""
        return self.form == "corrected" and self.scale > 0

    def sent(
        self,
        before: Mapping[str, A],
        after: Mapping[str, A],
        *,
        draw: Callable[[A], A],
        numbers: Numbers[A],
    ) -> dict[str, A]:
        """Return the weights with noise; counters pass, and no running variance is below 0.

        Args:
            before: The weights the node received.
            after: The weights it would send.
            draw: Returns fresh noise of ``scale`` in the shape and type of an array.
            numbers: Of the arrays' library.

        Returns:
            The weights to send, in their order.
        """
        if self.form == "corrected":
            clipped = self.clipped(before, after, numbers=numbers)
            noised = {name: value + self.clip * draw(value) for name, value in clipped.items()}
        else:
            noised = {
                name: self._published(before[name], value, draw=draw, numbers=numbers)
                for name, value in after.items()
                if numbers.is_fraction(value)
            }
        sent = {name: noised.get(name, value) for name, value in after.items()}
        if self.form == "published" and not self.scale:
            return sent
        # Done to what is noised already, this costs no privacy; below 0, all outputs are NaN.
        return {
            name: numbers.not_negative(value) if name.rpartition(".")[2] == _VARIANCE else value
            for name, value in sent.items()
        }

    def clipped(
        self, before: Mapping[str, A], after: Mapping[str, A], *, numbers: Numbers[A]
    ) -> dict[str, A]:
        """Return the weights of the clipped update, counters left out.

        Args:
            before: The weights the node received.
            after: The weights it would send.
            numbers: Of the arrays' library.

        Returns:
            By name.

        Raises:
            UnfitUpdateError: If a number of it is not finite: it has no norm, so nothing bounds
                what the others would tell.
        """
        moves = {
            name: value - before[name]
            for name, value in after.items()
            if numbers.is_fraction(value)
        }
        if wrong := [name for name, move in moves.items() if not numbers.finite(move)]:
            shown = ", ".join(map(repr, wrong[:_FEW])) + (", ..." if wrong[_FEW:] else "")
            raise UnfitUpdateError(
                f"the update of {shown} is not finite, so it cannot be clipped to a norm of "
                f"{self.clip}, and nothing is sent; find what makes training diverge (a lower "
                "learning rate may help), or whether the weights that came were finite"
            )
        shrink = numbers.shrink([*moves.values()], self.clip)
        return {name: before[name] + move * shrink for name, move in moves.items()}

    def _published(self, before: A, after: A, *, draw: Callable[[A], A], numbers: Numbers[A]) -> A:
        """Return weights with the noise of both snapshots that an attacker holds."""
        below, above = (numbers.factor(each) * draw(each) for each in (before, after))
        noised: A = after + above - below
        return noised


@dataclass(frozen=True, kw_only=True)
class Sparsifying:
    """The rule of weight sparsification; fields as in ``defenses/weight_sparsification.py``."""

    ratio: float = 0.5
    form: str = "published"

    claiming: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If the ratio is not in [0, 1), or there is no such form.
        """
        if self.form not in _NOISE["form"]:
            raise ValueError(unknown_name("form", self.form, _NOISE["form"]))
        if not 0 <= self.ratio < 1:
            raise ValueError(f"weight-sparsification needs 0 <= ratio < 1, got {self.ratio}")

    def sent(
        self, before: Mapping[str, A], after: Mapping[str, A], *, numbers: Numbers[A]
    ) -> dict[str, A]:
        """Return the sparsified weights; counters pass unchanged.

        Args:
            before: The weights the node received.
            after: The weights it would send.
            numbers: Of the arrays' library.

        Returns:
            The weights to send, in their order.
        """
        return {
            name: self.sparsified(before[name], value, numbers=numbers)
            if numbers.is_fraction(value)
            else value
            for name, value in after.items()
        }

    def sparsified(self, before: A, after: A, *, numbers: Numbers[A]) -> A:
        """Return one array of them.

        Args:
            before: As the node received it.
            after: As it would send it.
            numbers: Of the arrays' library.

        Returns:
            Chosen, not summed: an entry no snapshot drops is sent as it is, to the last bit.
        """
        if self.form == "corrected":
            return numbers.where(numbers.kept(after - before, self.ratio), after, before)
        sparse_after = numbers.where(numbers.kept(after, self.ratio), after, 0.0)
        rest_before = numbers.where(numbers.kept(before, self.ratio), 0.0, before)
        sent: A = rest_before + sparse_after  # = before + (sparse after - sparse before)
        return sent


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The rule of local DP; fields as in ``defenses/local_dp.py``."""

    epsilon: float = 1.0
    delta: float = 1e-5
    clip: float = 1.0
    sensitivity: float | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: If one is out of its range.
        """
        check_budget("local-dp", epsilon=self.epsilon, delta=self.delta, clip=self.clip)
        if self.sensitivity is not None and not 0 <= self.sensitivity < inf:
            raise ValueError(f"local-dp needs a finite sensitivity >= 0, got {self.sensitivity}")

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on each weight, in the weights' own unit."""
        sensitivity = self.clip if self.sensitivity is None else self.sensitivity
        return sensitivity * sqrt(2 * log(1.25 / self.delta)) / self.epsilon

    @property
    def noising(self) -> Noising:
        """The noise that it comes to."""
        return Noising(form="corrected", scale=self.deviation / self.clip, clip=self.clip)


def check_budget(name: str, *, epsilon: float, delta: float, clip: float) -> None:
    """Refuse a budget or a norm that bounds nothing.

    Args:
        name: The defence's own, for errors.
        epsilon: Of the claim.
        delta: Of the claim.
        clip: The norm to which it clips.

    Raises:
        ValueError: If one is out of its range.
    """
    if not 0 < epsilon < inf or not 0 < delta < 1:
        raise ValueError(
            f"{name} needs a finite epsilon > 0 and 0 < delta < 1, got {epsilon} and {delta}"
        )
    if not 0 < clip < inf:
        raise ValueError(f"{name} needs a finite clip > 0, got {clip}")


class NumpyNumbers:
    """Arrays of numpy."""

    def is_fraction(self, array: Array) -> bool:
        """Say whether an array holds fractions."""
        return array.dtype.kind == "f"

    def finite(self, array: Array) -> bool:
        """Say whether every number is finite."""
        return bool(np.isfinite(array).all())

    def shrink(self, moves: list[Array], clip: float) -> float:
        """Return by what all are multiplied so that their common L2 norm is at most ``clip``."""
        squares = sum(float(np.square(move, dtype=np.float64).sum()) for move in moves)
        return min(1.0, clip / max(sqrt(squares), 1e-12))

    def factor(self, weight: Array) -> float:
        """Return the published factor of a tensor."""
        squares = np.square(weight, dtype=np.float64)
        # Over input channels only, for convolutions too, as in the published code.
        rows = squares.sum(axis=1) if weight.ndim > 1 else squares.sum()
        return max(sqrt(float(rows.max(initial=0.0))) / ROW_NORM, 1.0)

    def not_negative(self, array: Array) -> Array:
        """Return an array with 0 in place of what is below."""
        return np.maximum(array, 0)

    def where(self, chosen: Array, one: Array | float, other: Array | float) -> Array:
        """Return the entries of one array where they are chosen, else those of the other."""
        return np.where(chosen, one, other)

    def kept(self, array: Array, ratio: float) -> Array:
        """Return which entries are no smaller in size than that quantile of all sizes."""
        sizes = np.abs(array.astype(np.float64))
        if not sizes.size:
            return np.ones(array.shape, dtype=bool)
        kept: Array = sizes >= np.quantile(sizes, ratio)
        return kept


NUMPY = NumpyNumbers()


@dataclass(frozen=True, kw_only=True)
class InNumpy(Defense):
    """A rule as a defence of updates whose arrays are numpy's; no catalogue has it.

    Attributes:
        rule: What is sent.
    """

    name: ClassVar[str] = "a defence of updates"
    source: ClassVar[str] = "leakbed.update_defenses"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.UPDATE})

    rule: Noising | Sparsifying

    @property
    def claiming(self) -> bool:
        """Whether what is sent is differentially private."""
        return self.rule.claiming

    def protect_update(  # type: ignore[override]  # arrays, where the catalogue's have tensors
        self, state: DefenseState, before: Mapping[str, Array], after: Mapping[str, Array]
    ) -> tuple[DefenseState, Mapping[str, Array]]:
        """Return what is sent in place of the weights, in their types.

        Args:
            state: Fixes the noise of this message.
            before: The weights the node received.
            after: The weights it would send.

        Returns:
            The same state, and the weights to send.
        """
        if isinstance(self.rule, Sparsifying):
            sent = self.rule.sent(before, after, numbers=NUMPY)
        else:
            chance = np.random.default_rng(derive(state.stream, f"message/{state.messages}"))
            sent = self.rule.sent(
                before, after, draw=lambda like: self._draw(like, chance), numbers=NUMPY
            )
        return state, {name: np.asarray(sent[name], after[name].dtype) for name in after}

    def _draw(self, like: Array, chance: np.random.Generator) -> Array:
        """Return noise of the rule's scale in an array's shape and type."""
        rule = self.rule
        if not isinstance(rule, Noising):
            return np.zeros_like(like)
        unit = chance.standard_normal if rule.distribution == "normal" else chance.laplace
        noise = unit(size=like.shape)
        return np.asarray(rule.scale * noise, like.dtype)
