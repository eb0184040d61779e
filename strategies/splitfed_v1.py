"""SplitFed v1: a copy of the top for every node, and both halves averaged as FedAvg does.

Each sampled node trains its bottom with a copy of the top of its own, on its own batches alone; at
the round's end the server averages the copies and the fed-server the bottoms, weighted by the
samples each node trained on. So a round is FedAvg's, however many local steps it has.

Source: Thapa, Mahawaga Arachchige, Camtepe, Sun. "SplitFed: When Federated Learning Meets Split
Learning", AAAI 2022, https://arxiv.org/abs/2004.12088, algorithms 1 and 2.

What the paper leaves open, and departures:
- The paper writes plain SGD steps, without an optimiser's state. By default it starts afresh on
  both sides in each round, as FedAvg's clients do, so that v1 is FedAvg with any optimiser;
  ``optimiser_state = "kept"`` keeps each node's own momenta, on both sides, from one round it takes
  part in to the next. (The published code makes the server's Adam anew for every batch, so its
  momenta never act; it is known to differ from FedAvg.)
- A fed-server that averages bottoms reads them: bottoms are ``"relayed"``, never ``"sealed"``, and
  here one server is both.
- BatchNorm: every copy normalises by its node's batch alone; its statistics are averaged like
  weights, and counters rounded. That too is what FedAvg does.
- Copies do not meet before the round's end, so they take turns in order of partition while the
  nodes prepare their next batches; the result is that of working side by side.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from leakbed.events import Arrays
from leakbed.wire.messages import SplitReply
from strategies.averaging import average, average_bottom, refuse_sealed
from strategies.post import Post
from strategies.setup import Built, Setup
from strategies.split_loop import Lane
from strategies.split_strategy import SplitStrategy
from strategies.trainers import TopTrainer


@dataclass(frozen=True, kw_only=True, eq=False)
class TopCopy:
    """A top that serves one node for a round.

    Attributes:
        trainer: Trains it; without defences, which are the server's as a whole.
        optimiser: Its own.
    """

    trainer: TopTrainer
    optimiser: torch.optim.Optimizer

    def begin(self, top: nn.Module, momenta: dict[int, Any] | None) -> None:
        """Take a round's first weights.

        Args:
            top: To be copied.
            momenta: The node's optimiser state to go on from; None to start afresh.
        """
        self.trainer.module.load_state_dict(top.state_dict())
        self.trainer.forget()
        if momenta is not None:
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": momenta, "param_groups": groups})

    def momenta(self) -> dict[int, Any]:
        """Return the optimiser's state alone; after another :meth:`begin` it is the caller's."""
        state: dict[int, Any] = self.optimiser.state_dict()["state"]
        return state

    def arrays(self) -> Arrays:
        """Return weights and buffers by name."""
        state = self.trainer.module.state_dict()
        return {name: value.detach().cpu().numpy() for name, value in state.items()}


class SplitFedV1(SplitStrategy):
    """A Flower strategy with one copy of the top for each sampled node.

    There are as many copies in memory as a round has nodes, and, where momenta are kept, one
    optimiser state for each node that ever took part.
    """

    part: TopTrainer

    def __init__(
        self,
        part: TopTrainer,
        bottom: Arrays,
        *,
        optimiser: Callable[[Any], torch.optim.Optimizer],
        **common: Any,  # noqa: ANN401  the keywords of SplitStrategy
    ) -> None:
        """Make the strategy.

        Args:
            part: The top between rounds; its own optimiser is never used.
            bottom: The first weights of the node's part.
            optimiser: Makes a copy's optimiser over its parameters.
            **common: As every split strategy takes them.
        """
        super().__init__(part, bottom, **common)
        refuse_sealed(self._bottoms)
        self._make = optimiser
        self._copies: list[TopCopy] = []
        self._momenta: dict[int, dict[int, Any]] = {}

    def train_round(self, lanes: Sequence[Lane], post: Post) -> None:
        """Train every node with its own copy, one batch of each in turn.

        Args:
            lanes: One per sampled node.
            post: Through which they send.
        """
        del post
        for lane in lanes:
            lane.open(self.bottom)
        running = list(zip(lanes, self._prepared(lanes), strict=True))
        while running:
            for lane, own in running:
                batch = lane.receive()
                with lane.blamed():
                    gradient = own.trainer.train(*batch.labelled)
                lane.answer(self.part.protected(gradient))
            running = [(lane, own) for lane, own in running if not lane.done]

    def close_round(self, closings: Sequence[SplitReply]) -> None:
        """Average the bottoms and the copies of the top.

        Args:
            closings: One per node, each with a bottom.
        """
        self.bottom = average_bottom(self._lanes, closings, like=self.bottom)
        copies = self._copies[: len(self._lanes)]
        averaged = average([own.arrays() for own in copies], [n.examples for n in self._lanes])
        top = {name: torch.from_numpy(value) for name, value in averaged.items()}
        self.part.module.load_state_dict(top)
        if self._optimiser_state == "kept":
            for lane, own in zip(self._lanes, copies, strict=True):
                self._momenta[lane.node] = own.momenta()

    def _prepared(self, lanes: Sequence[Lane]) -> list[TopCopy]:
        """Return a copy for each lane, with the round's first weights and the node's momenta."""
        while len(self._copies) < len(lanes):
            module = copy.deepcopy(self.part.module)
            optimiser = self._make(module.parameters())
            trainer = TopTrainer(module, optimiser)
            self._copies.append(TopCopy(trainer=trainer, optimiser=optimiser))
        copies = self._copies[: len(lanes)]
        for lane, own in zip(lanes, copies, strict=True):
            own.begin(self.part.module, self._momenta.get(lane.node))
        return copies


def build(setup: Setup) -> Built:
    """Return the strategy with the first weights of both parts.

    Args:
        setup: Its architecture must have a cut.

    Returns:
        The strategy, the top, and a way to read the bottom for the answer key.
    """
    parts = setup.architecture.parts(setup.init_stream)
    part = setup.part(TopTrainer, parts.top)
    bottom = setup.arrays(parts.bottom)
    strategy = SplitFedV1(part, bottom, optimiser=setup.optimiser, **setup.common())
    return Built(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)
