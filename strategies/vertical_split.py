"""Vertical split learning: each party has a strip of every image, the server labels and the top.

All parties step together: each sends the smashed data of the same rows of its strip, named by their
ids; the server merges them, trains the top, and answers each with its share of the gradient. A
party keeps its bottom: its first weights come sealed with the first message, and the last message
of a round brings them to the server sealed, for the evaluation alone. No bottom reaches another
party, and nothing averages them: BatchNorm in a bottom knows its own strip only.

Sources: Ceballos, Sharma, Mugica, Singh, Roman, Vepakomma, Raskar. "SplitNN-driven Vertical
Partitioning", 2020, https://arxiv.org/abs/2008.04137 (the merges). Romanini et al. "PyVertical: A
Vertical Federated Learning Framework for Multi-headed SplitNN", 2021,
https://arxiv.org/abs/2104.00489 (digits cut into strips, rows aligned by id).

Departures:
- The parties' common ids are known from the start, as after their private set intersection.
- The top is that of the uncut network, so parts that do not merge to what it reads are refused.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from leakbed.events import Arrays
from leakbed.grids.failures import NodeFailed
from leakbed.seeds import derive
from leakbed.wire.messages import SPLIT_EVALUATE, SPLIT_STEP, SplitReply
from strategies.merging import MERGES, party_architectures
from strategies.post import Post
from strategies.setup import Built, Setup
from strategies.split_loop import Batch, Lane
from strategies.split_strategy import SplitStrategy
from strategies.trainers import TopTrainer, UnfitBatchError

_SHOWN = 8  # ids of a batch in an error


class VerticalSplit(SplitStrategy):
    """A Flower strategy that trains one top over a bottom at each party.

    Attributes:
        weights: Each party's bottom at the last round's end, by partition; the server cannot read
            them.
    """

    part: TopTrainer

    def __init__(
        self,
        part: TopTrainer,
        weights: Sequence[Arrays],
        *,
        shapes: Sequence[tuple[int, ...]],
        merge: str = "concat",
        **settings: Any,  # noqa: ANN401  the keywords of SplitStrategy
    ) -> None:
        """Make the strategy.

        Args:
            part: The top with its optimiser.
            weights: The first of each party's bottom, by partition.
            shapes: Of one smashed row of each party.
            merge: A key of ``MERGES``.
            **settings: Of :class:`SplitStrategy`.

        Raises:
            ValueError: If not all parties would take part in a round.
        """
        if settings.get("fraction_train", 1.0) != 1.0:
            fraction = settings["fraction_train"]
            raise ValueError(f"a fraction of {fraction} of the parties cannot train; all must")
        super().__init__(part, {}, **settings)
        self.weights = list(weights)
        self._shapes = list(shapes)
        self._merge = MERGES[merge]
        self._opened = False

    def train_round(self, lanes: Sequence[Lane], post: Post) -> None:
        """Step with all parties until their common rows are done.

        Args:
            lanes: One per party, by partition.
            post: Through which they send.
        """
        del post
        self._check_everyone(lanes)
        for lane, bottom in zip(lanes, self.weights, strict=True):
            lane.open(None if self._opened else bottom)
        self._opened = True
        while not lanes[0].done:
            gradients = self._step(lanes, [lane.receive() for lane in lanes])
            for lane, gradient in zip(lanes, gradients, strict=True):
                lane.answer(gradient)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """End the round; a row counts once, however many parties hold a strip of it.

        Args:
            server_round: From 1.
            replies: The answers to the closing messages.

        Returns:
            The top, and how many samples it was trained on.
        """
        arrays, _ = super().aggregate_train(server_round, replies)
        return arrays, MetricRecord({"num-examples": self._lanes[0].examples})

    def close_round(self, closings: Sequence[SplitReply]) -> None:
        """Take over every party's bottom, sealed.

        Args:
            closings: One per party, by partition.
        """
        self.weights = [dict(closing.bottom or {}) for closing in closings]

    def evaluations(self, round_: int, start: int, stop: int) -> Sequence[Message]:
        """Return the messages that evaluate some held-out rows, one to each party.

        Args:
            round_: Server round, from 1.
            start: First test row.
            stop: One past the last test row.

        Returns:
            By partition.
        """
        return [
            self._evaluation(lane, bottom, (round_, start, stop))
            for lane, bottom in zip(self._lanes, self.weights, strict=True)
        ]

    def correct(self, round_: int, smashed: Sequence[Tensor]) -> int:
        """Return how many held-out rows are predicted right.

        Args:
            round_: Server round, from 1.
            smashed: Every party's smashed data of the first chunk of rows, then of the next.

        Returns:
            Right ones.
        """
        parties = len(self.weights)
        chunks = [smashed[first : first + parties] for first in range(0, len(smashed), parties)]
        for chunk in chunks:
            for lane, part, shape in zip(self._lanes, chunk, self._shapes, strict=True):
                with lane.blamed(SPLIT_EVALUATE):
                    _check_shape(part, (len(chunk[0]), *shape))
        return super().correct(round_, [self._merge(chunk) for chunk in chunks])

    def _step(self, lanes: Sequence[Lane], batches: Sequence[Batch]) -> list[Tensor]:
        """Train on one batch of aligned rows; return each party's gradient."""
        _, labels = batches[0].labelled
        received = []
        for lane, batch, shape in zip(lanes, batches, self._shapes, strict=True):
            with lane.blamed():
                _check_aligned(lanes[0], batches[0], lane=lane, batch=batch)
                _check_shape(batch.smashed, (len(labels), *shape))
                received.append(self.part.received(batch.smashed))
        return self.part.train_merged(received, labels, merge=self._merge)

    def _check_everyone(self, lanes: Sequence[Lane]) -> None:
        """Refuse a round that a party is missing from."""
        if len(lanes) != len(self.weights):
            there = {self._partition(lane.node) for lane in lanes}
            missing = next((p for p in range(len(self.weights)) if p not in there), len(lanes))
            cause = f"{len(lanes)} nodes are there for {len(self.weights)} parties; all must train"
            raise NodeFailed(missing, SPLIT_STEP, cause)


