"""Protocols whose nodes do something new: a local loss without a cut gradient; any order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from flwr.app import Context
from torch import Tensor, nn

from clients.node import NodeConfig
from clients.split import bottom_trainer, keep_bottom
from leakbed.wire.fields import Field, Number
from leakbed.wire.messages import NodeRequest, SplitReply, SplitRequest
from leakbed.wire.records import METRICS
from strategies.node_channel import Clock
from strategies.node_session import NodeSession, first_to_answer
from strategies.protocol import BuiltProtocol, Protocol, ProtocolSetup
from strategies.server_model import TopTrainer
from strategies.splitfed_v2 import SplitFedV2
from strategies.vanilla_split import VanillaSplit

DELAYS = (5.0, 1.0, 2.0, 2.5)  # seconds of each node


def local_loss(smashed: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The cross-entropy of a fixed random classifier on smashed data."""
    rows = smashed.flatten(1)
    generator = torch.Generator().manual_seed(rows.shape[1])
    weights = torch.randn(rows.shape[1], classes, generator=generator, dtype=rows.dtype)
    return nn.functional.cross_entropy(rows @ weights.to(rows.device), labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalReply(SplitReply):
    """A smashed batch, and the loss that its node took a step on."""

    loss: float

    FIELDS: ClassVar[Mapping[str, Field]] = {
        **SplitReply.FIELDS,
        "loss": Number(METRICS, "local-loss"),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalStep(NodeRequest, SplitRequest):
    """Train the bottom on a loss of the node's own, and send the batch."""

    REPLY = LocalReply

    def answer(self, context: Context) -> LocalReply:
        """Take a step without waiting for a gradient of the server's."""
        cell = NodeConfig.of(context)
        trainer = bottom_trainer(context, self)
        smashed = trainer.forward(self.round, self.step)
        own = smashed.detach().clone().requires_grad_()
        labels = torch.as_tensor(trainer.labels(self.round, self.step))
        loss = local_loss(own, labels.to(own.device), cell.data.num_classes)
        (gradient,) = torch.autograd.grad(loss, own)
        trainer.backward(gradient.cpu().numpy(), round_=self.round, step=self.step)
        trainer.optimiser.step()
        keep_bottom(trainer, context, self)
        steps, examples = trainer.steps(self.round)
        return LocalReply(
            steps=steps,
            examples=examples,
            step=self.step,
            smashed=smashed.cpu().numpy(),
            labels=labels.numpy(),
            loss=loss.item(),
        )


class LocalLoss(VanillaSplit):
    """Nodes in turn train on losses of their own; the top trains on what they send."""

    def train_round(self, sessions: Sequence[NodeSession]) -> None:
        """Train with every node in turn."""
        for session in sessions:
            session.ask(
                LocalStep(round=session.round, step=0, bottom=self.bottom, bottoms=self._bottoms)
            )
            while not session.done:
                batch = session.receive()
                with session.blamed():
                    self.part.train(*batch.labelled)
                if session.step + 1 < session.steps:
                    session.ask(LocalStep(round=session.round, step=session.step + 1))
                else:
                    session.finish()
            if session is not sessions[-1]:
                self.close_round([self.close_session(session)])


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainStep(NodeRequest, SplitRequest):
    """What a step of vanilla split learning asks: learn from a gradient, send the next batch."""

    def answer(self, context: Context) -> SplitReply:
        """Do it."""
        trainer = bottom_trainer(context, self)
        if self.gradient is not None:
            before = self.step - 1
            trainer.backward(self.gradient, round_=self.round, step=before, received=self.received)
            trainer.optimiser.step()
        steps, examples = trainer.steps(self.round)
        labels = trainer.labels(self.round, self.step)
        keep_bottom(trainer, context, self, awaits_gradient=True)
        smashed = trainer.forward(self.round, self.step).numpy()
        return SplitReply(
            steps=steps, examples=examples, step=self.step, smashed=smashed, labels=labels
        )


class PlainSteps(VanillaSplit):
    """Vanilla split learning by requests of its own."""

    def train_round(self, sessions: Sequence[NodeSession]) -> None:
        """Train with every node in turn."""
        for session in sessions:
            opening = PlainStep(
                round=session.round, step=0, bottom=self.bottom, bottoms=self._bottoms
            )
            session.ask(opening)
            while not session.done:
                batch = session.receive()
                with session.blamed():
                    gradient = self.part.train(*batch.labelled)
                if session.step + 1 < session.steps:
                    place = {"round": session.round, "step": session.step + 1}
                    session.ask(PlainStep(**place, gradient=gradient.numpy()))
                else:
                    session.answer(gradient)  # with the closing request
            if session is not sessions[-1]:
                self.close_round([self.close_session(session)])


class AsTheyCome(SplitFedV2):
    """The one top takes every batch when it arrives."""

    def train_round(self, sessions: Sequence[NodeSession]) -> None:
        """Train until no node owes a batch."""
        for session in sessions:
            session.open(self.bottom)
        running = list(sessions)
        while running:
            session = first_to_answer(running)
            batch = session.receive()
            with session.blamed():
                gradient = self.part.train(*batch.labelled)
            session.answer(gradient)
            running = [session for session in running if not session.done]
        self._last = list(sessions)


def build_local(setup: ProtocolSetup) -> BuiltProtocol:
    """Return the strategy of a local loss."""
    parts = setup.architecture.parts(setup.init_stream)
    part = setup.part(TopTrainer, parts.top)
    strategy = LocalLoss(part, setup.arrays(parts.bottom), **setup.common())
    return BuiltProtocol(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)


def build_plain(setup: ProtocolSetup) -> BuiltProtocol:
    """Return the strategy of vanilla split learning by requests of its own."""
    parts = setup.architecture.parts(setup.init_stream)
    part = setup.part(TopTrainer, parts.top)
    strategy = PlainSteps(part, setup.arrays(parts.bottom), **setup.common())
    return BuiltProtocol(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)


def build_as_they_come(setup: ProtocolSetup) -> BuiltProtocol:
    """Return the strategy that takes batches as they arrive."""
    parts = setup.architecture.parts(setup.init_stream)
    part = setup.part(TopTrainer, parts.top)
    clock = Clock(lambda node, before: DELAYS[node] + before / 1000)
    strategy = AsTheyCome(
        part, setup.arrays(parts.bottom), stream=setup.stream, clock=clock, **setup.common()
    )
    return BuiltProtocol(strategy=strategy, arrays=part.arrays(), bottom=lambda: strategy.bottom)


LOCAL_LOSS = Protocol(exchanges="split", build=build_local, in_turn=True, requests=(LocalStep,))
PLAIN_STEPS = Protocol(exchanges="split", build=build_plain, in_turn=True, requests=(PlainStep,))
AS_THEY_COME = Protocol(
    exchanges="split", build=build_as_they_come, bottoms=("relayed",), merges=True
)
