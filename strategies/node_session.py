"""A node's session of one round, batch after batch, and the channel by which its messages go.

A protocol drives one session or several and decides what happens between a smashed batch and its
gradient; a session knows the messages, and refuses a reply that does not fit.

The channel sends a request now, waits for its reply later, and insists that it comes. A grid that
hands requests over by itself (:mod:`leakbed.wire.calls`) does so; to any other they go as Flower
messages: two carriers of the same requests and replies, with the same checks.

Pushing and pulling lets nodes work while the server does: of K nodes, one's next batch is on its
way before the next one's reply is read. Replies are taken in the order the server asks for them,
never as they arrive, so the result is the same on every grid.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from leakbed.contracts.gradient_defenses import Origin
from leakbed.events import Array, Arrays
from leakbed.grids.base import NodeDiverged, NodeFailed, wait_for
from leakbed.tensors import as_tensor, finite
from leakbed.wire.bounds import Bounds, bind
from leakbed.wire.calls import Call, Failure, typed_call
from leakbed.wire.fields import Alarms, Carried, alarms_of, stop_of
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_STEP,
    REPLIES,
    SPLIT_STEP,
    BackwardReply,
    HeadReply,
    HeadRequest,
    SplitReply,
    SplitRequest,
    Stopped,
)
from leakbed.wire.records import WireError, shortened
from strategies.server_model import Labelled, UnfitBatchError

_LATE = "raise protocol.timeout if its steps take longer"


class NodeStopped(NodeFailed):
    """A node's detector took the server for a hijacker, and the node trains no further.

    Attributes:
        by: The detector.
        alarms: What all the node's detectors found.
    """

    def __init__(self, node: int, message_type: str, by: str, alarms: Alarms) -> None:
        """Say who stopped, and why.

        Args:
            node: Partition id.
            message_type: Of the message it answered so.
            by: The detector.
            alarms: What all the node's detectors found.
        """
        cause = f"{by} takes the server for a hijacker; the node trains no further"
        super().__init__(node, message_type, cause)
        self.by, self.alarms = by, alarms

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.node, self.message_type, self.by, self.alarms)


class NodeChannel:
    """One round's messages to its nodes, at most one unanswered each."""

    def __init__(self, grid: Grid, *, timeout: float | None, bounds: Bounds | None = None) -> None:
        """Open for a round.

        Args:
            grid: Where the nodes are.
            timeout: Seconds to wait for each reply; None to wait as long as Flower does.
            bounds: What replies may be; None for anything.
        """
        self._grid, self._timeout, self._bounds = grid, timeout, bounds
        if bounds is not None:
            bind(grid, bounds)
        self._calls: dict[str, Call | None] = {}
        self._sent: dict[int, tuple[str, float, Callable[[], Message | Carried]]] = {}

    def send(self, node: int, kind: str, request: Carried) -> None:
        """Send a request.

        Args:
            node: Flower's node id.
            kind: Type of the message it travels in.
            request: Of the class that this type has. A grid that does not take it is a
                :class:`NodeFailed`.
        """
        if kind not in self._calls:
            self._calls[kind] = typed_call(self._grid, kind)
        call = self._calls[kind]
        carried = self._pushed if call is None else partial(self._called, call)
        self._sent[node] = kind, monotonic(), carried(node, kind, request)

    def receive(self, node: int) -> Carried:
        """Wait for the answer to the last request sent to a node.

        Args:
            node: Flower's node id.

        Returns:
            The reply, of the class that answers this type of message.

        Raises:
            NodeFailed: If there is no answer in time, an error, more than one answer, one that
                the plan does not allow, which nobody decodes, or one that cannot be read.
            NodeStopped: If the node answers that it trains no further.
        """
        kind, sent, wait = self._sent.pop(node)
        try:
            answer = wait()
        except NodeFailed as error:
            # Where a message's time to live is over first, its grid answers with an error.
            late = self._timeout is not None and monotonic() - sent >= self._timeout
            cause = f"no reply within {self._timeout} s; {_LATE}" if late else error.cause
            raise NodeFailed(self.partition(node), kind, cause) from error
        reply = self._read(node, kind, answer) if isinstance(answer, Message) else answer
        if isinstance(reply, Stopped):
            raise NodeStopped(self.partition(node), kind, reply.by, reply.alarms or {})
        return reply

    def exchange(self, node: int, kind: str, request: Carried) -> Carried:
        """Send a request to a node that owes no reply and wait, as :meth:`receive` does.

        Args:
            node: Flower's node id.
            kind: Type of the message it travels in.
            request: Of the class that this type has.

        Returns:
            The reply.
        """
        self.send(node, kind, request)
        return self.receive(node)

    def _pushed(self, node: int, kind: str, request: Carried) -> Callable[[], Message]:
        """Send a request as a message, and return the wait for the message that answers it."""
        records = request.records()
        message = Message(records, dst_node_id=node, message_type=kind, ttl=self._timeout)
        if not all(self._grid.push_messages([message])):
            raise NodeFailed(self.partition(node), kind, "the message could not be sent")

        def wait() -> Message:
            replies = wait_for(self._grid, [message.metadata.message_id], timeout=self._timeout)
            (reply,) = checked(replies, [message], bounds=self._bounds)
            return reply

        return wait

    def _called(self, call: Call, node: int, kind: str, request: Carried) -> Callable[[], Carried]:
        """Hand a request over, and return the wait for its reply."""
        own = request.handed_over()
        answer = call(node, own, self._timeout)

        def wait() -> Carried:
            reply = answer()
            if isinstance(reply, Failure):
                raise NodeFailed(self.partition(node), kind, reply.reason)
            return reply  # the grid refuses what the plan does not allow

        return wait

    def _read(self, node: int, kind: str, message: Message) -> Carried:
        """Return what a message carries; what cannot be read is a failure of its sender."""
        refuse_stopped(message, self.partition(node))
        try:
            return REPLIES[kind].of(message)
        except WireError as error:
            raise NodeFailed(self.partition(node), kind, str(error)) from error

    def failure(self, node: int, kind: str, cause: str) -> NodeFailed:
        """Return the error that says which partition failed.

        Args:
            node: Flower's node id.
            kind: The message's type.
            cause: What went wrong.

        Returns:
            To be raised.
        """
        return NodeFailed(self.partition(node), kind, cause)

    def partition(self, node: int) -> int:
        """Return which partition a Flower node id is, as :func:`partition` does."""
        return partition(self._grid, node)


