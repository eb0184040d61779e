"""The contract of malicious clients: an honest one is the smallest, and torch is not needed."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from leakbed.contracts import Evidence, Seat, ThreatModel
from leakbed.contracts.attack import CraftedBatch, MaliciousClient, MaliciousClientState, NodeView


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Does what an honest node does, and draws grey."""

    name: ClassVar[str] = "idle"
    source: ClassVar[str] = "nowhere"
    scales: bool = False
    aim: int = 0

    @property
    def threat(self) -> ThreatModel:
        return ThreatModel(seat=Seat.CLIENT, evidence=frozenset({Evidence.SERVED}), active=True)

    def begin(self, view: NodeView, *, seed: int) -> MaliciousClientState:
        del view
        return MaliciousClientState(stream=seed)

    def turn(self, view: NodeView, state: MaliciousClientState, *, rows: int) -> CraftedBatch:
        del view, state, rows
        return CraftedBatch()

    def learn(
        self, state: MaliciousClientState, turn: CraftedBatch, gradient: Tensor | None
    ) -> MaliciousClientState:
        del turn, gradient
        return replace(state, turns=state.turns + 1)

    def samples(self, view: NodeView, state: MaliciousClientState, *, count: int) -> Tensor:
        del state
        return torch.full((count, *view.image_shape), 0.5)


def test_a_client_that_does_nothing_is_an_intruder() -> None:
    assert isinstance(Idle(), MaliciousClient)
    assert not isinstance(object(), MaliciousClient)


def test_an_empty_turn_is_an_honest_one() -> None:
    turn = CraftedBatch()
    assert turn.images is None
    assert turn.labels is None
    assert turn.trains
    assert turn.scale == 1
    assert not turn.sources


def test_states_and_turns_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        MaliciousClientState(stream=1).turns = 2  # type: ignore[misc]  that is the point
    with pytest.raises(FrozenInstanceError):
        CraftedBatch().scale = 2.0  # type: ignore[misc]  that is the point


def test_its_threat_is_told_in_words() -> None:
    words = Idle().threat.in_words()
    assert words == (
        "The client rewrites messages, reads what the server sends the node that it is, and knows "
        "nothing else."
    )


def test_importing_the_contract_needs_neither_torch_nor_flower() -> None:
    code = "import sys, leakbed.contracts.attack; print({'torch', 'flwr'} & set(sys.modules))"
    done = subprocess.run(  # noqa: S603  our own interpreter on our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
