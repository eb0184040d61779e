"""Vanilla split learning: nodes in turn, each continuing from the bottom of the one before.

The server holds the top; a node's round of n batches costs n + 1 exchanges. The bottom passes from
node to node through the server, sealed (the server keeps only its size) or relayed in the clear.

Source: Gupta, Raskar. "Distributed learning of deep neural network over multiple agents", Journal
of Network and Computer Applications 2018, https://arxiv.org/abs/1810.06060.
"""

from collections.abc import Sequence

from strategies.post import Post
from strategies.setup import Built, Setup
from strategies.split_loop import Lane
from strategies.split_strategy import SplitStrategy
from strategies.trainers import TopTrainer


class VanillaSplit(SplitStrategy):
    """A Flower strategy that trains a model split between a server and nodes in turn."""

    part: TopTrainer

    def train_round(self, lanes: Sequence[Lane], post: Post) -> None:
        """Train with every node in turn, up to the last one's closing message.

        Args:
            lanes: One per sampled node.
            post: Through which they send.
        """
        for lane in lanes:
            lane.open(self.bottom)
            while not lane.done:
                batch = lane.receive()
                with lane.blamed():
                    gradient = self.part.train(*batch.labelled)
                lane.answer(gradient)
            if lane is not lanes[-1]:
                self.close_round([self.closed(post.exchange(lane.closing()))])

    def closing_lanes(self) -> Sequence[Lane]:
        """Return the last lane: the others were closed when the next one opened."""
        return super().closing_lanes()[-1:]


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
    strategy = VanillaSplit(part, setup.arrays(parts.bottom), **setup.common())
    return Built(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)
