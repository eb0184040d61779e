from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from defenses import DPCutGradient, GradientCompression, IsoNoise, Marvell, MaxNorm
from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.contracts.gradient_defenses import GradientDefenses

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


def test_defenses_apply_in_order_and_states_advance() -> None:
    chain = GradientDefenses([Noted(times=2.0), Noted()], stream=3)
    for message in range(3):
        sent = chain.protect(GRADIENT, LABELS)
        assert torch.equal(sent, (GRADIENT + message) * 2 + message)
    assert [state.messages for state in chain.states] == [3, 3]
    assert [state.stream for state in chain.states] == [3, 4]
    assert torch.equal(chain.states[0].tensors["seen"], GRADIENT)


def test_labels_reach_the_defense_where_the_sender_has_them() -> None:
    chain = GradientDefenses([Labelled()], stream=3)
    assert torch.equal(chain.protect(GRADIENT, LABELS), GRADIENT + LABELS[:, None])
    assert torch.equal(chain.protect(GRADIENT, None), GRADIENT + 1)


def test_a_sender_goes_on_from_stored_states() -> None:
    one, two = (GradientDefenses([Noted()], stream=3) for _ in range(2))
    one.protect(GRADIENT, None)
    two.states = one.states
    assert torch.equal(two.protect(GRADIENT, None), GRADIENT + 1)


def test_nothing_stands_between_an_undefended_gradient_and_the_wire() -> None:
    assert GradientDefenses([], stream=3).protect(GRADIENT, LABELS) is GRADIENT


@dataclass(frozen=True, kw_only=True)
class Claiming(Noted):
    name: ClassVar[str] = "claiming"
    claims: ClassVar[str] = "privacy"
    row_wise = True


@dataclass(frozen=True, kw_only=True)
class OwnLabel(Labelled):
    row_wise = True


def test_nothing_looks_at_labels_after_a_claim_of_privacy() -> None:
    with pytest.raises(IllegalCombinationError, match="voids its claim; put noted first"):
        GradientDefenses([Claiming(), OwnLabel()], stream=3)
    with pytest.raises(IllegalCombinationError, match="voids its claim; leave one of them out"):
        GradientDefenses([Claiming(), Labelled()], stream=3)
    GradientDefenses([OwnLabel(), Claiming(), Noted()], stream=3)


def test_nothing_that_is_not_known_to_keep_rows_apart_stands_before_a_claim() -> None:
    with pytest.raises(IllegalCombinationError, match=r"noted mixes .* put claiming first"):
        GradientDefenses([Noted(), Claiming()], stream=3)
    with pytest.raises(IllegalCombinationError, match=r"noted mixes .* leave one of them out"):
        GradientDefenses([Labelled(), Claiming()], stream=3)
    GradientDefenses([Claiming(), Claiming(), Noted()], stream=3)


MIXING = (GradientCompression(ratio=0.05), MaxNorm(), IsoNoise(), Marvell())


def others_moved(before: Defense) -> float:
    """How far the other rows together move, in clips, when one label turns its own row round."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 128, generator=draw)
    turned = torch.cat([-400 * rows[:1], rows[1:]])
    labels = torch.arange(64) % 2
    sent = []
    for gradient in (rows, turned):
        _, made = before.protect_labelled_gradient(before.begin(7), gradient, labels)
        norms = made.flatten(1).norm(dim=1, keepdim=True)
        sent.append(made * (1 / norms.clamp_min(1e-30)).clamp_max(1.0))
    return (sent[1] - sent[0])[1:].norm().item()


@pytest.mark.parametrize("mixing", MIXING, ids=lambda each: each.name)
def test_a_claim_about_a_message_is_not_made_behind_what_mixes_its_rows(mixing: Defense) -> None:
    """One label moves other rows there, by more than the two clips that the noise is made for."""
    assert others_moved(mixing) > 2
    instead = "leave one of them out" if mixing.name == "marvell" else "put dp-cut-gradient first"
    with pytest.raises(IllegalCombinationError, match=f"{mixing.name} mixes .*{instead}"):
        GradientDefenses([mixing, DPCutGradient()], stream=3)


def test_what_treats_each_row_by_itself_may_stand_before_a_claim() -> None:
    alone = GradientCompression(ratio=0.05, per="sample")
    assert others_moved(alone) == 0
    GradientDefenses([alone, DPCutGradient()], stream=3)
    for after in (GradientCompression(), MaxNorm(), IsoNoise()):
        GradientDefenses([DPCutGradient(), after], stream=3)
