"""Vanilla split learning: nodes in turn, each continuing from the bottom of the one before.

The server holds the top; a node's round of n batches costs n + 1 exchanges. The bottom passes from
node to node through the server, sealed (the server keeps only its size) or relayed in the clear.

Source: Gupta, Raskar. "Distributed learning of deep neural network over multiple agents", Journal
of Network and Computer Applications 2018, https://arxiv.org/abs/1810.06060.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import sample_nodes
from jaxtyping import Int
from torch import Tensor

from leakbed.events import Arrays
from leakbed.grids.failures import NodeFailed
from leakbed.wire.messages import SPLIT_EVALUATE, EvaluateRequest, SplitReply
from strategies.setup import Built, Setup
from strategies.split_loop import TopTrainer, checked, exchange, partition, take_turn

_EVALUATION_ROWS = 256  # rows of smashed data in one evaluation message


class VanillaSplit(Strategy):
    """A Flower strategy that trains a model split between a server and nodes in turn.

    ``arrays`` in ``start`` and in its result hold the top, which is all the server may read.

    Attributes:
        bottom: The bottom as it stands between rounds; opaque to the server while sealed.
    """

    def __init__(
        self,
        trainer: TopTrainer,
        bottom: Arrays,
        *,
        bottoms: str = "sealed",
        labels: Mapping[int, Int[Tensor, " rows"]] | None = None,
        fraction_train: float = 1.0,
        test_labels: Int[Tensor, " test"] | None = None,
        evaluate_rounds: Collection[int] = (),
        step_timeout: float | None = None,
    ) -> None:
        """Make the strategy.

        Args:
            trainer: The top with its optimiser.
            bottom: The bottom's first weights.
            bottoms: Who may read bottoms on their way: ``"sealed"`` (nobody) or ``"relayed"``.
            labels: Labels of each node's rows by Flower node id, where the server holds them; None
                where nodes share them.
            fraction_train: Share of the nodes that train in a round; at least one does.
            test_labels: Labels of the held-out rows, by which utility is measured.
            evaluate_rounds: The rounds that end with an evaluation.
            step_timeout: Seconds to wait for each reply; ``start`` does not pass its own on.
        """
        self.bottom = bottom
        self._trainer = trainer
        self._bottoms = bottoms
        self._labels = labels
        self._fraction_train = fraction_train
        self._test_labels = torch.empty(0, dtype=torch.long) if test_labels is None else test_labels
        self._evaluate_rounds = frozenset(evaluate_rounds)
        self._step_timeout = step_timeout
        self._last_node = self._last_partition = 0
        self._examples = 0
        self._sent: list[Message] = []

    def summary(self) -> None:
        """Log nothing: the settings stand in the experiment's file."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Train with every sampled node in turn, up to the last one's closing message.

        Args:
            server_round: From 1.
            arrays: The top.
            config: Unused; a split message carries its own.
            grid: Where the nodes are.

        Returns:
            The last node's closing message.
        """
        del config
        self._trainer.load(arrays)
        self._examples = 0
        nodes = self._sampled(grid)
        for place, node in enumerate(nodes):
            turn = take_turn(
                grid,
                node,
                self._trainer,
                round_=server_round,
                bottom=self.bottom,
                bottoms=self._bottoms,
                labels=self._labels,
                timeout=self._step_timeout,
            )
            self._examples += turn.examples
            if place < len(nodes) - 1:
                self._take_bottom(exchange(grid, turn.closing, timeout=self._step_timeout))
        self._last_node = nodes[-1]
        self._last_partition = partition(grid, nodes[-1])
        self._sent = [turn.closing]
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take the last node's bottom and close the round.

        Args:
            server_round: From 1.
            replies: The answer to the closing message.

        Returns:
            The top, and how many samples it was trained on.
        """
        del server_round
        self._take_bottom(checked(list(replies), self._sent)[0])
        return self._trainer.arrays(), MetricRecord({"num-examples": self._examples})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the last node to push the held-out rows through the bottom.

        Args:
            server_round: From 1.
            arrays: Unused: the top is at hand.
            config: Unused.
            grid: Unused.

        Returns:
            One message per chunk of rows; none where the round ends without an evaluation.
        """
        del arrays, config, grid
        rows = len(self._test_labels) if server_round in self._evaluate_rounds else 0
        self._sent = []
        for start in range(0, rows, _EVALUATION_ROWS):
            request = EvaluateRequest(
                round=server_round,
                start=start,
                stop=min(start + _EVALUATION_ROWS, rows),
                bottom=self.bottom,
                bottoms=self._bottoms,
            )
            message = Message(
                request.records(), dst_node_id=self._last_node, message_type=SPLIT_EVALUATE
            )
            self._sent.append(message)
        return self._sent

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Score the top's predictions on the held-out rows.

        Args:
            server_round: From 1.
            replies: Smashed held-out rows.

        Returns:
            ``accuracy`` in [0, 1] over ``num-examples`` rows, or None where nothing was evaluated.

        Raises:
            NodeFailed: If a reply holds no smashed data.
        """
        del server_round
        if not self._sent:
            return None
        predicted = []
        for reply in checked(list(replies), self._sent):
            smashed = SplitReply.of(reply).smashed
            if smashed is None:
                raise NodeFailed(
                    self._last_partition, SPLIT_EVALUATE, "no smashed data in the reply"
                )
            predicted.append(self._trainer.predict(smashed))
        hits = torch.cat(predicted) == self._test_labels
        return MetricRecord({"accuracy": hits.float().mean().item(), "num-examples": len(hits)})

    def _sampled(self, grid: Grid) -> list[int]:
        """Return this round's nodes, in the grid's order."""
        count = max(1, int(len(list(grid.get_node_ids())) * self._fraction_train))
        sampled, everyone = sample_nodes(grid, count, count)
        return [node for node in everyone if node in set(sampled)]

    def _take_bottom(self, reply: Message) -> None:
        closing = SplitReply.of(reply)
        if closing.bottom is None or closing.bottoms != self._bottoms:
            node = reply.metadata.src_node_id
            cause = f"no {self._bottoms} bottom in the closing reply"
            raise NodeFailed(node, reply.metadata.message_type, cause)
        self.bottom = closing.bottom


def build(setup: Setup) -> Built:
    """Return the strategy with the first weights of both parts.

    Args:
        setup: Its architecture must have a cut.

    Returns:
        The strategy, the top, and a way to read the bottom for the answer key.
    """
    parts = setup.architecture.parts(setup.init_stream)
    top = parts.top.to(setup.device)
    trainer = TopTrainer(
        top,
        setup.optimiser(top.parameters()),
        defences=setup.defences,
        defence_stream=setup.defence_stream,
    )
    strategy = VanillaSplit(
        trainer,
        {name: value.numpy() for name, value in parts.bottom.state_dict().items()},
        bottoms=setup.bottoms,
        labels=setup.labels,
        fraction_train=setup.fraction,
        test_labels=setup.test_labels,
        evaluate_rounds=setup.evaluate_rounds,
        step_timeout=setup.timeout,
    )
    return Built(strategy=strategy, arrays=trainer.arrays(), bottom=lambda: strategy.bottom)
