"""The defences of the cut gradients that one party sends, and how far their privacy claims reach.

They are applied in order, each with its own state.

**The horizon of a privacy claim.** A claim such as that of ``dp-sgd`` holds for so many steps of a
node, that of ``dp-cut-gradient`` for so many gradients of a row. Before a run the plan is checked
(``Defense.check_run``); but what a protocol does is up to it, so the code that takes a private step
or protects a gradient counts as well, and stops at the horizon. Importing this module needs neither
torch nor Flower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from leakbed.contract_checks import blamed, refuse_unsent
from leakbed.contracts import Defense, DefenseState, IllegalCombinationError
from leakbed.contracts.defense import Run

if TYPE_CHECKING:
    from collections.abc import Iterable


class HorizonError(IllegalCombinationError):
    """A protocol went on to where a claim of privacy no longer holds."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which batch of whose rows something was made of.

    Attributes:
        node: Whose rows they are, by partition; where parties hold strips of the same rows, the
            first of them.
        round: Server round, from 1.
        step: The batch's step.
        rows: The samples' ids at the node; None where they are not known.
    """

    node: int
    round: int
    step: int
    rows: tuple[int, ...] | None = None


class Horizon:
    """How often a defence's claim was used by now, and how often it may be.

    Attributes:
        used: Times by what was used: a node, one of its rows, or one of its batches where its rows
            are not known.
    """

    def __init__(self, defense: Defense, *, protocol: str, unit: str, passes: int = 1) -> None:
        """Begin with nothing used.

        Args:
            defense: Whose claim it is; one without a horizon is never exceeded.
            protocol: Who spends it, for the error.
            unit: What is counted, ``"step"`` or ``"gradient"``.
            passes: In how many batches a row is, at most; where a batch's rows are not known, each
                use of it is taken for so many uses of a row.
        """
        self.used: Counter[tuple[Any, ...]] = Counter()
        self._defense, self._protocol, self._unit, self._passes = defense, protocol, unit, passes

    def step(self, origins: Sequence[Origin | None]) -> None:
        """Count a private step; one too many for a node is a :class:`HorizonError`.

        Args:
            origins: The batches it is taken on. Those of unknown origin count as one node's.
        """
        nodes = {None if origin is None else origin.node for origin in origins}
        self._use(((node,), f"rows of node {node}") for node in nodes)

    def send(self, origin: Origin | None) -> None:
        """Count the gradients of a batch's rows; one too many of a row is a :class:`HorizonError`.

        Args:
            origin: The batch. Those of unknown origin count as the same rows.
        """
        if origin is None or origin.rows is None:
            at = origin and (origin.node, origin.round, origin.step)
            whose = "rows of nobody known" if origin is None else f"a batch of node {origin.node}"
            self._use([(("batch", at), whose)], weight=self._passes)
            return
        node = origin.node
        self._use(((node, row), f"row {row} of node {node}") for row in origin.rows)

    def _use(self, keys: Iterable[tuple[tuple[Any, ...], str]], *, weight: int = 1) -> None:
        limit = self._defense.covers
        if limit is None:
            return
        for key, whose in keys:
            self.used[key] += weight
            if self.used[key] > limit:
                raise HorizonError(
                    f"{self._protocol} took {self._unit} {self.used[key]} of {limit} with {whose}: "
                    f"{self._defense.name} claims its privacy for {limit}; set its settings to "
                    "what the protocol takes, which adds noise, or train less"
                )


_APART = "leave one of them out"


class GradientDefenses:
    """What stands between a label holder's cut gradients and the wire.

    Attributes:
        states: Of each defence, after the last message; may be replaced by stored ones.
        horizons: What of each one's claim was used by now; its ``used`` may be replaced likewise.
    """

    def __init__(
        self,
        defenses: Sequence[Defense],
        *,
        stream: int,
        protocol: str = "the protocol",
        passes: int = 1,
    ) -> None:
        """Begin, unless :func:`refuse_order` refuses.

        Args:
            defenses: In the order they are applied in.
            stream: The secret seed of their noise.
            protocol: Who sends the gradients, for errors.
            passes: In how many batches one row is, at most.
        """
        refuse_order(defenses)
        self._defenses = tuple(defenses)
        self.states: list[DefenseState] = [
            defense.begin(stream + index) for index, defense in enumerate(self._defenses)
        ]
        self.horizons = [
            Horizon(defense, protocol=protocol, unit="gradient", passes=passes)
            for defense in self._defenses
        ]

    def protect(
        self,
        gradient: Float[Tensor, " batch *cut"],
        labels: Int[Tensor, " batch"] | None,
        origin: Origin | None = None,
    ) -> Float[Tensor, " batch *cut"]:
        """Return a cut gradient as it may be sent; a defence that cannot work raises its own error.

        A claim that does not cover it is a
        :class:`~leakbed.contracts.gradient_defenses.HorizonError`.

        Args:
            gradient: On the CPU; never changed.
            labels: Of its rows; None where this party has none.
            origin: Which batch it is of; None where that is not known.

        Returns:
            What every defence in turn made of it.
        """
        for horizon in self.horizons:
            horizon.send(origin)
        states = []
        for defense, state in zip(self._defenses, self.states, strict=True):
            with blamed(defense, "defence"):
                if labels is None:
                    after, sent = defense.protect_cut_gradient(state, gradient)
                else:
                    after, sent = defense.protect_labelled_gradient(state, gradient, labels)
                refuse_unsent(defense, {"gradient": sent}, {"gradient": gradient})
            gradient = sent
            states.append(after.next())
        self.states = states
        return gradient


def refuse_order(defenses: Sequence[Defense]) -> None:
    """Refuse an order in which a claim of privacy does not hold.

    Nothing may look at labels again after a claim was made. Nothing that mixes the rows of a
    message may stand before one: a sample then moves other rows too, and by more than the claim's
    clipping norm allows for.

    Args:
        defenses: Of one kind of message of one party, in the order they are applied in.

    Raises:
        IllegalCombinationError: If the order is such; it names a legal one.
    """
    for place, defense in enumerate(defenses):
        claimed = [each for each in defenses[:place] if each.claiming]
        if claimed and _looks(defense):
            legal = f"put {defense.name} first" if defense.row_wise else _APART
            raise IllegalCombinationError(
                f"{defense.name} looks at labels after {claimed[-1].name} has made the gradient "
                f"private, which voids its claim; {legal}"
            )
        mixing = [each for each in defenses[:place] if not each.row_wise]
        if defense.claiming and mixing:
            legal = _APART if _looks(mixing[0]) else f"put {defense.name} first"
            raise IllegalCombinationError(
                f"{mixing[0].name} mixes the rows of a message, so that one sample moves other "
                f"rows too and {defense.name} behind it is worth less than it claims; {legal}"
            )


def _looks(defense: Defense) -> bool:
    """Return whether a defence depends on labels."""
    return type(defense).protect_labelled_gradient is not Defense.protect_labelled_gradient


_ROWS_APART = "'dp-cut-gradient', 'gradient-compression' with per = 'sample', or 'label-dp'"


def refuse_single_rows(name: str, run: Run, *, last: bool = True) -> None:
    """Refuse a run with batches of one row, where noise is made to the measure of the batch.

    The measure of a single row is the row itself, so that its norm goes on telling its label.

    Args:
        name: The defence's own, for errors.
        run: Of one node's rows.
        last: Whether a pass that ends in one row is refused too.

    Raises:
        IllegalCombinationError: If it has.
    """
    if run.batch_size != 1 and (run.smallest_batch != 1 or not last):
        return
    which = "every batch" if run.batch_size == 1 else "the last batch of a pass"
    raise IllegalCombinationError(
        f"{name} makes its noise to the measure of a batch, which protects nothing where the batch "
        f"is one row: with batch_size {run.batch_size} of {run.rows} rows {which} has one row; set "
        "protocol.batch_size to 2 or more that leaves no single row over, or protocol.local_steps, "
        f"whose batches are full; or use {_ROWS_APART}"
    )


def refuse_single_row(name: str, rows: int) -> None:
    """Refuse a message of one row, where noise is made to the measure of the batch.

    Args:
        name: The defence's own, for errors.
        rows: Of the message.

    Raises:
        IllegalCombinationError: If it is one.
    """
    if rows == 1:
        raise IllegalCombinationError(
            f"{name} got a cut gradient of one row, and makes its noise to the measure of a batch: "
            f"the row's norm would still tell its label; send 2 rows or more, or use {_ROWS_APART}"
        )
