"""Defences that hook into training, for tests: what is called, with what; and a way to use them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import clients.node
from leakbed.contracts import Defense, DefenseState, Protects
from leakbed.contracts.defense import Holdings, ReturnedGradient, TrainingStep

CALLS: list[tuple[str, Any]] = []


@dataclass(frozen=True, kw_only=True)
class Witness(Defense):
    """Writes down every call, penalises the smashed data's squares and alarms at a set step."""

    name: ClassVar[str] = "witness"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.TRAINING})

    weight: float = 0.0
    probes: tuple[int, ...] = ()
    alarm: int = 1000
    stop: bool = False

    def prepare(self, state: DefenseState, holdings: Holdings) -> DefenseState:
        CALLS.append(("prepare", holdings))
        begun = state.tensors or {"seen": torch.zeros(0, dtype=torch.float64)}
        return replace(state, tensors=begun)

    def protect_labels(
        self, state: DefenseState, labels: Tensor, *, classes: int
    ) -> tuple[DefenseState, Tensor]:
        CALLS.append(("labels", labels))
        if state.messages not in self.probes:
            return state, labels
        return replace(state, probing=True), (labels + 1) % classes

    def train_step(
        self, state: DefenseState, step: TrainingStep
    ) -> tuple[DefenseState, Tensor | None]:
        CALLS.append(("train_step", (step.images, step.output.detach().clone())))
        return state, self.weight * step.output.square().mean() if self.weight else None

    def inspect(self, state: DefenseState, step: ReturnedGradient) -> DefenseState:
        CALLS.append(("inspect", (state, step)))
        seen = torch.cat([state.tensors["seen"], step.first_gradient.double().sum()[None]])
        total = float(seen.sum())
        return replace(state, tensors={"seen": seen}).judged(
            total, suspicious=state.messages + 1 >= self.alarm, worse=max
        )


@contextmanager
def catalogued(**more: type[Defense]) -> Iterator[None]:
    """Put the witness, and others, into the node's catalogue."""
    CALLS.clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in {"witness": Witness, **more}.items():
            patch.setitem(clients.node.DEFENSES, name, kind)
        yield
    CALLS.clear()


def called(kind: str) -> list[Any]:
    """Return what a hook was called with, call by call."""
    return [given for name, given in CALLS if name == kind]
