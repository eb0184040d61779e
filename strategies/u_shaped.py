"""U-shaped split learning: the node holds bottom, head and labels, the server only the middle.

A batch costs two exchanges: smashed data up (with the cut gradient of the batch before down), then
features down and their gradient up; a round of n batches costs 2n + 1. Bottom and head pass from
node to node through the server as one, sealed (the server keeps only its size) or in the clear.

Source: Vepakomma, Gupta, Swedish, Raskar. "Split learning for health: Distributed deep learning
without sharing raw patient data", 2018, https://arxiv.org/abs/1812.00564 (section 2.1).

It is vanilla split learning of the same network, bit for bit, but where the source leaves open:
- Momenta of the head stay at its node, like the bottom's; vanilla's top has one optimiser for all
  nodes. So with several nodes the two are equal for plain SGD only.
- Dropout in the head draws from the node's stream, in the middle from the server's; vanilla's top
  draws all of its dropout from the server's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from leakbed.wire.head_messages import HeadEvaluateReply, HeadEvaluateRequest
from leakbed.wire.messages import HEAD_EVALUATE, HEAD_STEP, SPLIT_EVALUATE
from leakbed.wire.records import WireError
from strategies.post import Post
from strategies.setup import Built, Setup
from strategies.split_loop import Batch, Lane
from strategies.split_strategy import SplitStrategy
from strategies.trainers import MiddleTrainer, UnfitBatchError


class UShaped(SplitStrategy):
    """A Flower strategy that trains the middle of a model whose both ends nodes hold in turn."""

    part: MiddleTrainer

    def train_round(self, lanes: Sequence[Lane], post: Post) -> None:
        """Train with every node in turn, up to the last one's closing message.

        Args:
            lanes: One per sampled node.
            post: Through which they send.
        """
        for lane in lanes:
            lane.open(self.bottom)
            while not lane.done:
                self._step(lane)
            if lane is not lanes[-1]:
                self.close_round([self.closed(post.exchange(lane.closing()))])

    def closing_lanes(self) -> Sequence[Lane]:
        """Return the last lane: the others were closed when the next one opened."""
        return super().closing_lanes()[-1:]

    def correct(self, round_: int, smashed: Sequence[Tensor]) -> int:
        """Return how many held-out rows the node's head predicts right; it sends counts only.

        Missing rows and counts that cannot be are a :class:`NodeFailed`.

        Args:
            round_: Server round, from 1.
            smashed: The held-out rows' smashed data, in test order, in chunks.

        Returns:
            Right ones.

        Raises:
            RuntimeError: If no round was trained.
        """
        if self._grid is None:
            raise RuntimeError("nothing was trained yet, so no node has a head to predict with")
        post, node = Post(self._grid, timeout=self._step_timeout), self._lanes[-1].node
        right = start = 0
        for chunk in smashed:
            stop = start + len(chunk)
            request = HeadEvaluateRequest(
                round=round_,
                start=start,
                stop=stop,
                features=self.part.features(chunk).numpy(),
                bottom=self.bottom,
                bottoms=self._bottoms,
            )
            post.send(node, HEAD_EVALUATE, request.records())
            right += _counted(post, node, rows=stop - start)
            start = stop
        _check_whole(post, node, rows=start, wanted=len(self._test_labels))
        return right

    def _step(self, lane: Lane) -> None:
        """Train the middle on a lane's next batch."""
        batch = lane.receive()
        with lane.blamed():
            features = self.part.forward(_unlabelled(batch))
        lane.send_features(features)
        upper = lane.receive_upper()
        with lane.blamed(HEAD_STEP):
            gradient = self.part.finish(upper)
        lane.answer(gradient)


def _counted(post: Post, node: int, *, rows: int) -> int:
    """Return how many rows a node counted as right, which cannot be more than there are."""
    message = post.receive(node)
    try:
        reply = HeadEvaluateReply.of(message)
    except WireError as error:
        raise post.failure(node, HEAD_EVALUATE, str(error)) from error
    if reply.examples != rows or not 0 <= reply.correct <= rows:
        cause = f"{reply.correct} of {reply.examples} test rows right, {rows} were asked for"
        raise post.failure(node, HEAD_EVALUATE, cause)
    return reply.correct


def _check_whole(post: Post, node: int, *, rows: int, wanted: int) -> None:
    """Refuse an evaluation of other rows than the held-out ones."""
    if rows != wanted:
        cause = f"{rows} smashed rows came for {wanted} held-out ones"
        raise post.failure(node, SPLIT_EVALUATE, cause)


def _unlabelled(batch: Batch) -> Tensor:
    """Return a smashed batch; labels that came with it should never have left the node."""
    if batch.labels is not None:
        raise UnfitBatchError("labels came with the smashed data of a node that should keep them")
    return batch.smashed


def build(setup: Setup) -> Built:
    """Return the strategy with the first weights of all three parts.

    Args:
        setup: Its architecture must have a cut and an upper cut.

    Returns:
        The strategy, the middle, and a way to read bottom and head for the answer key.
    """
    architecture, stream = setup.architecture, setup.init_stream
    part = setup.part(MiddleTrainer, architecture.middle(stream))
    held = setup.arrays(architecture.bottom(stream), architecture.head(stream))
    # Nodes count the right ones themselves: the server may know how many rows there are, no more.
    blank = torch.full_like(setup.test_labels, -1)
    strategy = UShaped(part, held, **setup.common() | {"labels": None, "test_labels": blank})
    return Built(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)
