"""SplitFed v2: one top for all nodes, which steps on their batches one by one in random order.

In every step all nodes send a smashed batch; when all are there, the top trains on them one after
the other, stepping after each, in an order drawn anew. At the round's end the fed-server averages
the bottoms, weighted by the samples each node trained on.

Source: Thapa, Mahawaga Arachchige, Camtepe, Sun. "SplitFed: When Federated Learning Meets Split
Learning", AAAI 2022, https://arxiv.org/abs/2004.12088, section "Variants of SplitFed".

What the paper leaves open, and departures:
- The order is part of the record: a gradient is sent as soon as the top has stepped on its batch,
  so a step's cut gradients stand in a trace in the order of processing. (The published code runs
  one node's whole round after the other instead, which is no interleaving at all.)
- A node with fewer batches than others sends its bottom after its last one and is missing from
  later steps; the order is then drawn among those that are left.
- Momenta are ``"kept"`` or start ``"fresh"`` in each round on both sides; the one top has one
  optimiser. Bottoms are ``"relayed"``, never ``"sealed"``, since the fed-server averages them.
- BatchNorm: the top normalises by one node's batch at a time and has one set of statistics; the
  bottoms' are averaged like weights, and counters rounded.
"""

from collections.abc import Sequence
from typing import Any

import torch

from leakbed.events import Arrays
from leakbed.seeds import derive, generator
from leakbed.wire.messages import SPLIT_STEP, SplitReply
from strategies.averaging import average_bottom, refuse_sealed
from strategies.post import Post
from strategies.setup import Built, Setup
from strategies.split_loop import Lane
from strategies.split_strategy import SplitStrategy
from strategies.trainers import TopTrainer


class SplitFedV2(SplitStrategy):
    """A Flower strategy whose one top takes every node's batch in an order drawn by lot."""

    part: TopTrainer

    def __init__(
        self,
        part: TopTrainer,
        bottom: Arrays,
        *,
        stream: int,
        **common: Any,  # noqa: ANN401  the keywords of SplitStrategy
    ) -> None:
        """Make the strategy.

        Args:
            part: The top with its optimiser.
            bottom: The first weights of the node's part.
            stream: Where the orders are drawn from.
            **common: As every split strategy takes them.
        """
        super().__init__(part, bottom, **common)
        refuse_sealed(self._bottoms)
        self._stream = stream
        self._last: list[Lane] = []
        self._early: dict[int, SplitReply] = {}

    def train_round(self, lanes: Sequence[Lane], post: Post) -> None:
        """Train step after step, in each on all nodes' batches in random order.

        Args:
            lanes: One per sampled node.
            post: Through which they send.
        """
        for lane in lanes:
            lane.open(self.bottom)
        running, ended = list(lanes), list[Lane]()
        while running:
            batches = {lane.node: lane.receive() for lane in running}
            last = all(lane.step + 1 == lane.steps for lane in running)
            self._last = self._shuffled(running)
            for lane in self._last:
                with lane.blamed():
                    gradient = self.part.train(*batches[lane.node].labelled)
                lane.answer(gradient)
                if lane.done and not last:  # its last gradient goes out in order too
                    post.send(lane.node, SPLIT_STEP, lane.closing().content)
                    ended.append(lane)
            running = [lane for lane in running if not lane.done]
        self._early = {lane.node: self.closed(post.receive(lane.node)) for lane in ended}

    def closing_lanes(self) -> Sequence[Lane]:
        """Return the lanes of the last step in the order in which the top took their batches."""
        return self._last

    def close_round(self, closings: Sequence[SplitReply]) -> None:
        """Average the bottoms.

        Args:
            closings: Of the nodes that were there to the last step, each with a bottom.
        """
        late = zip(self._last, closings, strict=True)
        found = self._early | {lane.node: closing for lane, closing in late}
        ordered = [found[lane.node] for lane in self._lanes]
        self.bottom = average_bottom(self._lanes, ordered, like=self.bottom)

    def _shuffled(self, lanes: Sequence[Lane]) -> list[Lane]:
        """Return a step's lanes in the order its own draw puts them."""
        stream = derive(self._stream, f"order/{lanes[0].round}/{lanes[0].step}")
        order = torch.randperm(len(lanes), generator=generator(stream))
        return [lanes[place] for place in order.tolist()]


def build(setup: Setup) -> Built:
    """Return the strategy with the first weights of both parts.

    Args:
        setup: Its architecture must have a cut.

    Returns:
        The strategy, the top, and a way to read the bottom for the answer key.
    """
    parts = setup.architecture.parts(setup.init_stream)
    top = parts.top.to(setup.device)
    part = TopTrainer(
        top,
        setup.optimiser(top.parameters()),
        defences=setup.defences,
        defence_stream=setup.defence_stream,
    )
    bottom = setup.arrays(parts.bottom)
    strategy = SplitFedV2(part, bottom, stream=setup.stream, **setup.common())
    return Built(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)
