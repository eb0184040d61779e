"""What a defence is: hooks on messages and hooks on the node's own training, with explicit state.

A message hook sees one tensor of one message and works in any app, carried by
:func:`leakbed.mods.defend`. A training hook is called by the client step of ``clients/`` and works
in apps built on it alone. Importing this module needs neither torch nor Flower.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from leakbed.defence_state import DefenseState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from leakbed.models import Architecture


class IllegalCombinationError(ValueError):
    """A defence cannot protect what it was asked to; the message says what to use instead."""


class Protects(StrEnum):
    """The message a defence changes, or what somebody trains with."""

    UPDATE = "update"
    SMASHED = "smashed"
    CUT_GRADIENT = "cut-gradient"
    TRAINING = "training"
    LABELS = "labels"
    TOP = "top"


@dataclass(frozen=True, kw_only=True, eq=False)
class Holdings:
    """What a node holds before training, for a detector that tries honest training by itself.

    Attributes:
        images: Its private rows.
        labels: Their labels, as the node trains with them.
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
        labels: The batch's, as the node trains with them.
        first_gradient: What the cut gradient makes of the bottom's first weights, without penalty.
    """

    cut_gradient: Float[Tensor, " batch *cut"]
    labels: Int[Tensor, " batch"]
    first_gradient: Float[Tensor, " *weights"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a defence may know of a run before it starts, for one node's rows.

    Attributes:
        classes: Labels are 0 to ``classes - 1``.
        rows: The node's private samples.
        batch_size: Of its steps.
        steps: How many it takes, in all rounds together.
        passes: How often at most one of its rows is in a batch.
        top: The server's part of the network, with weights of no meaning.
    """

    classes: int
    rows: int
    batch_size: int
    steps: int
    passes: int
    top: nn.Module


class Defense:
    """Base of all defences: hooks that change nothing until overridden.

    A defence is a frozen dataclass of settings. State is passed in and returned; a hook must not
    change the tensors it is given. Training hooks belong to ``Protects.TRAINING``.

    Attributes:
        labels: The values of ``protocol.labels`` under which it works.
        claims: The differential privacy it claims: of what, with which norm, over which horizon;
            empty for none.
        suspicious: Of a detector: which of its scores are suspicious, ``"low"`` or ``"high"`` ones.
        stop: Whether a node whose detector raised an alarm refuses to train on.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    protects: ClassVar[frozenset[Protects]]
    labels: ClassVar[frozenset[str]] = frozenset({"shared", "server", "client"})
    claims: ClassVar[str] = ""
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

    def protect_labelled_gradient(
        self,
        state: DefenseState,
        gradient: Float[Tensor, " batch *cut"],
        labels: Int[Tensor, " batch"],
    ) -> tuple[DefenseState, Float[Tensor, " batch *cut"]]:
        """Change that gradient knowing the rows' labels; what a sender that has them calls.

        Args:
            state: From ``begin`` or the previous message.
            gradient: The gradient it would send.
            labels: Of its rows; one that needs them refuses :meth:`protect_cut_gradient`.

        Returns:
            The next state and the gradient to send.
        """
        del labels
        return self.protect_cut_gradient(state, gradient)

    def protect_weight_gradients(
        self, state: DefenseState, gradients: Mapping[str, Float[Tensor, " batch *weight"]]
    ) -> tuple[DefenseState, Mapping[str, Float[Tensor, " *weight"]]]:
        """Make of each sample's gradient what the top's optimiser steps with.

        Args:
            state: From ``begin`` or the previous step.
            gradients: By parameter name, of each sample's own loss.

        Returns:
            The next state, and one gradient for each parameter.
        """
        return state, {name: each.mean(0) for name, each in gradients.items()}

    def noised_labels(
        self, stream: int, labels: Int[Tensor, " rows"], *, classes: int
    ) -> Int[Tensor, " rows"]:
        """Change training labels, once for all rows, wherever they are held.

        Args:
            stream: Of these rows; the same one gives the same labels, whoever asks and how often.
            labels: The true ones.
            classes: Labels are 0 to ``classes - 1``.

        Returns:
            The labels to train with.
        """
        del stream, classes
        return labels

    def check_run(self, run: Run) -> None:
        """Refuse a run it cannot protect, or one that exceeds what it claims; before training.

        Args:
            run: For one node's rows.
        """

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
