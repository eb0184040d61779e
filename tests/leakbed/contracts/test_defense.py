from typing import ClassVar

import torch
from torch import Tensor, nn

from leakbed.contracts import Defense, DefenseState, Protects, select
from leakbed.contracts.defense import ReturnedGradient, Run
from tests.support import stepping


class Idle(Defense):
    name: ClassVar[str] = "idle"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset(Protects)


def test_hooks_that_are_not_overridden_change_nothing() -> None:
    idle, labels = Idle(), torch.arange(3)
    state = idle.begin(5)
    gradient = torch.ones(3, 2)
    seen = ReturnedGradient(cut_gradient=gradient, labels=labels, first_gradient=torch.ones(2, 2))
    step = stepping.step(torch.ones(3, 1), torch.ones(3, 2))
    assert idle.train_step(state, step) == (state, None)
    assert idle.protect_labels(state, labels, classes=3) == (state, labels)
    assert idle.noised_labels(5, labels, classes=3) is labels
    assert idle.protect_cut_gradient(state, gradient) == (state, gradient)
    assert idle.inspect(state, seen) is state
    idle.check(rows=0, batch_size=1)
    idle.check_run(Run(classes=3, rows=1, batch_size=1, steps=1, passes=1, top=nn.Identity()))
    assert not idle.stop


def test_defenses_are_selected_by_what_they_protect_in_their_order() -> None:
    class OfUpdates(Idle):
        protects: ClassVar[frozenset[Protects]] = frozenset({Protects.UPDATE})

    class OfSmashed(Idle):
        protects: ClassVar[frozenset[Protects]] = frozenset({Protects.SMASHED, Protects.LABELS})

    chosen = (OfSmashed(), OfUpdates(), OfSmashed())
    assert select(chosen, Protects.SMASHED) == (chosen[0], chosen[2])
    assert select(chosen, Protects.UPDATE, Protects.LABELS) == chosen
    assert select(chosen, Protects.TOP) == ()


def test_samples_gradients_become_their_mean() -> None:
    _, made = Idle().protect_weight_gradients(Idle().begin(5), {"w": torch.tensor([[1.0], [3.0]])})
    assert made["w"].tolist() == [2.0]


def test_a_defense_that_needs_no_labels_is_asked_without_them() -> None:
    class Twice(Idle):
        def protect_cut_gradient(
            self, state: DefenseState, gradient: Tensor
        ) -> tuple[DefenseState, Tensor]:
            return state, gradient * 2

    state = Twice().begin(5)
    sent = Twice().protect_labelled_gradient(state, torch.ones(3, 2), torch.arange(3))
    assert sent[0] is state
    assert torch.equal(sent[1], torch.full((3, 2), 2.0))
