"""What a defence is: hooks on messages and hooks on the node's own training, with explicit state.

A message hook sees one tensor of one message and works in any app, carried by
:func:`leakbed.mods.defend`. A training hook is called by the client step of ``clients/`` and works
in apps built on it alone. Importing this module needs neither torch nor Flower.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import isnan, nan
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor

    from leakbed.models import Architecture

NO_ALARM = -1


class IllegalCombinationError(ValueError):
    """A defence cannot protect what it was asked to; the message says what to use instead."""


class Protects(StrEnum):
    """The message a defence changes, or the node's own training step."""

    UPDATE = "update"
    SMASHED = "smashed"
    CUT_GRADIENT = "cut-gradient"
    TRAINING = "training"


@dataclass(frozen=True, kw_only=True, eq=False)
class DefenseState:
    """What a defence carries from one message to the next.

    Attributes:
        stream: The defence's own random stream.
        messages: How many messages it has protected, or gradients inspected; with the stream,
            fixes the next noise.
        tensors: Anything else, by name.
        alarm: After how many gradients a detector raised its alarm; -1 where it did not.
        score: Its most suspicious score so far, on its own scale; NaN before the first.
        last: Its latest score; NaN before the first.
        probing: Whether the batch that waits for its gradient has labels made up to probe the
            server, so that the node must not learn from it.
    """

    stream: int
    messages: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    alarm: int = NO_ALARM
    score: float = nan
    last: float = nan
    probing: bool = False

    def next(self) -> DefenseState:
        """Return the state after one more message."""
        return replace(self, messages=self.messages + 1)

    def judged(
        self, score: float, *, suspicious: bool, worse: Callable[[float, float], float]
    ) -> DefenseState:
        """Return the state after a detector's verdict on one gradient.

        Args:
            score: Of what was seen so far.
            suspicious: Whether it calls for an alarm; only the first raises one.
            worse: ``min`` or ``max``, whichever of two scores is the more suspicious one.

        Returns:
            The state, still to be counted on by :meth:`next`.
        """
        raised = suspicious and self.alarm == NO_ALARM
        return replace(
            self,
            alarm=self.messages + 1 if raised else self.alarm,
            score=score if isnan(self.score) else worse(score, self.score),
            last=score,
        )

    def generator(self) -> torch.Generator:
        """Return the generator of the current message's noise (on the CPU).

        torch keeps 32 bits of a seed: enough to measure what noise does, not to hide it from an
        adversary who can try them all. A deployment needs a cryptographic source.
        """
        from leakbed.seeds import derive, generator  # noqa: PLC0415  keeps this module torch-free

        return generator(derive(self.stream, f"message/{self.messages}"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Holdings:
    """What a node holds before training, for a detector that tries honest training by itself.

    Attributes:
        images: Its private rows.
        labels: Their labels.
        architecture: The whole network without weights, which such a detector must know.
        batch_size: Rows per step.
        optimiser: Makes the node's optimiser over given parameters.
    """

    images: Float[Tensor, " rows *image"]
    labels: Int[Tensor, " rows"]
    architecture: Architecture
    batch_size: int
    optimiser: Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingStep:
    """One step of a node's training, as its own detector sees it.

    Attributes:
        cut_gradient: As received, one row per sample.
        labels: The batch's true labels.
        first_gradient: What the cut gradient makes of the bottom's first weights, without penalty.
    """

    cut_gradient: Float[Tensor, " batch *cut"]
    labels: Int[Tensor, " batch"]
    first_gradient: Float[Tensor, " *weights"]


class Defense:
    """Base of all defences: hooks that change nothing until overridden.

    A defence is a frozen dataclass of settings. State is passed in and returned; a hook must not
    change the tensors it is given. Training hooks belong to ``Protects.TRAINING``.

    Attributes:
        labels: The values of ``protocol.labels`` under which it works.
        suspicious: Of a detector: which of its scores are suspicious, ``"low"`` or ``"high"`` ones.
        stop: Whether a node whose detector raised an alarm refuses to train on.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    protects: ClassVar[frozenset[Protects]]
    labels: ClassVar[frozenset[str]] = frozenset({"shared", "server", "client"})
    suspicious: ClassVar[str] = "high"
    stop: bool = False

    def begin(self, stream: int) -> DefenseState:
        """Return the state before the first message.

        Args:
            stream: Seed of the defence's own random stream.

        Returns:
            The state.
        """
        return DefenseState(stream=stream)

    def protect_update(
        self,
        state: DefenseState,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> tuple[DefenseState, Mapping[str, Tensor]]:
        """Change the weights a node sends back after local training.

        Args:
            state: From ``begin`` or the previous message.
            before: The weights the node received, by name.
            after: The weights it would send, by name.

        Returns:
            The next state and the weights to send.
        """
        del before
        return state, after

    def protect_smashed(
        self, state: DefenseState, smashed: Float[Tensor, " batch *cut"]
    ) -> tuple[DefenseState, Float[Tensor, " batch *cut"]]:
        """Change the activations a node sends at the cut.

        Args:
            state: From ``begin`` or the previous message.
            smashed: The activations it would send.

        Returns:
            The next state and the activations to send.
        """
        return state, smashed

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Float[Tensor, " batch *cut"]
    ) -> tuple[DefenseState, Float[Tensor, " batch *cut"]]:
        """Change the gradient the label holder sends back at the cut.

        Args:
            state: From ``begin`` or the previous message.
            gradient: The gradient it would send.

        Returns:
            The next state and the gradient to send.
        """
        return state, gradient

    def check(self, *, rows: int, batch_size: int) -> None:
        """Refuse a node that has too little to work with; called before training.

        Args:
            rows: The node's private samples.
            batch_size: Of its steps.
        """

    def prepare(self, state: DefenseState, holdings: Holdings) -> DefenseState:
        """Learn from what a node holds, once, before its first step.

        Args:
            state: From ``begin``.
            holdings: The node's.

        Returns:
            The next state.
        """
        del holdings
        return state

    def penalty(
        self,
        state: DefenseState,
        images: Float[Tensor, " batch *image"],
        smashed: Float[Tensor, " batch *cut"],
    ) -> tuple[DefenseState, Float[Tensor, ""] | None]:
        """Return what the bottom minimises beside the task's loss.

        Args:
            state: From ``begin`` or the previous step.
            images: The batch.
            smashed: What the bottom makes of it, with its graph and before any noise.

        Returns:
            The next state and the penalty; None where there is none.
        """
        del images, smashed
        return state, None

    def protect_labels(
        self, state: DefenseState, labels: Int[Tensor, " batch"], *, classes: int
    ) -> tuple[DefenseState, Int[Tensor, " batch"]]:
        """Change the labels a node sends with a smashed batch.

        Args:
            state: From ``begin`` or the previous step; ``probing`` is off.
            labels: The true ones.
            classes: Labels are 0 to ``classes - 1``.

        Returns:
            The next state, ``probing`` where the node must not learn from this batch, and labels.
        """
        del classes
        return state, labels

    def inspect(self, state: DefenseState, step: TrainingStep) -> DefenseState:
        """Look at a gradient before the bottom learns from it; an alarm is a value in the state.

        Args:
            state: From the batch's ``protect_labels``, or the previous step.
            step: What came back for the batch.

        Returns:
            The next state.
        """
        del step
        return state
