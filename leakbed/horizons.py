"""The horizon of a claim of privacy, kept by who spends it: private steps, or rows that are sent.

A claim such as that of ``dp-sgd`` holds for so many steps of a node, that of ``dp-cut-gradient``
for so many gradients of a row. Before a run the plan is checked (``Defense.check_run``); but what a
protocol does is up to it, so the code that takes a private step or protects a gradient counts as
well, and stops at the horizon. Importing this module needs neither torch nor Flower.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leakbed.contracts import IllegalCombinationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from leakbed.contracts import Defense


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

    def __init__(self, defence: Defense, *, protocol: str, unit: str, passes: int = 1) -> None:
        """Begin with nothing used.

        Args:
            defence: Whose claim it is; one without a horizon is never exceeded.
            protocol: Who spends it, for the error.
            unit: What is counted, ``"step"`` or ``"gradient"``.
            passes: In how many batches a row is, at most; where a batch's rows are not known, each
                use of it is taken for so many uses of a row.
        """
        self.used: Counter[tuple[Any, ...]] = Counter()
        self._defence, self._protocol, self._unit, self._passes = defence, protocol, unit, passes

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
        limit = self._defence.covers
        if limit is None:
            return
        for key, whose in keys:
            self.used[key] += weight
            if self.used[key] > limit:
                raise HorizonError(
                    f"{self._protocol} took {self._unit} {self.used[key]} of {limit} with {whose}: "
                    f"{self._defence.name} claims its privacy for {limit}; set its settings to "
                    "what the protocol takes, which adds noise, or train less"
                )
