"""What a defence is: hooks on messages and hooks on the node's own training, with explicit state.

A message hook sees one tensor of one message and works in any app, carried by
:func:`leakbed.mods.defend`. A training hook is called by the client step of ``clients/`` and works
in apps built on it alone. Importing this module needs neither torch nor Flower.

A :class:`DefenseState` is what a defence carries from message to message: its random stream, its
count, its verdicts, and weights of its own that it trains. One hook takes part in a training step,
:meth:`Defense.train_step`; see ``docs/decisions/0028-one-hook-in-the-training-step.md``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import isnan, nan
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from jaxtyping import Float, Int
    from torch import Tensor, nn

    from leakbed.contracts.noise_laws import Clean, Law
    from leakbed.models import Architecture

NO_ALARM = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class DefenseState:
    """What a defence carries from one message to the next.

    Attributes:
        stream: The defence's own random stream.
        messages: How many messages it has protected, or gradients inspected; with the stream,
            fixes the next noise.
        tensors: Anything else, by name.
        trained: Weights of its own, by name: within ``train_step`` leaves on the trainer's device,
            else on the CPU. What that returns trains them, by an optimiser of the node's kind.
        momenta: Of that optimiser; kept and forgotten as the node's own.
        alarm: After how many gradients a detector raised its alarm; -1 where it did not.
        score: Its most suspicious score so far, on its own scale; NaN before the first.
        last: Its latest score; NaN before the first.
        probing: Whether the batch that waits for its gradient has labels made up to probe the
            server, so that the node must not learn from it.
    """

    stream: int
    messages: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    trained: Mapping[str, Tensor] = field(default_factory=dict)
    momenta: Mapping[str, Tensor] = field(default_factory=dict)
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
    """What a node holds when a round begins, for a defence that begins or learns from it.

    Attributes:
        images: Its private rows.
        labels: Their labels, as the node trains with them.
        architecture: The whole network without weights, which such a defence must know.
        bottom: Weights and buffers of the node's own part, by their names in the whole network, as
            it received them; of the server's part it holds none. In FedAvg the part is the whole.
        batch_size: Rows per step.
        optimiser: Makes the node's optimiser over given parameters.
    """

    images: Float[Tensor, " rows *image"]
    labels: Int[Tensor, " rows"]
    architecture: Architecture
    bottom: Mapping[str, Tensor]
    batch_size: int
    optimiser: Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReturnedGradient:
    """What came back for a batch, as the node's own detector sees it.

    Attributes:
        cut_gradient: As received, of what was sent, one row per sample.
        labels: The batch's, as the node trains with them.
        first_gradient: What the cut gradient makes of the bottom's first weights, by the task's
            loss alone and scaled to its mean over the batch: where several nodes share a loss, what
            is sent is as many times smaller as the node has a share of the rows.
    """

    cut_gradient: Float[Tensor, " batch *cut"]
    labels: Int[Tensor, " batch"]
    first_gradient: Float[Tensor, " *weights"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingStep:
    """One step of a node's training, between its backpropagation and its optimiser's step.

    Gradients are of the mean loss of the node's own batch, also where several nodes share a loss.

    Attributes:
        round: Server round, from 1.
        step: The batch's, from 0.
        rows: Which of the node's they are; on the CPU.
        images: The node's own.
        shown: What ``alter_images`` made of them, of which ``output`` is.
        labels: As the node trains with them; None where the server has them.
        module: What the node trains: its bottom, or in FedAvg the whole network. To run it again is
            :meth:`rerun`.
        output: What it made of the batch, with its graph: smashed data before any defence, or in
            FedAvg logits.
        output_gradient: Of the task's loss, with respect to that. Of smashed data it is the cut
            gradient, pulled back through the node's own defences.
        gradients: Of the task's loss, with respect to every weight that is trained, by name; as
            defences before this one left them.
    """

    round: int
    step: int
    rows: Int[Tensor, " batch"]
    images: Float[Tensor, " batch *image"]
    shown: Float[Tensor, " batch *image"]
    labels: Int[Tensor, " batch"] | None
    module: nn.Module
    output: Float[Tensor, " batch *output"]
    output_gradient: Float[Tensor, " batch *output"]
    gradients: Mapping[str, Float[Tensor, " *weight"]]

    @property
    def weights(self) -> dict[str, Tensor]:
        """What the node trains of its module, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def rerun(self, images: Float[Tensor, " rows *image"]) -> Float[Tensor, " rows *output"]:
        """Return what the module makes of other images, with its graph.

        Args:
            images: On the trainer's device.

        Returns:
            The output; buffers such as BatchNorm's do not count them.
        """
        from torch.func import functional_call  # noqa: PLC0415  keeps this module torch-free

        buffers = {name: value.clone() for name, value in self.module.named_buffers()}
        made: Tensor = functional_call(self.module, buffers, (images,))
        return made


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What a defence may know of a run before it starts, for one node's rows.

    Attributes:
        classes: Labels are 0 to ``classes - 1``.
        rows: The node's private samples.
        batch_size: Of its steps.
        steps: How many it takes, in all rounds together.
        passes: How often at most one of its rows is in a batch, for all parties that are sent a
            gradient of it together.
        top: The server's part of the network, with weights of no meaning.
        bottom: The node's; None where it is not known.
        smallest_batch: Rows of the smallest one; None for ``batch_size``.
        straddles: Whether a batch may hold rows of two passes, and so one row twice.
    """

    classes: int
    rows: int
    batch_size: int
    steps: int
    passes: int
    top: nn.Module
    bottom: nn.Module | None = None
    smallest_batch: int | None = None
    straddles: bool = False


class Defense:
    """Base of all defences: hooks that change nothing until overridden.

    A defence is a frozen dataclass of settings. State is passed in and returned; a hook must not
    change the tensors it is given. Training hooks belong to ``Protects.TRAINING``.

    Attributes:
        labels: The values of ``protocol.labels`` under which it works.
        claims: The differential privacy it claims: of what, with which norm, over which horizon,
            and what travels beside it uncovered; empty for none.
        exchanges: Where its training hooks work: in protocols that exchange ``"weights"``, as
            FedAvg, or ``"split"`` the network. Cut gradients come in the latter alone.
        suspicious: Of a detector: which of its scores are suspicious, ``"low"`` or ``"high"`` ones.
        stop: Whether a node whose detector raised an alarm refuses to train on.
        straight_through: Of a defence of smashed data: whether the node learns as if it were not
            there, the gradient of what was sent taken for that of what was computed. By default it
            is differentiated, as a layer of the bottom would be.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    protects: ClassVar[frozenset[Protects]]
    labels: ClassVar[frozenset[str]] = frozenset({"shared", "server", "client"})
    exchanges: ClassVar[frozenset[str]] = frozenset({"weights", "split"})
    claims: ClassVar[str] = ""
    suspicious: ClassVar[str] = "high"
    stop: bool = False
    straight_through: bool = False

    @property
    def claiming(self) -> bool:
        """Whether its claim of differential privacy holds under its settings."""
        return bool(self.claims)

    @property
    def row_wise(self) -> bool:
        """Whether each row of what it returns depends on that row alone, but for fresh noise.

        What does not say so is taken to mix rows, and does not stand before a claim about them.
        """
        return False

    @property
    def covers(self) -> int | None:
        """Where its claim ends: steps of one node (``Protects.TOP``), or gradients of one row.

        Who takes the steps, or protects the gradients, counts and stops there; None never stops.
        """
        return None

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

        In training they have a graph, and the gradient goes back through what torch computes here;
        see ``straight_through`` for what has no gradient of use, such as rounding.

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

    def law(self, clean: Clean) -> Law | None:
        """Say how what it sends of a message is distributed, for the oracle's informed ceiling.

        Of noise: which density, of which size, around what; what is a function of the message alone
        is :class:`~leakbed.contracts.noise_laws.Fixed`. It must be the law of the hook beside it,
        for every message: the oracle checks recorded noise against it.

        Args:
            clean: The message as the hook is given it.

        Returns:
            The law; None where it is not known, and then there is no ceiling.
        """
        del clean
        return None

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
        """Learn from what a node holds, when each of its rounds begins, before the first step.

        Args:
            state: From ``begin``, or the round before.
            holdings: The node's, with the bottom it received for this round.

        Returns:
            The next state.
        """
        del holdings
        return state

    def alter_images(
        self,
        state: DefenseState,
        images: Float[Tensor, " batch *image"],
        rows: Int[Tensor, " batch"],
    ) -> Float[Tensor, " batch *image"]:
        """Change what the bottom is shown of a batch.

        A node that keeps nothing between messages calls it again for the batch it had sent, with
        the state of that time, so it has none of its own to change.

        Args:
            state: From ``prepare`` or the previous step.
            images: The batch.
            rows: Which of the node's they are; on the CPU.

        Returns:
            The images to show.
        """
        del state, rows
        return images

    def follow_gradient(
        self,
        state: DefenseState,
        gradient: Float[Tensor, " batch *image"],
        rows: Int[Tensor, " batch"],
    ) -> DefenseState:
        """Learn from the gradient of the task's loss at the images that the bottom was shown.

        It is called where a defence overrides it, before ``inspect``, and not for a batch that the
        bottom does not learn from.

        Args:
            state: From ``prepare`` or the previous step.
            gradient: On the trainer's device.
            rows: Which of the node's they are; on the CPU.

        Returns:
            The next state.
        """
        del gradient, rows
        return state

    def train_step(
        self, state: DefenseState, step: TrainingStep
    ) -> tuple[DefenseState, Tensor | Mapping[str, Tensor] | None]:
        """Take part in a step of the node's training.

        It is called once a batch, after backpropagation of the task's loss and before ``inspect``;
        not for a batch that the node does not learn from. The global generators are seeded from
        the defence's own stream meanwhile, and put back.

        Args:
            state: From ``prepare`` or the previous step; its ``trained`` weights are leaves.
            step: What the node knows of it.

        Returns:
            The next state, and one of three. A loss: the node minimises it beside the task's, and
            weighs it by its share of the rows where several nodes share a loss, so that it weighs
            the same in every protocol; it trains ``trained`` weights as well, without that share.
            Gradients by name, of all ``step.gradients``: the node steps along them in their place.
            None: the step stays as it is. To train own weights otherwise, return a state with
            other ones.
        """
        del step
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

    def inspect(self, state: DefenseState, step: ReturnedGradient) -> DefenseState:
        """Look at a gradient before the bottom learns from it; an alarm is a value in the state.

        Args:
            state: From the batch's ``protect_labels``, or the previous step.
            step: What came back for the batch.

        Returns:
            The next state.
        """
        del step
        return state


def select(defenses: Iterable[Defense], *kinds: Protects) -> tuple[Defense, ...]:
    """Return the defences that protect at least one of some kinds, in the order given."""
    return tuple(each for each in defenses if each.protects & {*kinds})
