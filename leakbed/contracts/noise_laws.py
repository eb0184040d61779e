"""The law of a defence's noise: how what is sent is distributed, given what was computed.

A defence says it in its own file, by :meth:`leakbed.contracts.defense.Defense.law`, beside the
hook that draws the noise. The oracle computes with it: the informed ceiling of a message, and the
check that recorded noise is what the law says. A law is of one message; the first axis of a
smashed batch or of a cut gradient is its rows. Weights have no rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leakbed.contracts.defense import Defense, Protects

Arrays = Mapping[str, Tensor]
"""By name; a smashed batch and a cut gradient are one array under the name of their kind."""


class NoCeilingError(ValueError):
    """There is no ceiling for a message; says what is missing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clean:
    """A message as a defence is given it.

    Attributes:
        kind: What is protected: an update, smashed data, a cut gradient or labels.
        arrays: What would be sent: weights by name, or the one array under the kind's name.
        before: Of an update: the weights the node received.
        labels: Of the rows, for a defence that is told of them.
        classes: Labels are 0 to ``classes - 1``; 0 where that is not known.
    """

    kind: Protects
    arrays: Arrays
    before: Arrays = field(default_factory=dict)
    labels: Int[Tensor, " rows"] | None = None
    classes: int = 0

    @property
    def array(self) -> Tensor:
        """The one array of a message that has one."""
        return self.arrays[self.kind]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fixed:
    """No noise: what is sent is a function of what was computed.

    Attributes:
        mean: What is sent.
    """

    mean: Arrays


@dataclass(frozen=True, kw_only=True, eq=False)
class Normal:
    """Independent normal noise on every entry.

    Attributes:
        mean: What is sent without noise; clipped, where the defence clips.
        deviation: By array: its standard deviation, one number for the array or one for each row.
        radius: L2 distance of the mean from a reference that says nothing of the data, at most: the
            clipping norm. None where nothing bounds it. With one deviation sigma for all entries
            the message is ``radius / sigma``-Gaussian DP for one sample, or one update.
    """

    mean: Arrays
    deviation: Arrays
    radius: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Laplace:
    """On every entry the difference of two independent Laplace variables.

    Attributes:
        mean: What is sent without noise.
        scales: By array: the scales of the two, above 0.
    """

    mean: Arrays
    scales: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Axial:
    """Normal noise of one size along an axis of each row and another across it.

    Attributes:
        mean: What is sent without noise, one array.
        axis: Of each row, a unit vector over its entries.
        along: Standard deviation along it.
        across: Standard deviation of every direction across it; 0 for a density on a line.
    """

    mean: Arrays
    axis: Float[Tensor, " rows entries"]
    along: Float[Tensor, " rows"]
    across: Float[Tensor, " rows"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Channel:
    """Labels answered at random.

    Attributes:
        answers: Probability of each answer (second axis), given the label (first axis).
    """

    answers: Float[Tensor, " classes answers"]


Law = Fixed | Normal | Laplace | Axial | Channel


def alike(mean: Arrays, deviation: float | Tensor, *, radius: float | None = None) -> Normal:
    """Return normal noise of one size on every floating entry of a message.

    Args:
        mean: What is sent without noise.
        deviation: Its standard deviation: one number, or one for each row.
        radius: As for :class:`Normal`.

    Returns:
        The law.
    """
    size = torch.as_tensor(deviation, dtype=torch.float64)
    return Normal(mean=mean, deviation=dict.fromkeys(mean, size), radius=radius)


def floating(arrays: Arrays) -> dict[str, Tensor]:
    """Return the arrays that hold fractions; counters are sent as they are and say nothing."""
    return {name: value for name, value in arrays.items() if value.is_floating_point()}


def sent_law(defenses: Sequence[Defense], clean: Clean) -> Law:
    """Return how what is sent is distributed, behind all of a sender's defences.

    What has no noise is a part of the message's computation; at most the last defence may have
    noise, since a function of noise has no law that is stated here.

    Args:
        defenses: In their order; those of other messages are passed over.
        clean: As it is computed.

    Returns:
        The law.

    Raises:
        NoCeilingError: If a defence does not state its law, or stands behind noise.
    """
    law: Law = Fixed(mean=clean.arrays)
    noisy = ""
    for defense in defenses:
        if clean.kind not in defense.protects:
            continue
        if noisy:
            raise NoCeilingError(
                f"no ceiling: {defense.name} changes what {noisy} has noised, and the law of that "
                "is not known; put it before, or leave one of them out"
            )
        made = defense.law(clean)
        if made is None:
            raise NoCeilingError(
                f"no ceiling: {defense.name} does not state the law of its noise for this message; "
                "give it a method law(clean)"
            )
        law = made
        if isinstance(law, Fixed):
            clean = replace(clean, arrays=law.mean)
        elif not isinstance(law, Channel):
            noisy = defense.name
    return law


def weighted_sum(parts: Sequence[tuple[float, Law]]) -> Law:
    """Return the law of a sum of messages with noise of their own, each times its weight.

    Args:
        parts: Weights and laws, of arrays with the same names and sizes; all of no noise or normal.

    Returns:
        Means added up; variances too, since a sum of normal variables is normal. Without a radius:
        what a claim says of one message does not say what the sum is worth.

    Raises:
        NoCeilingError: If the sum has no density that is stated here, as of Laplace variables.
    """
    first = parts[0][1]
    stated = [(weight, law) for weight, law in parts if isinstance(law, Fixed | Normal)]
    if len(stated) < len(parts) or isinstance(first, Channel):
        kinds = ", ".join(sorted({type(law).__name__ for _, law in parts}))
        raise NoCeilingError(
            f"no ceiling: the density of a sum of messages of laws {kinds} is not known here; only "
            "normal noise adds up to noise of a known law"
        )
    mean = {
        name: sum(
            (weight * law.mean[name].double() for weight, law in stated),
            start=torch.zeros((), dtype=torch.float64),
        ).float()
        for name in first.mean
    }
    noisy = [(weight, law) for weight, law in stated if isinstance(law, Normal)]
    if not noisy:
        return Fixed(mean=mean)
    deviation = {
        name: sum(
            ((weight * law.deviation[name].double()).square() for weight, law in noisy),
            start=torch.zeros((), dtype=torch.float64),
        ).sqrt()
        for name in mean
    }
    return Normal(mean=mean, deviation=deviation)


def of_answers(channel: Channel, prior: Float[Tensor, " classes"]) -> float:
    """Return the ceiling of a label that is answered at random: no draw is needed.

    Args:
        channel: How labels are answered.
        prior: Share of each class.

    Returns:
        The sum over answers of the likeliest label's joint probability.
    """
    joint = channel.answers.double() * prior.double().unsqueeze(1)
    return float(joint.max(0).values.sum())
