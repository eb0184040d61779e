"""What an attack is: tensors in, tensors out; no Flower, no files, no truth.

An attack declares its :class:`ThreatModel`; the harness grants it exactly that as a
:class:`View`; the attack answers with a :class:`Guess`. An :class:`Adversary` rewrites messages
besides; a :class:`Watcher` sees them as they come and rewrites none.

A :class:`MaliciousClient` is one of the nodes. It decides batch by batch what its node trains on,
whether the node's parts learn from it, and by what factor the gradient shrinks that the node sends
up; what comes back it learns from. The server and the other nodes follow the protocol and cannot
tell its messages by their number, order or shape. Importing this module needs neither torch nor
Flower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar, runtime_checkable

from leakbed.contracts.threat import Granted, Seat, ThreatModel, UnfitError

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor, nn

    from leakbed.models import Architecture


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """Everything one attack may read; fields its threat model does not grant are ``None``.

    The leading axis of every evidence tensor is the target: one attacked message. A target hides
    ``rows`` private samples (batch size x local steps for an update, 1 for a smashed row).

    Attributes:
        seat: The party the view belongs to.
        image_shape: Channels, height, width of the inputs; pixel values lie in [0, 1].
        num_classes: Number of labels, which are 0 to ``num_classes - 1``.
        targets: Number of attacked messages.
        rows: Private samples behind each target.
        local_steps: Optimiser steps behind each target.
        before: Trainable weights each victim started from, by parameter name; where bottoms are
            relayed, those of the bottom.
        after: The weights it sent back, same names and shapes as ``before``.
        num_examples: How many samples each node said it trained on.
        train_loss: The last loss each node reported, where every one of them did.
        buffers: What each victim started from and did not train: frozen weights, BatchNorm
            statistics.
        smashed: Activations at the cut, one row per target.
        round_smashed: Every smashed row of training of the attacked round, whichever are attacked.
        round_labels: Their labels, where nodes send them; before the first message none of them.
        cut_gradient: The loss gradient with respect to ``smashed``, same shape.
        head_gradient: Weight gradient of the layer that reads ``smashed``; up to a factor.
        labels: True labels, where the protocol or the threat model gives them.
        known_labels: Those of the few targets it knows, -1 elsewhere; those are not scored.
        own_images: The inputs behind the targets, for the party that they belong to.
        natural_images: Images of the task that are to be altered, one per target; whoever attacks
            has them from anywhere, and is not told that they lie behind messages.
        architecture: The network's layers without weights; its ``cut`` tells the parts apart.
        public_images: Images the adversary owns.
        public_labels: Their labels, for an adversary that has them.
        public_attributes: Their values of the attribute to infer.
        attribute_values: How many values it takes; they are numbered from 0.
        smashed_shape: Shape of one smashed row, for an adversary that begins before any was sent;
            ``rows`` is then the size of the batches to come.
        server_part: The server's own part, a frozen copy in evaluation mode that ends where the
            node's head begins, or in the logits; as it stood at the attacked round's end, or, for
            one that begins before training, with its first weights.
        granted: By name, what the threat model's own kinds of evidence and knowledge grant: a
            tensor or tensors by name whose leading axis is the target, or what the experiment told.
        device: Where the evidence lies and the attack should compute.
    """

    seat: Seat
    image_shape: tuple[int, int, int]
    num_classes: int
    targets: int
    rows: int = 1
    local_steps: int = 1
    before: Mapping[str, Float[Tensor, " targets *shape"]] | None = None
    after: Mapping[str, Float[Tensor, " targets *shape"]] | None = None
    num_examples: Int[Tensor, " targets"] | None = None
    train_loss: Float[Tensor, " targets"] | None = None
    buffers: Mapping[str, Tensor] | None = None
    smashed: Float[Tensor, " targets *cut"] | None = None
    round_smashed: Float[Tensor, " seen *cut"] | None = None
    round_labels: Int[Tensor, " seen"] | None = None
    cut_gradient: Float[Tensor, " targets *cut"] | None = None
    head_gradient: Float[Tensor, " targets classes features"] | None = None
    labels: Int[Tensor, " targets rows"] | None = None
    known_labels: Int[Tensor, " targets rows"] | None = None
    own_images: Float[Tensor, " targets channels height width"] | None = None
    natural_images: Float[Tensor, " targets channels height width"] | None = None
    architecture: Architecture | None = None
    public_images: Float[Tensor, " public channels height width"] | None = None
    public_labels: Int[Tensor, " public"] | None = None
    public_attributes: Int[Tensor, " public"] | None = None
    attribute_values: int | None = None
    smashed_shape: tuple[int, ...] | None = None
    server_part: nn.Module | None = None
    granted: Granted = field(default_factory=Granted)
    device: torch.device | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Guess:
    """What an attack returns; a field it does not guess is ``None``.

    Attributes:
        images: Guessed inputs; any range, the harness clips to [0, 1] for scoring.
        labels: Guessed labels.
        clusters: Guessed groups: rows of one number share a label, which is not said.
        attributes: Guessed values of the attribute that the threat model infers.
        scores: How strongly label 1 of two is believed; only their order counts.
        objective: The attack's own final objective per target; lower is better.
        failed: Targets on which the attack broke down (non-finite everywhere); scored as failures.
        stopped_on_budget: Targets at which an iterative attack ran out of its budget of steps
            rather than out of progress, so that a larger budget may change the guess.
        adversarial: Each natural image altered within each of the ``budgets``, in [0, 1].
        budgets: The most by which a pixel of those may differ from the natural one; the first leads
            the score.
        clones: Parameters of the stolen bottom per target, named as in ``architecture.bottom``.
    """

    images: Float[Tensor, " targets rows channels height width"] | None = None
    labels: Int[Tensor, " targets rows"] | None = None
    clusters: Int[Tensor, " targets rows"] | None = None
    attributes: Int[Tensor, " targets rows"] | None = None
    scores: Float[Tensor, " targets rows"] | None = None
    objective: Float[Tensor, " targets"] | None = None
    failed: Bool[Tensor, " targets"] | None = None
    stopped_on_budget: Bool[Tensor, " targets"] | None = None
    adversarial: Float[Tensor, " targets budgets channels height width"] | None = None
    budgets: tuple[float, ...] | None = None
    clones: Mapping[str, Float[Tensor, " targets *shape"]] | None = None


class UnfitViewError(UnfitError):
    """Evidence of a shape or number the attack cannot read; the message says what it reads."""


class BrokenPluginError(RuntimeError):
    """The code of an attack or a defence raised, or returned what its contract does not allow."""


@runtime_checkable
class Attack(Protocol):
    """One published passive attack: a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def threat(self) -> ThreatModel:
        """Who attacks and what it may read; may depend on the settings."""
        ...

    def run(self, view: View, *, seed: int) -> Guess:
        """Attack every target of the view in one batched computation.

        Args:
            view: What the threat model grants; never changed.
            seed: Fixes every random choice; the same seed gives the same bits.

        Returns:
            One guess per target, in the view's order.
        """
        ...


