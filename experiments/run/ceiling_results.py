"""What the ceiling of a recorded run comes to: by message, over messages, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from leakbed.oracle.noise_checks import Finding


def pooled_error(ceilings: Sequence[tuple[float, float]]) -> float:
    """Return the standard error of a mean of ceilings.

    Args:
        ceilings: Each with the standard error of its draws.

    Returns:
        That of the spread over them, or that of the draws, whichever is larger.
    """
    count = len(ceilings)
    within = sqrt(sum(error**2 for _, error in ceilings)) / count
    spread = stdev(value for value, _ in ceilings) / sqrt(count) if count > 1 else 0.0
    return max(within, spread)


@dataclass(frozen=True, kw_only=True)
class Message:
    """The ceiling of one attacked message.

    Attributes:
        node: Partition id.
        round: Server round.
        step: Of the smashed batch; 0 for an update.
        row: Within the batch; of an update, the place among its rows.
        phase: Training or evaluation.
        guesses: Length of the list: how many rows are behind the message.
        candidates: Among how many.
        ceiling: Of a list of that length.
        error: Standard error of the draws.
        single: The ceiling of one name.
        named: How often the truth itself is named, by a list of that length.
        believed: Posterior of the truth, given the recorded message.
        hit: 1 where the recorded message's likeliest candidate is the truth, 1 of k where it is
            one of k that are equally likely, else 0.
        chance: Of a list drawn at random.
        norm: Of a smashed row: the mean L2 norm of candidates' rows without noise, clipped where
            the defence clips; what the noise must be compared with. None of an update.
        cap: What the defence's claim allows a list; None without a claim of this message.
        label: How often the best guess of the row's label is right, by who has no inputs but a pool
            of labelled candidates; None where labels travel in the clear, and of updates.
        floor: Of a smashed row that a linear bottom made, with noise and no clip: the least mean
            squared error per pixel of a linear reconstruction; None of others.
        alone: Of several messages read together: the ceiling of the first alone.
        read: How many messages are read together.
        without_bottoms: Where relayed bottoms are read: the ceiling of smashed data without them.
        used_before: Whether the row was in an earlier batch, so that weights already knew it: the
            ceiling is then given those weights.
    """

    node: int
    round: int
    step: int
    row: int
    phase: str
    guesses: int
    candidates: int
    ceiling: float
    error: float
    single: float
    named: float
    believed: float
    hit: float
    chance: float
    norm: float | None
    cap: float | None
    label: float | None
    used_before: bool
    floor: float | None = None
    alone: float | None = None
    read: int = 1
    without_bottoms: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunCeiling:
    """The ceilings of a run's attacked messages.

    Attributes:
        messages: One for each.
        findings: Of the residual check; empty where there is no normal noise.
        span: What is read of a row: a message, the node's later ones of the round too, or all that
            it left on the wire in the whole training.
        seat: Who reads the messages.
        told: What the informed guesser is told beside the protocol.
        notes: What else a reader must know.
    """

    messages: Sequence[Message]
    findings: Sequence[Finding] = ()
    span: str = "message"
    seat: str = "server"
    told: str = (
        "the node's weights before the message, all other rows and labels, all seeds but those "
        "of the noise and of the data split"
    )
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def value(self) -> float:
        """The mean over messages."""
        return fmean(each.ceiling for each in self.messages)

    @property
    def error(self) -> float:
        """Its standard error: of the spread over messages, and of the draws."""
        return pooled_error([(each.ceiling, each.error) for each in self.messages])

    @property
    def norm(self) -> float | None:
        """Of smashed rows: their mean norm without noise; None of updates."""
        known = [each.norm for each in self.messages if each.norm is not None]
        return fmean(known) if known else None

    def table(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "ceiling": self.value,
            "error": self.error,
            "span": self.span,
            "seat": self.seat,
            "told": self.told,
            "messages": [asdict(each) for each in self.messages],
            "checks": [{**asdict(each), "sound": each.sound} for each in self.findings],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Return it as text: the mean, the spread over people, the checks."""
        first = self.messages[0]
        named = sorted(each.named for each in self.messages)
        lines = [
            f"Ceiling {self.value:.3f} (s.e. {self.error:.3f}) over {len(self.messages)} messages: "
            f"a list of {first.guesses} among {first.candidates} candidates; chance "
            f"{first.chance:.3f}.",
            f"Seat: {self.seat}. Round {first.round}. Told: {self.told}.",
            f"Used before: the rows of {sum(each.used_before for each in self.messages)} messages; "
            "their ceilings are given weights that the row already moved.",
            f"Per record: named with chance {named[0]:.2f} to {named[-1]:.2f}, median "
            f"{named[len(named) // 2]:.2f}.",
        ]
        if alone := [each.alone for each in self.messages if each.alone is not None]:
            lines.append(
                f"Read together: {min(each.read for each in self.messages)} to "
                f"{max(each.read for each in self.messages)} messages of each row, over the "
                f"{self.span}. Its first message alone: {fmean(alone):.3f}."
            )
        without = [m.without_bottoms for m in self.messages if m.without_bottoms is not None]
        if without:
            lines.append(
                "Bottoms that nodes hand over in the clear are among them. Of a server that reads "
                f"no bottom the ceiling is {fmean(without):.3f}."
            )
        if self.norm is not None:
            lines.append(f"Rows without noise have a mean norm of {self.norm:.3g}.")
        labels = [each.label for each in self.messages if each.label is not None]
        if labels:
            lines.append(
                f"The row's label is told by its message to who has no inputs, with a pool of "
                f"labelled candidates, at most {fmean(labels):.3f} of the time."
            )
        floors = [each.floor for each in self.messages if each.floor is not None]
        if floors:
            lines.append(
                "The bottom is linear: no linear reconstruction of a row has a mean squared error "
                f"under {fmean(floors):.4f} per pixel, and none at all would if pixels were normal."
            )
        if first.cap is not None:
            lines.append(f"The defence's claim caps it at {first.cap:.3f}.")
        return lines + [f"Check of {each}." for each in self.findings] + list(self.notes)