def partition(grid: Grid, node: int) -> int:
    """Return which partition a Flower node id is, where the grid knows, else the id itself."""
    roster: Mapping[int, int] = getattr(grid, "roster", {})
    return roster.get(node, node)


def refuse_stopped(reply: Message, node: int) -> None:
    """Refuse a reply that says its node trains no further.

    Args:
        reply: With content.
        node: Its sender's partition.

    Raises:
        NodeStopped: If it says so.
        NodeFailed: If it says so in a way that cannot be read.
    """
    kind = reply.metadata.message_type
    try:
        by = stop_of(reply)
        alarms = alarms_of(reply) if by is not None else None
    except WireError as error:
        raise NodeFailed(node, kind, str(error)) from error
    if by is not None:
        raise NodeStopped(node, kind, by, alarms or {})


def checked(
    replies: Sequence[Message],
    sent: Sequence[Message],
    *,
    partition_of: Callable[[int], int] = int,
    bounds: Bounds | None = None,
) -> list[Message]:
    """Return one reply for each message sent, in that order.

    Args:
        replies: In any order.
        sent: The messages they should answer.
        partition_of: Which partition a Flower node id is, to name a node that failed.
        bounds: What replies may be; None for anything.

    Returns:
        The replies.

    Raises:
        NodeFailed: On an error reply, a missing one, two to one message, or one that the plan does
            not allow.
    """
    answers: dict[str, list[Message]] = {}
    for reply in replies:
        answers.setdefault(reply.metadata.reply_to_message_id, []).append(reply)
    found = []
    for message in sent:
        about = message.metadata
        own = answers.get(about.message_id, [])
        cause = ""
        if len(own) != 1:
            cause = f"answered {len(own)} times" if own else "no reply"
        elif own[0].has_error():
            cause = shortened(own[0].error.reason)
        elif bounds is not None:
            cause = _excess(bounds, message, own[0])
        if cause:
            raise NodeFailed(partition_of(about.dst_node_id), about.message_type, cause)
        found.append(own[0])
    return found