State = TypeVar("State")


@runtime_checkable
class Adversary(Protocol[State]):
    """One published active attack: a frozen dataclass whose fields are its settings.

    It stands where cut gradients leave the server and answers every smashed batch of training with
    a gradient of its own. What it learns lies in a state of its own making, which it alone reads.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def threat(self) -> ThreatModel:
        """Who attacks and what it may read; ``active``."""
        ...

    def begin(self, view: View, *, seed: int) -> State:
        """Prepare for training, before the first message; refuse what cannot work.

        Args:
            view: With ``smashed_shape``, ``rows`` and what the threat model grants; never changed,
                and empty of evidence.
            seed: Fixes every random choice; the same seed and batches give the same bits.

        Returns:
            The state before the first batch.
        """
        ...

    def forge(
        self,
        state: State,
        smashed: Float[Tensor, " batch *cut"],
        cut_gradient: Float[Tensor, " batch *cut"],
    ) -> tuple[State, Float[Tensor, " batch *cut"]]:
        """Answer one smashed batch of training, and learn from it.

        Args:
            state: From ``begin`` or the previous call; consumed: only the returned one is of use.
            smashed: As the node sent it, on the view's device; never changed.
            cut_gradient: What the honest server would send back, likewise; never changed.

        Returns:
            The next state, and the gradient to send: of the shape and type of ``smashed``, in
            memory that later calls do not write. The node gets it on its own device.
        """
        ...

    def guess(self, state: State, smashed: Float[Tensor, " batch *cut"]) -> Guess:
        """Reconstruct what any smashed batch hides, at any time; every row is a target.

        Args:
            state: As it stands; never changed, nor its random streams.
            smashed: Of this training or of evaluation, live or from a trace; on the view's device.

        Returns:
            One guess per row, of one sample each.
        """
        ...


@runtime_checkable
class Watcher(Protocol[State]):
    """One published passive attack that learns beside the training: a frozen dataclass of settings.

    It stands where an :class:`Adversary` does and is shown every smashed batch of training, but has
    nothing to answer: a run has the same bits with and without it.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def threat(self) -> ThreatModel:
        """Who attacks and what it may read; not ``active``, and a server."""
        ...

    def begin(self, view: View, *, seed: int) -> State:
        """Prepare for training, before the first message; refuse what cannot work.

        Args:
            view: With ``smashed_shape``, ``rows`` and what the threat model grants; never changed,
                and empty of evidence. Its ``server_part`` has the first weights.
            seed: Fixes every random choice; the same seed and batches give the same bits.

        Returns:
            The state before the first batch.
        """
        ...

    def watch(
        self,
        state: State,
        smashed: Float[Tensor, " batch *cut"],
        *,
        labels: Int[Tensor, " batch"] | None,
        part: nn.Module | None,
    ) -> State:
        """Learn from one smashed batch of training, after the server trained on it.

        Args:
            state: From ``begin`` or the previous call; consumed: only the returned one is of use.
            smashed: As the node sent it, on the view's device; never changed.
            labels: Of its rows, likewise, where the node sent them.
            part: The server's own part as it stands now, where the threat model names it: frozen,
                in evaluation mode, and written over before the next call.

        Returns:
            The next state.
        """
        ...

    def guess(self, state: State, smashed: Float[Tensor, " batch *cut"]) -> Guess:
        """Reconstruct what any smashed batch hides, at any time; every row is a target.

        Args:
            state: As it stands; never changed, nor its random streams.
            smashed: Of this training or of evaluation, live or from a trace; on the view's device.

        Returns:
            One guess per row, of one sample each.
        """
        ...


