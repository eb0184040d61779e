"""The step loop every split protocol shares: one node, one round, batch after batch.

Also the top in training, and the exchange that insists on a reply. Protocols differ in which nodes
they drive and what travels; see the file of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid
from jaxtyping import Float, Int
from torch import Tensor, nn

from leakbed.contracts import Defense, DefenseState
from leakbed.events import Array, Arrays
from leakbed.grids.failures import NodeFailed
from leakbed.wire.messages import SPLIT_STEP, SplitReply, SplitRequest


class NoLabelsError(RuntimeError):
    """A smashed batch came without labels, and the server has none for it either."""


class TopTrainer:
    """The server's part of the model, its optimiser and its loss."""

    def __init__(
        self,
        top: nn.Module,
        optimiser: torch.optim.Optimizer,
        *,
        defences: tuple[Defense, ...] = (),
        defence_stream: int = 0,
    ) -> None:
        """Take the top.

        Args:
            top: Trained in place.
            optimiser: Over the top's parameters.
            defences: Applied, in order, to every cut gradient before it is sent.
            defence_stream: The secret seed of their noise.
        """
        self.top = top
        self._optimiser = optimiser
        self._defences = [(d, d.begin(defence_stream + i)) for i, d in enumerate(defences)]

    @property
    def device(self) -> torch.device:
        """Where the top computes."""
        return next(self.top.parameters()).device

    def step(self, smashed: Array, labels: Int[Tensor, " batch"]) -> Array:
        """Train on one smashed batch.

        Args:
            smashed: As received.
            labels: Its labels.

        Returns:
            dL/d(smashed), with L the mean cross-entropy of the batch, as it may be sent.
        """
        self.top.train()
        received = torch.from_numpy(smashed).to(self.device).requires_grad_()
        loss = nn.functional.cross_entropy(self.top(received), labels.to(self.device))
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        gradient = received.grad if received.grad is not None else torch.zeros_like(received)
        return self._protected(gradient.cpu()).numpy()

    def predict(self, smashed: Array) -> Int[Tensor, " batch"]:
        """Return the predicted label of each smashed row."""
        self.top.eval()
        with torch.no_grad():
            logits: Tensor = self.top(torch.from_numpy(smashed).to(self.device))
        return logits.argmax(1).cpu()

    def load(self, arrays: ArrayRecord) -> None:
        """Take weights and buffers from a Flower record."""
        self.top.load_state_dict(arrays.to_torch_state_dict())

    def arrays(self) -> ArrayRecord:
        """Return the weights and buffers as a Flower record."""
        state = {name: value.detach().cpu() for name, value in self.top.state_dict().items()}
        return ArrayRecord(state)

    def _protected(self, gradient: Float[Tensor, " batch *cut"]) -> Float[Tensor, " batch *cut"]:
        states: list[tuple[Defense, DefenseState]] = []
        for defence, state in self._defences:
            after, gradient = defence.protect_cut_gradient(state, gradient)
            states.append((defence, after.next()))
        self._defences = states
        return gradient


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One node's turn in a round, up to its closing message.

    Attributes:
        closing: The message that brings the last gradient and asks for the bottom.
        examples: Samples the node trained on.
    """

    closing: Message
    examples: int


def take_turn(
    grid: Grid,
    node: int,
    trainer: TopTrainer,
    *,
    round_: int,
    bottom: Arrays,
    bottoms: str,
    labels: Mapping[int, Int[Tensor, " rows"]] | None,
    timeout: float | None,
) -> Turn:
    """Train with one node for as many batches as it has this round.

    Args:
        grid: Where the node is.
        node: Flower's node id.
        trainer: The server's part.
        round_: Server round, from 1.
        bottom: The bottom the node starts from.
        bottoms: ``"sealed"`` or ``"relayed"``.
        labels: Labels of each node's rows, where the server holds them; None where they are shared.
        timeout: Seconds to wait for each reply.

    Returns:
        The closing message, not yet sent.

    Raises:
        NodeFailed: If the node ends its turn too early, or the gradient is not finite.
    """
    request = SplitRequest(round=round_, step=0, bottom=bottom, bottoms=bottoms)
    step = 0
    while True:
        reply = SplitReply.of(exchange(grid, _message(node, request), timeout=timeout))
        if reply.smashed is None:
            raise NodeFailed(
                partition(grid, node), SPLIT_STEP, f"no batch {step} in round {round_}"
            )
        gradient = trainer.step(reply.smashed, _labels(reply, labels, node))
        if not np.isfinite(gradient).all():
            cause = f"the cut gradient of round {round_}, step {step} is not finite"
            raise NodeFailed(
                partition(grid, node), SPLIT_STEP, f"{cause}; lower protocol.learning_rate"
            )
        step += 1
        request = SplitRequest(round=round_, step=step, gradient=gradient)
        if step == reply.steps:
            return Turn(closing=_message(node, request), examples=reply.examples)


def partition(grid: Grid, node: int) -> int:
    """Return which partition a Flower node id is, where the grid knows, else the id itself."""
    roster: Mapping[int, int] = getattr(grid, "roster", {})
    return roster.get(node, node)


def exchange(grid: Grid, message: Message, *, timeout: float | None) -> Message:
    """Send one message and insist on its reply.

    Args:
        grid: Where the node is.
        message: To that node.
        timeout: Seconds to wait.

    Returns:
        The reply; a missing one, or an error, is a :class:`NodeFailed`.
    """
    return checked(list(grid.send_and_receive([message], timeout=timeout)), [message])[0]


def checked(replies: list[Message], sent: list[Message]) -> list[Message]:
    """Return one reply for each message sent, in that order.

    Args:
        replies: In any order.
        sent: The messages they should answer.

    Returns:
        The replies.

    Raises:
        NodeFailed: On an error reply, or a missing one.
    """
    answers = {reply.metadata.reply_to_message_id: reply for reply in replies}
    found = []
    for message in sent:
        about = message.metadata
        reply = answers.get(about.message_id)
        if reply is None:
            raise NodeFailed(about.dst_node_id, about.message_type, "no reply")
        if reply.has_error():
            reason = reply.error.reason or "no reason given"
            raise NodeFailed(about.dst_node_id, about.message_type, reason)
        found.append(reply)
    return found


def _message(node: int, request: SplitRequest) -> Message:
    records: RecordDict = request.records()
    return Message(records, dst_node_id=node, message_type=SPLIT_STEP)


def _labels(
    reply: SplitReply, labels: Mapping[int, Int[Tensor, " rows"]] | None, node: int
) -> Int[Tensor, " batch"]:
    if reply.labels is not None:
        return torch.from_numpy(reply.labels)
    if labels is None or node not in labels or reply.rows is None:
        raise NoLabelsError(
            f"node {node} sent no labels; give the strategy its labels (labels = 'server') or let "
            "nodes share them (labels = 'shared')"
        )
    return labels[node][torch.from_numpy(reply.rows)]
