from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.gradient_defences import GradientDefences

GRADIENT, LABELS = torch.arange(6.0).reshape(3, 2), torch.tensor([4, 5, 6])


@dataclass(frozen=True, kw_only=True)
class Noted(Defense):
    """Adds the number of messages so far and, where it is told them, the labels."""

    name: ClassVar[str] = "noted"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})
    times: float = 1.0

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Tensor
    ) -> tuple[DefenseState, Tensor]:
        kept = replace(state, tensors={"seen": gradient})
        return kept, (gradient + state.messages) * self.times


@dataclass(frozen=True, kw_only=True)
class Labelled(Noted):
    def protect_labelled_gradient(
        self, state: DefenseState, gradient: Tensor, labels: Tensor
    ) -> tuple[DefenseState, Tensor]:
        return state, gradient + labels[:, None]


def test_defences_apply_in_order_and_states_advance() -> None:
    chain = GradientDefences([Noted(times=2.0), Noted()], stream=3)
    for message in range(3):
        sent = chain.protect(GRADIENT, LABELS)
        assert torch.equal(sent, (GRADIENT + message) * 2 + message)
    assert [state.messages for state in chain.states] == [3, 3]
    assert [state.stream for state in chain.states] == [3, 4]
    assert torch.equal(chain.states[0].tensors["seen"], GRADIENT)


def test_labels_reach_the_defence_where_the_sender_has_them() -> None:
    chain = GradientDefences([Labelled()], stream=3)
    assert torch.equal(chain.protect(GRADIENT, LABELS), GRADIENT + LABELS[:, None])
    assert torch.equal(chain.protect(GRADIENT, None), GRADIENT + 1)


def test_a_sender_goes_on_from_stored_states() -> None:
    one, two = (GradientDefences([Noted()], stream=3) for _ in range(2))
    one.protect(GRADIENT, None)
    two.states = one.states
    assert torch.equal(two.protect(GRADIENT, None), GRADIENT + 1)


def test_nothing_stands_between_an_undefended_gradient_and_the_wire() -> None:
    assert GradientDefences([], stream=3).protect(GRADIENT, LABELS) is GRADIENT


@dataclass(frozen=True, kw_only=True)
class Claiming(Noted):
    claims: ClassVar[str] = "privacy"


def test_nothing_looks_at_labels_after_a_claim_of_privacy() -> None:
    with pytest.raises(IllegalCombinationError, match="voids its claim; put noted first"):
        GradientDefences([Claiming(), Labelled()], stream=3)
    GradientDefences([Labelled(), Claiming(), Noted()], stream=3)