class UnfitNodeError(ValueError):
    """Settings of a malicious client that do not fit the node's images, classes or network."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NodeView:
    """What a malicious client knows of its node before the first batch; no sample is part of it.

    Attributes:
        image_shape: Channels, height, width of the inputs; pixel values lie in [0, 1].
        num_classes: Number of labels, which are 0 to ``num_classes - 1``.
        outputs: Size of the network's output; those from ``num_classes`` on no true label uses.
        device: Where the node computes.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    outputs: int
    device: torch.device


@dataclass(frozen=True, kw_only=True, eq=False)
class MaliciousClientState:
    """What a malicious client carries from batch to batch; nobody writes into its tensors.

    Attributes:
        stream: The client's own random stream.
        turns: Batches it has had.
        tensors: Networks, momenta and the like, by name.
    """

    stream: int
    turns: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class CraftedBatch:
    """What a malicious client does with one batch.

    Attributes:
        images: What the node's bottom is shown, with the graph of what made them; None takes the
            node's own rows and labels, as an honest node does.
        labels: What the loss is taken against; None with ``images``.
        trains: Whether the node's own parts take their step. Otherwise they stay as they are,
            buffers included.
        scale: Factor of the gradient that the node sends up. What comes back is divided by it.
        sources: What of ``images`` the malicious client wants to find again in
            :meth:`MaliciousClient.learn`.
    """

    images: Float[Tensor, " batch *image"] | None = None
    labels: Int[Tensor, " batch"] | None = None
    trains: bool = True
    scale: float = 1.0
    sources: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class MaliciousClient(Protocol):
    """One published malicious client: a frozen dataclass whose fields are its settings."""

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def threat(self) -> ThreatModel:
        """Who attacks and what it may read; a client, ``active``."""
        ...

    @property
    def scales(self) -> bool:
        """Whether it scales gradients, which only a node that computes the loss can."""
        ...

    @property
    def aim(self) -> int:
        """The label of which it wants to have samples."""
        ...

    def begin(self, view: NodeView, *, seed: int) -> MaliciousClientState:
        """Prepare, before the first batch; refuse what cannot work with an ``UnfitNodeError``.

        Args:
            view: Of the node.
            seed: Fixes every random choice; the same seed and gradients give the same bits.

        Returns:
            The state before the first batch.
        """
        ...

    def turn(self, view: NodeView, state: MaliciousClientState, *, rows: int) -> CraftedBatch:
        """Decide on the next batch; asked again of the same state, decide the same."""
        ...

    def learn(
        self,
        state: MaliciousClientState,
        turn: CraftedBatch,
        gradient: Float[Tensor, " batch *image"] | None,
    ) -> MaliciousClientState:
        """Learn from a batch.

        Args:
            state: From which the turn was made; never changed.
            turn: The batch.
            gradient: dL/d(images), the scale undone, on the view's device; None where none came
                back.

        Returns:
            The next state.
        """
        ...

    def samples(
        self, view: NodeView, state: MaliciousClientState, *, count: int
    ) -> Float[Tensor, " count *image"]:
        """Return what it takes samples of its aim to look like.

        Args:
            view: As in :meth:`begin`.
            state: As it stands; never changed, nor its random stream.
            count: How many.

        Returns:
            Images; the harness clips them to [0, 1].
        """
        ...


@runtime_checkable
class Metric(Protocol):
    """A measure of one's own of guessed images, beside those of the oracle.

    Attributes:
        name: Of its score on a card and its column in `leakbed results`; none of the oracle's, and
            none that stands for something else there (``seconds``, ``targets``, ``far_low``).
        source: Where it is published, or that it is one's own.
        higher_leaks_more: Whether a higher value is the greater leak.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    higher_leaks_more: ClassVar[bool]

    def measure(
        self,
        guess: Float[Tensor, " images channels height width"],
        truth: Float[Tensor, " images channels height width"],
    ) -> Float[Tensor, " images"]:
        """Return one value per image.

        Args:
            guess: In the order of the true images, clipped to [0, 1]; grey where an attack failed.
            truth: The private images, pixel values in [0, 1].

        Returns:
            The values; a target's score is the mean over its images.
        """
        ...
