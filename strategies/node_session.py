"""A node's session of one round, batch after batch.

A protocol drives one session or several and decides what happens between a smashed batch and its
gradient; a session knows the messages, and refuses a reply that does not fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from flwr.app import Message
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from leakbed.contracts.gradient_defenses import Origin
from leakbed.events import Array, Arrays
from leakbed.grids.base import NodeDiverged, NodeFailed
from leakbed.tensors import as_tensor, finite
from leakbed.wire.fields import Carried
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_STEP,
    SPLIT_STEP,
    BackwardReply,
    HeadReply,
    HeadRequest,
    NodeRequest,
    SplitReply,
    SplitRequest,
)
from leakbed.wire.records import WireError
from strategies.node_channel import NodeChannel
from strategies.server_model import Labelled, UnfitBatchError

Reply = TypeVar("Reply", bound=Carried)
Labels = Mapping[int, Int[Tensor, " rows"]]


class NoLabelsError(RuntimeError):
    """A smashed batch came without labels, and the server has none for it either."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """A node's smashed batch with what the server may know of it.

    Attributes:
        smashed: One row per sample; a view of the reply, never to be written.
        labels: Their labels; None where they stay at the node.
        rows: The samples' ids, where the protocol sends them.
        origin: Whose batch it is, with the ids where they are known.
    """

    smashed: Shaped[Tensor, " batch *cut"]
    labels: Int[Tensor, " batch"] | None = None
    rows: Int[Tensor, " batch"] | None = None
    origin: Origin | None = None

    @property
    def labelled(self) -> Labelled:
        """Smashed rows, labels and origin, for a server that holds the loss.

        Raises:
            NoLabelsError: If there are none.
        """
        if self.labels is None:
            raise NoLabelsError(
                "a node sent no labels; give the strategy its labels (labels = 'server'), or let "
                "nodes share them (labels = 'shared')"
            )
        return Labelled(self.smashed, self.labels, self.origin)


class _Blamed(NamedTuple):
    """Whom to blame; a class, since a step asks twice and a generator costs more."""

    session: "NodeSession"
    kind: str

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        if isinstance(error, (WireError, UnfitBatchError, NoLabelsError)):
            session = self.session
            raise session.channel.failure(session.node, self.kind, str(error)) from error


class NodeSession:
    """One node's way through one round: open, then receive and answer until it is done.

    Attributes:
        node: Flower's node id.
        step: The step whose batch is awaited or was received last.
        steps: How many batches the node has this round; known from its first reply on.
        examples: Samples in them.
        channel: By which its messages go.
    """

    def __init__(
        self,
        channel: NodeChannel,
        node: int,
        *,
        round_: int,
        bottoms: str = "sealed",
        labels: Labels | None = None,
        smashed_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Make the session; nothing is sent yet.

        Args:
            channel: Of this round.
            node: Flower's node id.
            round_: Server round, from 1.
            bottoms: ``"sealed"`` or ``"relayed"``.
            labels: Labels of each node's rows, where the server holds them.
            smashed_shape: Of one smashed row; None takes the first batch's.
        """
        self.node, self.step, self.steps, self.examples = node, 0, 0, 0
        self.channel, self._round, self._bottoms = channel, round_, bottoms
        self._labels = None if labels is None else labels.get(node)
        self._shape = smashed_shape
        self._rows = 0  # samples so far
        self._closing: SplitRequest | None = None
        self._sender: int | None = None

    @property
    def round(self) -> int:
        """Server round, from 1."""
        return self._round

    @property
    def done(self) -> bool:
        """Whether every batch was answered, and only the closing message is left."""
        return self._closing is not None

    def open(self, bottom: Arrays | None, *, sender: int | None = None) -> None:
        """Ask for the first batch.

        Args:
            bottom: What the node starts from; None where it keeps its own.
            sender: Partition of the node that sent the bottom, if one did; where the bottom is
                refused, it failed. The server has the receiver's word for that alone.
        """
        self._sender = sender
        self._request(SplitRequest(round=self._round, step=0, bottom=bottom, bottoms=self._bottoms))

    def receive(self) -> Batch:
        """Wait for the next smashed batch; one that does not fit is a :class:`NodeFailed`.

        Returns:
            The batch.

        Raises:
            NodeFailed: Of this node; of the one that sent the bottom, where this one refuses it.
        """
        try:
            reply = self.received(SplitReply)
        except NodeFailed as error:
            if self._sender is None or not error.refuses_bottom:
                raise
            cause = f"node {error.node}, next in turn, refuses its bottom: {error.cause}"
            raise NodeFailed(self._sender, SPLIT_STEP, cause) from error
        with self.blamed(SPLIT_STEP):
            return self._batch(reply)

    def answer(self, gradient: Float[Tensor, " batch *cut"], *, share: float = 1.0) -> None:
        """Send the gradient of the batch received last, and ask for the next batch.

        After the last batch nothing is sent: its gradient travels in :meth:`closing`.

        Args:
            gradient: dL/d(smashed), on the CPU. One that is not finite is a :class:`NodeFailed`.
            share: What L is of the mean of the node's own rows: its share of a loss over the rows
                of several nodes.
        """
        self.check_finite("cut gradient", gradient)
        self._next(
            SplitRequest(
                round=self._round, step=self.step + 1, gradient=gradient.numpy(), share=share
            )
        )

    def resume(self, bottom: Arrays) -> None:
        """Ask for the next batch, of a bottom that others made; the gradient went before.

        Args:
            bottom: Weights to go on from, or some of them by name.
        """
        self._next(
            SplitRequest(
                round=self._round, step=self.step + 1, bottom=bottom, bottoms=self._bottoms
            )
        )

    def ask(self, request: NodeRequest) -> None:
        """Send a request of a protocol's own; its ``step`` is the session's from then on."""
        self.step = int(getattr(request, "step", self.step))
        self.channel.send(self.node, request.TYPE, request)

    def received(self, kind: type[Reply]) -> Reply:
        """Wait for the reply to what was asked.

        Args:
            kind: Its class. One that cannot be read is a :class:`NodeFailed`.

        Returns:
            It.

        Raises:
            TypeError: If a reply of another class was asked for.
        """
        reply = self.channel.receive(self.node)
        if not isinstance(reply, kind):
            raise TypeError(f"{type(reply).__name__} came where {kind.__name__} was asked for")
        return reply

    def finish(self) -> None:
        """Be done after the batch received last, of which the node needs no gradient."""
        self._next(SplitRequest(round=self._round, step=self.steps))

    def send_features(self, features: Float[Tensor, " batch *upper"]) -> None:
        """Send the features of the batch received last to the node's head."""
        self.check_finite("features", features)
        request = HeadRequest(round=self._round, step=self.step, features=features.numpy())
        self.channel.send(self.node, HEAD_STEP, request)

    def receive_upper(self) -> Shaped[Tensor, "..."]:
        """Wait for the gradient of the features; not a finite one is a :class:`NodeFailed`."""
        reply = self.received(HeadReply)
        with self.blamed(HEAD_STEP):
            self._check_step(reply.step)
            gradient = as_tensor(reply.gradient)
        self.check_finite("gradient of the features", gradient, kind=HEAD_STEP)
        return gradient

    def send_backward(self, gradient: Float[Tensor, " batch *cut"], *, share: float = 1.0) -> None:
        """Send a cut gradient and ask for the bottom's own gradient instead of a step.

        Args:
            gradient: As for :meth:`answer`.
            share: Likewise.
        """
        self.check_finite("cut gradient", gradient)
        request = SplitRequest(
            round=self._round, step=self.step, gradient=gradient.numpy(), share=share
        )
        self.channel.send(self.node, BACKWARD_STEP, request)

    def receive_backward(self) -> Arrays:
        """Wait for the bottom's gradient by parameter name."""
        reply = self.received(BackwardReply)
        with self.blamed(BACKWARD_STEP):
            self._check_step(reply.step)
        return reply.gradient

    def closing(self) -> SplitRequest:
        """Return the request that ends the round at this node and asks for its bottom.

        Returns:
            Not yet sent.

        Raises:
            RuntimeError: If the session is not done.
        """
        if self._closing is None:
            raise RuntimeError(f"node {self.node} has {self.steps - self.step} batches left")
        return self._closing

    def closing_message(self) -> Message:
        """Return the message of :meth:`closing`, for Flower to send."""
        return Message(self.closing().records(), dst_node_id=self.node, message_type=SPLIT_STEP)

    def close(self) -> SplitReply:
        """End the round at this node and return the reply that should bring its bottom."""
        self.send_closing()
        return self.receive_closing()

    def send_closing(self) -> None:
        """Send :meth:`closing`."""
        self.channel.send(self.node, SPLIT_STEP, self.closing())

    def receive_closing(self) -> SplitReply:
        """Wait for the reply that should bring the node's bottom."""
        return self.received(SplitReply)

    def blamed(self, kind: str = SPLIT_STEP) -> "_Blamed":
        """Turn what does not fit the model or the protocol into a :class:`NodeFailed` of this node.

        Args:
            kind: Type of the message it came with.

        Returns:
            For a ``with`` statement.
        """
        return _Blamed(self, kind)

    def check_finite(self, what: str, tensor: Tensor, *, kind: str = SPLIT_STEP) -> None:
        """Refuse values that are not finite; they are a :class:`NodeDiverged`."""
        if not finite(tensor):
            where = f"the {what} of round {self._round}, step {self.step} is not finite"
            cause = f"{where}; lower protocol.learning_rate"
            raise NodeDiverged(self.channel.partition(self.node), kind, cause)

    def _request(self, request: SplitRequest) -> None:
        self.step = request.step
        self.channel.send(self.node, SPLIT_STEP, request)

    def _next(self, request: SplitRequest) -> None:
        if request.step < self.steps:
            self._request(request)
        elif self._rows != self.examples:
            cause = f"sent {self._rows} samples in round {self._round}, announced {self.examples}"
            raise self.channel.failure(self.node, SPLIT_STEP, cause)
        else:
            self._closing = request

    def _batch(self, reply: SplitReply) -> Batch:
        """Return a reply's batch, or refuse its step, shape, size or type."""
        self._check_plan(reply)
        smashed = reply.smashed
        if smashed is None:
            raise WireError(f"no batch {self.step} in round {self._round}")
        self._shape = self._shape or smashed.shape[1:]
        if smashed.ndim < 1 or not len(smashed) or smashed.shape[1:] != self._shape:
            wanted = " x ".join(map(str, ("batch", *self._shape)))
            raise WireError(f"smashed data of shape {smashed.shape}, expected {wanted}")
        if smashed.dtype.kind != "f":
            raise WireError(f"smashed data are {smashed.dtype}, no floating-point numbers")
        rows = _whole("rows", reply.rows, len(smashed))
        labels = _whole("labels", reply.labels, len(smashed))
        if labels is None and self._labels is not None and rows is not None:
            if not 0 <= int(rows.min()) <= int(rows.max()) < len(self._labels):
                raise WireError(f"rows {rows.tolist()} of a node with {len(self._labels)} samples")
            labels = self._labels[rows]
        self._rows += len(smashed)
        origin = Origin(
            node=self.channel.partition(self.node),
            round=self._round,
            step=self.step,
            rows=None if rows is None else tuple(rows.tolist()),
        )
        batch = Batch(smashed=as_tensor(smashed), labels=labels, rows=rows, origin=origin)
        self.check_finite("smashed batch", batch.smashed)
        return batch

    def _check_plan(self, reply: SplitReply) -> None:
        """Refuse a reply of another step, or with another plan, than the session is at."""
        self._check_step(reply.step)
        if self.step == 0:
            self.steps, self.examples = reply.steps, reply.examples
        if (reply.steps, reply.examples) != (self.steps, self.examples) or self.step >= self.steps:
            raise WireError(
                f"step {self.step} of {reply.steps} with {reply.examples} samples, after it began "
                f"with {self.steps} and {self.examples}"
            )

    def _check_step(self, step: int) -> None:
        if step != self.step:
            raise WireError(f"a reply of step {step} came while step {self.step} was awaited")


def _whole(what: str, numbers: Array | None, rows: int) -> Int[Tensor, " batch"] | None:
    """Return ids or labels; refuse what is not one whole number per smashed row."""
    if numbers is None:
        return None
    if numbers.dtype != np.int64 or numbers.shape != (rows,):
        raise WireError(
            f"{what} of shape {numbers.shape} and type {numbers.dtype}; expected {rows} numbers "
            "of int64"
        )
    return torch.from_numpy(numbers.copy())


def first_to_answer(sessions: Sequence[NodeSession]) -> NodeSession:
    """Return the session whose reply arrives first by the channel's clock.

    Args:
        sessions: Of one round; those that owe no reply do not count.

    Returns:
        Of several at the same time, the one that was asked first.
    """
    node = sessions[0].channel.first()
    return next(session for session in sessions if session.node == node)