def _check_aligned(first: Lane, wanted: Batch, *, lane: Lane, batch: Batch) -> None:
    """Refuse a party whose batch is of other rows, or of another plan, than the first party's."""
    if batch.rows is None or wanted.rows is None:
        raise UnfitBatchError(f"no row ids at step {lane.step}; parties are aligned by them")
    if (lane.steps, lane.examples) != (first.steps, first.examples):
        raise UnfitBatchError(
            f"{lane.examples} samples in {lane.steps} steps, while the first party has "
            f"{first.examples} in {first.steps}: parties must hold the same rows"
        )
    if not torch.equal(batch.rows, wanted.rows):
        raise UnfitBatchError(
            f"rows {_few(batch.rows)} at step {lane.step}, while the first party sent "
            f"{_few(wanted.rows)}: parties must go through the same ids in the same order"
        )


def _few(rows: Tensor) -> str:
    """Return the first ids of a batch, for an error."""
    return f"[{', '.join(map(str, rows[:_SHOWN].tolist()))}{', ...' * (len(rows) > _SHOWN)}]"


def _check_shape(smashed: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(smashed.shape) != wanted:
        raise UnfitBatchError(f"smashed data of shape {tuple(smashed.shape)}, expected {wanted}")


def build(setup: Setup) -> Built:
    """Return the strategy with the first weights of the top and of every party's bottom.

    Args:
        setup: Its architecture is for whole images and must have a cut.

    Returns:
        The strategy, the top, and, where there is one party, a way to read its bottom.
    """
    merge = setup.options.get("merge", "concat")
    parties = party_architectures(setup.architecture, nodes=setup.nodes, merge=merge)
    parts = setup.architecture.parts(setup.init_stream)
    weights = [setup.arrays(parts.bottom)]
    if setup.nodes > 1:
        streams = [derive(setup.init_stream, f"party/{node}") for node in range(setup.nodes)]
        weights = [
            setup.arrays(party.bottom(own)) for party, own in zip(parties, streams, strict=True)
        ]
    part = setup.part(TopTrainer, parts.top)
    settings = setup.common() | {"smashed_shape": None}
    shapes = [party.smashed_shape for party in parties]
    strategy = VerticalSplit(part, weights, shapes=shapes, merge=merge, **settings)
    sole = (lambda: strategy.weights[0]) if setup.nodes == 1 else None
    return Built(strategy=strategy, arrays=part.arrays(), bottom=sole)
