"""What every split protocol is to Flower: a strategy that drives steps inside ``configure_train``.

Flower calls ``configure_train``, sends what it returns, and hands the replies to
``aggregate_train``. Here the first drives all but the closing messages of a round, and the second
takes the bottoms they bring back. ``arrays`` in ``start`` and in its result hold the server's part,
which is all it may read.
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from jaxtyping import Int
from torch import Tensor

from leakbed.events import Arrays
from leakbed.grids.failures import NodeFailed
from leakbed.tensors import finite, view
from leakbed.wire.alarms import Alarms
from leakbed.wire.messages import SPLIT_EVALUATE, EvaluateRequest, SplitReply
from leakbed.wire.records import WireError
from strategies.post import Post, checked, partition, refuse_stopped
from strategies.split_loop import Labels, Lane
from strategies.trainers import ServerPart, UnfitBatchError

_EVALUATION_ROWS = 256  # rows of smashed data in one evaluation message


class SplitStrategy(Strategy):
    """A Flower strategy that trains a model split between a server and nodes.

    Attributes:
        bottom: The bottom as it stands between rounds; opaque to the server while sealed.
        part: The server's part of the model with its optimiser.
        alarms: What each node's detectors found, by partition; for the harness alone.
    """

    def __init__(
        self,
        part: ServerPart,
        bottom: Arrays,
        *,
        bottoms: str = "sealed",
        labels: Labels | None = None,
        fraction_train: float = 1.0,
        test_labels: Int[Tensor, " test"] | None = None,
        evaluate_rounds: Collection[int] = (),
        step_timeout: float | None = None,
        smashed_shape: tuple[int, ...] | None = None,
        optimiser_state: str = "kept",
    ) -> None:
        """Make the strategy.

        Args:
            part: The server's part with its optimiser.
            bottom: The first weights of the node's part.
            bottoms: Who may read bottoms on their way: ``"sealed"`` (nobody) or ``"relayed"``.
            labels: Labels of each node's rows by Flower node id, where the server holds them; None
                where nodes share them or keep them.
            fraction_train: Share of the nodes that train in a round; at least one does.
            test_labels: Labels of the held-out rows, by which utility is measured.
            evaluate_rounds: The rounds that end with an evaluation.
            step_timeout: Seconds to wait for each reply; ``start`` does not pass its own on.
            smashed_shape: Of one smashed row; None takes each round's first for granted.
            optimiser_state: ``"kept"`` from round to round at the server, or ``"fresh"`` in each.
        """
        self.bottom = bottom
        self.part = part
        self._bottoms = bottoms
        self._labels = labels
        self._fraction_train = fraction_train
        self._test_labels = torch.empty(0, dtype=torch.long) if test_labels is None else test_labels
        self._evaluate_rounds = frozenset(evaluate_rounds)
        self._step_timeout = step_timeout
        self._shape = smashed_shape
        self._optimiser_state = optimiser_state
        self.alarms: dict[int, Alarms] = {}
        self._grid: Grid | None = None
        self._lanes: list[Lane] = []
        self._sent: list[Message] = []

    @abstractmethod
    def train_round(self, lanes: Sequence[Lane], post: Post) -> None:
        """Drive every lane until it is done.

        Args:
            lanes: One per sampled node, by partition, none of them open yet.
            post: Through which they send.
        """

    def close_round(self, closings: Sequence[SplitReply]) -> None:
        """Take over what the closing messages of :meth:`closing_lanes` brought.

        Args:
            closings: Each with a bottom.
        """
        (closing,) = closings
        self.bottom = {name: value.copy() for name, value in (closing.bottom or {}).items()}

    def closing_lanes(self) -> Sequence[Lane]:
        """Return the lanes whose closing messages are still to be sent."""
        return self._lanes

    def summary(self) -> None:
        """Log nothing: the settings stand in the experiment's file."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Train with every sampled node up to the closing messages.

        Args:
            server_round: From 1.
            arrays: The server's part.
            config: Unused; a split message carries its own.
            grid: Where the nodes are.

        Returns:
            The closing messages.
        """
        del config
        self.part.load(arrays)
        if self._optimiser_state == "fresh":
            self.part.forget()
        self._grid = grid
        post = Post(grid, timeout=self._step_timeout)
        self._lanes = [self._lane(post, node, server_round) for node in self._sampled(grid)]
        self.train_round(self._lanes, post)
        self._sent = [lane.closing() for lane in self.closing_lanes()]
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the bottoms that the closing messages brought, and end the round.

        Args:
            server_round: From 1.
            replies: The answers to the closing messages.

        Returns:
            The server's part, and how many samples it was trained on.
        """
        del server_round
        found = checked(list(replies), self._sent, partition_of=self._partition)
        self.close_round([self.closed(reply) for reply in found])
        examples = sum(lane.examples for lane in self._lanes)
        return self.part.arrays(), MetricRecord({"num-examples": examples})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the last node to push the held-out rows through the bottom.

        Args:
            server_round: From 1.
            arrays: Unused: the server's part is at hand.
            config: Unused.
            grid: Unused.

        Returns:
            One message per chunk of rows; none where the round ends without an evaluation.
        """
        del arrays, config, grid
        rows = len(self._test_labels) if server_round in self._evaluate_rounds else 0
        starts = range(0, rows, _EVALUATION_ROWS)
        chunks = [(start, min(start + _EVALUATION_ROWS, rows)) for start in starts]
        self._sent = [m for chunk in chunks for m in self.evaluations(server_round, *chunk)]
        return self._sent

    def evaluations(self, round_: int, start: int, stop: int) -> Sequence[Message]:
        """Return the messages that evaluate some held-out rows, in the order of their replies.

        Args:
            round_: Server round, from 1.
            start: First test row.
            stop: One past the last test row.

        Returns:
            One, to the last node.
        """
        return [self._evaluation(self._lanes[-1], self.bottom, (round_, start, stop))]

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Score the predictions on the held-out rows.

        Args:
            server_round: From 1.
            replies: Smashed held-out rows.

        Returns:
            ``accuracy`` in [0, 1] over ``num-examples`` rows, or None where nothing was evaluated.
        """
        if not self._sent:
            return None
        found = checked(list(replies), self._sent, partition_of=self._partition)
        smashed = [self._smashed(*pair) for pair in zip(found, self._sent, strict=True)]
        correct = self.correct(server_round, smashed)
        rows = len(self._test_labels)
        return MetricRecord({"accuracy": correct / rows, "num-examples": rows})

    def correct(self, round_: int, smashed: Sequence[Tensor]) -> int:
        """Return how many held-out rows are predicted right.

        Args:
            round_: Server round, from 1.
            smashed: The held-out rows' smashed data, in test order, in chunks.

        Returns:
            Right ones.

        Raises:
            TypeError: If the server's part cannot predict; such a protocol overrides this.
        """
        del round_
        predict = getattr(self.part, "predict", None)
        if predict is None:
            raise TypeError(f"{type(self).__name__} must say how it predicts")
        predicted = torch.cat([predict(each) for each in smashed])
        return int((predicted == self._test_labels).sum())

    def closed(self, message: Message) -> SplitReply:
        """Return the reply that closes a round at a node.

        Args:
            message: The answer to a closing message.

        Returns:
            The reply.

        Raises:
            NodeFailed: If it brings no bottom, or one that may be read by others than it should.
        """
        node, kind = self._partition(message.metadata.src_node_id), message.metadata.message_type
        refuse_stopped(message, node)
        with self._blamed(message):
            reply = SplitReply.of(message)
        if reply.bottom is None or reply.bottoms != self._bottoms:
            raise NodeFailed(node, kind, f"no {self._bottoms} bottom in the closing reply")
        self.alarms |= {node: reply.alarms} if reply.alarms else {}
        return reply

    @contextmanager
    def _blamed(self, message: Message) -> Iterator[None]:
        """Turn what does not fit the model or the protocol into a failure of its sender."""
        about = message.metadata
        try:
            yield
        except (WireError, UnfitBatchError) as error:
            node = self._partition(about.src_node_id)
            raise NodeFailed(node, about.message_type, str(error)) from error

    def _partition(self, node: int) -> int:
        return node if self._grid is None else partition(self._grid, node)

    def _lane(self, post: Post, node: int, round_: int) -> Lane:
        return Lane(
            post,
            node,
            round_=round_,
            bottoms=self._bottoms,
            labels=self._labels,
            smashed_shape=self._shape,
        )

    def _sampled(self, grid: Grid) -> list[int]:
        """Return this round's nodes, in the grid's order."""
        count = max(1, int(len(list(grid.get_node_ids())) * self._fraction_train))
        sampled, everyone = sample_nodes(grid, count, count)
        return [node for node in everyone if node in set(sampled)]

    def _evaluation(self, lane: Lane, bottom: Arrays, place: tuple[int, int, int]) -> Message:
        round_, start, stop = place
        request = EvaluateRequest(
            round=round_, start=start, stop=stop, bottom=bottom, bottoms=self._bottoms
        )
        return Message(request.records(), dst_node_id=lane.node, message_type=SPLIT_EVALUATE)

    def _smashed(self, reply: Message, sent: Message) -> Tensor:
        """Return the smashed rows that answer an evaluation message, or refuse them."""
        with self._blamed(reply):
            asked, smashed = EvaluateRequest.of(sent), SplitReply.of(reply).smashed
            if smashed is None:
                raise WireError("no smashed data in the reply")
            seen, rows = view(smashed), asked.stop - asked.start
            if seen.ndim < 1 or len(seen) != rows or not finite(seen):
                raise WireError(
                    f"smashed data of shape {smashed.shape}; expected {rows} rows of finite numbers"
                )
            self.part.received(seen)
        return seen