def _excess(bounds: Bounds, sent: Message, reply: Message) -> str:
    """Return what of a reply the plan does not allow; empty where it does."""
    try:
        bounds.refuse(sent, reply)
    except WireError as error:
        return str(error)
    return ""


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


class NodeSession:
    """One node's way through one round: open, then receive and answer until it is done.

    Attributes:
        node: Flower's node id.
        step: The step whose batch is awaited or was received last.
        steps: How many batches the node has this round; known from its first reply on.
        examples: Samples in them.
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
        self._channel, self._round, self._bottoms = channel, round_, bottoms
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
            reply = self._received(SplitReply)
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

    def send_features(self, features: Float[Tensor, " batch *upper"]) -> None:
        """Send the features of the batch received last to the node's head."""
        self.check_finite("features", features)
        request = HeadRequest(round=self._round, step=self.step, features=features.numpy())
        self._channel.send(self.node, HEAD_STEP, request)

    def receive_upper(self) -> Shaped[Tensor, "..."]:
        """Wait for the gradient of the features; not a finite one is a :class:`NodeFailed`."""
        reply = self._received(HeadReply)
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
        self._channel.send(self.node, BACKWARD_STEP, request)

    def receive_backward(self) -> Arrays:
        """Wait for the bottom's gradient by parameter name."""
        reply = self._received(BackwardReply)
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
        self._channel.send(self.node, SPLIT_STEP, self.closing())

    def receive_closing(self) -> SplitReply:
        """Wait for the reply that should bring the node's bottom."""
        return self._received(SplitReply)

    @contextmanager
    def blamed(self, kind: str = SPLIT_STEP) -> Iterator[None]:
        """Turn what does not fit the model or the protocol into a :class:`NodeFailed` of this node.

        Args:
            kind: Type of the message it came with.

        Raises:
            NodeFailed: Instead.
        """
        try:
            yield
        except (WireError, UnfitBatchError, NoLabelsError) as error:
            raise NodeFailed(self._channel.partition(self.node), kind, str(error)) from error

    def check_finite(self, what: str, tensor: Tensor, *, kind: str = SPLIT_STEP) -> None:
        """Refuse values that are not finite; they are a :class:`NodeDiverged`."""
        if not finite(tensor):
            where = f"the {what} of round {self._round}, step {self.step} is not finite"
            cause = f"{where}; lower protocol.learning_rate"
            raise NodeDiverged(self._channel.partition(self.node), kind, cause)

    def _request(self, request: SplitRequest) -> None:
        self.step = request.step
        self._channel.send(self.node, SPLIT_STEP, request)

    def _received(self, kind: type[Reply]) -> Reply:
        """Return the channel's next reply, of the class that answers what was asked."""
        reply = self._channel.receive(self.node)
        if not isinstance(reply, kind):
            raise TypeError(f"{type(reply).__name__} came where {kind.__name__} was asked for")
        return reply

    def _next(self, request: SplitRequest) -> None:
        if request.step < self.steps:
            self._request(request)
        elif self._rows != self.examples:
            cause = f"sent {self._rows} samples in round {self._round}, announced {self.examples}"
            raise self._failure(cause)
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
        if not np.issubdtype(smashed.dtype, np.floating):
            raise WireError(f"smashed data are {smashed.dtype}, no floating-point numbers")
        rows, labels = (
            _whole(what, numbers, len(smashed))
            for what, numbers in (("rows", reply.rows), ("labels", reply.labels))
        )
        if labels is None and self._labels is not None and rows is not None:
            if not 0 <= int(rows.min()) <= int(rows.max()) < len(self._labels):
                raise WireError(f"rows {rows.tolist()} of a node with {len(self._labels)} samples")
            labels = self._labels[rows]
        self._rows += len(smashed)
        origin = Origin(
            node=self._channel.partition(self.node),
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

    def _failure(self, cause: str, *, kind: str = SPLIT_STEP) -> NodeFailed:
        return self._channel.failure(self.node, kind, cause)


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
