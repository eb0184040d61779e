"""U-shaped training of the tiny cell, beside vanilla training of the same network."""

from dataclasses import replace
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor, nn

from clients.node import TrainingPlan
from leakbed.grids import DeterministicGrid
from leakbed.models import Architecture
from leakbed.seeds import derive, scoped
from leakbed.tap.wiretap import GridWrapper, Wiretap
from strategies.protocol import ProtocolSetup
from strategies.u_shaped import UShaped, build
from tests.support import tiny

OPTIMISERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "weight_decay": 0.01, "learning_rate": 0.1},
    "adam": {"optimizer": "adam", "weight_decay": 0.01, "learning_rate": 0.01},
}
UPPER = {"plain": 3, "normed": 5, "stateful": 6, "everywhere": 6}


def normed() -> nn.Sequential:
    """BatchNorm in all three parts, dropout in the bottom; cuts 2 and 5."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.25),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(12),
        nn.Linear(12, 3),
    )


def everywhere(outputs: int = 3) -> nn.Sequential:
    """BatchNorm and dropout in all three parts; cuts 2 and 6."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(0.25),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.BatchNorm1d(12),
        nn.Dropout(0.25),
        nn.Linear(12, outputs),
    )


def network(model: str = "plain", **cuts: int) -> Architecture:
    """An architecture with two cuts."""
    if model in {"normed", "everywhere"}:
        own = replace(tiny.architecture(), name=f"{__name__}:{model}", cut=2)
    else:
        own = tiny.architecture(model)
    return replace(own, **{"upper_cut": UPPER[model]} | cuts)


def at_home(**settings: Any) -> TrainingPlan:
    return tiny.plan(labels="client", **settings)


def strategy_of(
    architecture: Architecture, plan: TrainingPlan, *, nodes: int = 1, **more: Any
) -> UShaped:
    chosen: dict[str, Any] = {
        "architecture": architecture,
        "init_stream": derive(tiny.SEED, "victim-init"),
        "optimiser": plan.optimiser,
        "nodes": nodes,
        "fraction": 1.0,
        "chosen": {"bottoms": plan.bottoms, "optimizer_state": plan.optimizer_state},
        "labels": None,
        "test_labels": torch.empty(0, dtype=torch.long),
        "evaluate_rounds": (),
        "defenses": (),
        "defense_stream": 0,
        "timeout": None,
        "device": torch.device("cpu"),
    }
    strategy = build(ProtocolSetup(**chosen | more)).strategy
    assert isinstance(strategy, UShaped)
    return strategy


def train(
    architecture: Architecture,
    plan: TrainingPlan,
    *,
    nodes: int = 1,
    rounds: int = 2,
    resident: bool = True,
    hooks: Any = (),
    **more: Any,
) -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Run U-shaped training; return the whole model's weights and buffers, and the metrics."""
    inner = tiny.ready(nodes, resident=resident, plan=plan, architecture=architecture)
    grid: Any = DeterministicGrid(inner, stream=0, roster=inner.roster)
    if hooks:
        grid = Wiretap(grid, hooks, roster=inner.roster, strict=True)
    strategy = strategy_of(architecture, plan, nodes=nodes, **more)
    with scoped(derive(tiny.SEED, "server")):
        result = strategy.start(grid, strategy.part.arrays(), num_rounds=rounds)
    held = {name: torch.from_numpy(value) for name, value in strategy.bottom.items()}
    metrics = {round_: dict(m) for round_, m in result.evaluate_metrics_clientapp.items()}
    return held | strategy.part.module.state_dict(), metrics


def vanilla(
    architecture: Architecture, plan: TrainingPlan, *, nodes: int = 1, rounds: int = 2
) -> dict[str, Tensor]:
    """The oracle: the same network, cut once, labels shared."""
    once = replace(architecture, upper_cut=None)
    shared = replace(plan, labels="shared")
    inner = tiny.ready(nodes, plan=shared, architecture=once)
    parts = once.parts(derive(tiny.SEED, "victim-init"))
    trainer = tiny.TopTrainer(parts.top, plan.optimiser(parts.top.parameters()))
    bottom = {name: value.numpy() for name, value in parts.bottom.state_dict().items()}
    strategy = tiny.VanillaSplit(trainer, bottom, optimizer_state=plan.optimizer_state)
    return tiny.train_split(
        DeterministicGrid(inner, stream=0, roster=inner.roster), strategy, rounds=rounds
    )


class Ear(GridWrapper):
    """Keeps every message and reply that passes, whole."""

    def __init__(self, grid: Any) -> None:
        super().__init__(grid)
        self.active_channels: list[Message] = []

    def push_messages(self, messages: Any) -> Any:
        sent = list(messages)
        self.active_channels += sent
        return self._grid.push_messages(sent)

    def pull_messages(self, message_ids: Any) -> Any:
        replies = list(self._grid.pull_messages(message_ids))
        self.active_channels += replies
        return replies

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        return self.pull_messages(self.push_messages(messages))


class Liar(GridWrapper):
    """Lets a node answer to one type of message with something else."""

    def __init__(self, grid: Any, kind: str, change: Any) -> None:
        super().__init__(grid)
        self._kind, self._change = kind, change

    def pull_messages(self, message_ids: Any) -> Any:
        return self._spoiled(self._grid.pull_messages(message_ids))

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        return self._spoiled(self._grid.send_and_receive(messages, timeout=timeout))

    def _spoiled(self, replies: Any) -> list[Message]:
        spoiled = list(replies)
        for reply in spoiled:
            if reply.metadata.message_type == self._kind:
                self._change(reply)
        return spoiled
