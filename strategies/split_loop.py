"""The step loop every split protocol shares: one node's lane through one round, batch after batch.

A protocol drives one lane or several and decides what happens between a smashed batch and its
gradient; a lane knows the messages, and refuses a reply that does not fit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Message
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from leakbed.events import Array, Arrays
from leakbed.grids.failures import NodeFailed
from leakbed.tensors import finite, view
from leakbed.wire.head_messages import BackwardReply, HeadReply, HeadRequest
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_STEP,
    SPLIT_STEP,
    SplitReply,
    SplitRequest,
)
from leakbed.wire.records import WireError
from strategies.post import Post
from strategies.trainers import UnfitBatchError

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
    """

    smashed: Shaped[Tensor, " batch *cut"]
    labels: Int[Tensor, " batch"] | None = None
    rows: Int[Tensor, " batch"] | None = None

    @property
    def labelled(self) -> tuple[Tensor, Int[Tensor, " batch"]]:
        """Smashed rows and labels, for a server that holds the loss.

        Raises:
            NoLabelsError: If there are none.
        """
        if self.labels is None:
            raise NoLabelsError(
                "a node sent no labels; give the strategy its labels (labels = 'server'), or let "
                "nodes share them (labels = 'shared')"
            )
        return self.smashed, self.labels


class Lane:
    """One node's way through one round: open, then receive and answer until it is done.

    Attributes:
        node: Flower's node id.
        step: The step whose batch is awaited or was received last.
        steps: How many batches the node has this round; known from its first reply on.
        examples: Samples in them.
    """

    def __init__(
        self,
        post: Post,
        node: int,
        *,
        round_: int,
        bottoms: str = "sealed",
        labels: Labels | None = None,
        smashed_shape: tuple[int, ...] | None = None,
    ) -> None:
        """Make the lane; nothing is sent yet.

        Args:
            post: Of this round.
            node: Flower's node id.
            round_: Server round, from 1.
            bottoms: ``"sealed"`` or ``"relayed"``.
            labels: Labels of each node's rows, where the server holds them.
            smashed_shape: Of one smashed row; None takes the first batch's.
        """
        self.node, self.step, self.steps, self.examples = node, 0, 0, 0
        self._post, self._round, self._bottoms = post, round_, bottoms
        self._labels = None if labels is None else labels.get(node)
        self._shape = smashed_shape
        self._rows = 0  # samples so far
        self._closing: SplitRequest | None = None

    @property
    def round(self) -> int:
        """Server round, from 1."""
        return self._round

    @property
    def done(self) -> bool:
        """Whether every batch was answered, and only the closing message is left."""
        return self._closing is not None

    def open(self, bottom: Arrays | None) -> None:
        """Ask for the first batch.

        Args:
            bottom: What the node starts from; None where it keeps its own.
        """
        self._request(SplitRequest(round=self._round, step=0, bottom=bottom, bottoms=self._bottoms))

    def receive(self) -> Batch:
        """Wait for the next smashed batch; one that does not fit is a :class:`NodeFailed`.

        Returns:
            The batch.
        """
        message = self._post.receive(self.node)
        with self.blamed(SPLIT_STEP):
            return self._batch(SplitReply.of(message))

    def answer(self, gradient: Float[Tensor, " batch *cut"]) -> None:
        """Send the gradient of the batch received last, and ask for the next batch.

        After the last batch nothing is sent: its gradient travels in :meth:`closing`.

        Args:
            gradient: dL/d(smashed), on the CPU. One that is not finite is a :class:`NodeFailed`.
        """
        self.check_finite("cut gradient", gradient)
        self._next(SplitRequest(round=self._round, step=self.step + 1, gradient=gradient.numpy()))

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
        self._post.send(self.node, HEAD_STEP, request.records())

    def receive_upper(self) -> Shaped[Tensor, "..."]:
        """Wait for the gradient of the features; not a finite one is a :class:`NodeFailed`."""
        message = self._post.receive(self.node)
        with self.blamed(HEAD_STEP):
            reply = HeadReply.of(message)
            self._check_step(reply.step)
            gradient = view(reply.gradient)
        self.check_finite("gradient of the features", gradient, kind=HEAD_STEP)
        return gradient

    def send_backward(self, gradient: Float[Tensor, " batch *cut"]) -> None:
        """Send a cut gradient and ask for the bottom's own gradient instead of a step."""
        self.check_finite("cut gradient", gradient)
        request = SplitRequest(round=self._round, step=self.step, gradient=gradient.numpy())
        self._post.send(self.node, BACKWARD_STEP, request.records())

    def receive_backward(self) -> Arrays:
        """Wait for the bottom's gradient by parameter name."""
        message = self._post.receive(self.node)
        with self.blamed(BACKWARD_STEP):
            reply = BackwardReply.of(message)
            self._check_step(reply.step)
        return reply.gradient

    def closing(self) -> Message:
        """Return the message that ends the round at this node and asks for its bottom.

        Returns:
            Not yet sent.

        Raises:
            RuntimeError: If the lane is not done.
        """
        if self._closing is None:
            raise RuntimeError(f"node {self.node} has {self.steps - self.step} batches left")
        return Message(self._closing.records(), dst_node_id=self.node, message_type=SPLIT_STEP)

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
            raise NodeFailed(self._post.partition(self.node), kind, str(error)) from error

    def check_finite(self, what: str, tensor: Tensor, *, kind: str = SPLIT_STEP) -> None:
        """Refuse values that are not finite; they are a :class:`NodeFailed`."""
        if not finite(tensor):
            cause = f"the {what} of round {self._round}, step {self.step} is not finite"
            raise self._failure(f"{cause}; lower protocol.learning_rate", kind=kind)

    def _request(self, request: SplitRequest) -> None:
        self.step = request.step
        self._post.send(self.node, SPLIT_STEP, request.records())

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
        batch = Batch(smashed=view(smashed), labels=labels, rows=rows)
        self.check_finite("smashed batch", batch.smashed)
        return batch

    def _check_plan(self, reply: SplitReply) -> None:
        """Refuse a reply of another step, or with another plan, than the lane is at."""
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
        return self._post.failure(self.node, kind, cause)


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
