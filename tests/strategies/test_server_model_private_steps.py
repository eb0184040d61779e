from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.models.networks import FlattenLinear
from strategies.server_model import PrivateSteps, TopTrainer, refuse_private_copies
from tests.support import tiny

SMASHED = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
SEEN: list[dict[str, Tensor]] = []


@dataclass(frozen=True, kw_only=True)
class Mean(Defense):
    """The mean of the samples' gradients, as without a defence; plus the number of steps so far."""

    name: ClassVar[str] = "mean"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.TOP})
    per_step: float = 0.0

    def protect_weight_gradients(self, state: DefenseState, gradients: Any) -> Any:
        SEEN.append({name: each.clone() for name, each in gradients.items()})
        added = self.per_step * state.messages
        return state, {name: each.mean(0) + added for name, each in gradients.items()}


def top(*defenses: Defense) -> TopTrainer:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    optimiser = torch.optim.SGD(layers.parameters(), lr=0.5)
    return TopTrainer(layers, optimiser, defenses=defenses, defense_stream=3)


def test_the_mean_of_the_samples_gradients_is_the_batchs() -> None:
    plain, private = top(), top(Mean())
    for _ in range(3):
        torch.testing.assert_close(private.train(SMASHED, LABELS), plain.train(SMASHED, LABELS))
    for name, value in plain.module.state_dict().items():
        torch.testing.assert_close(private.module.state_dict()[name], value)


def convolutional(*defenses: Defense) -> TopTrainer:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), FlattenLinear(4, 3)
    )
    return TopTrainer(layers, torch.optim.SGD(layers.parameters(), lr=0.5), defenses=defenses)


@pytest.mark.parametrize("make", [top, convolutional])
def test_each_sample_has_the_gradient_of_its_own_loss(make: Any) -> None:
    SEEN.clear()
    smashed = SMASHED if make is top else MAPS
    twin = make()
    make(Mean()).train(smashed, LABELS)
    for row in range(len(smashed)):
        one = slice(row, row + 1)
        loss = nn.functional.cross_entropy(twin.module(smashed[one]), LABELS[one])
        own = torch.autograd.grad(loss, list(twin.module.parameters()))
        for (name, _), gradient in zip(twin.module.named_parameters(), own, strict=True):
            torch.testing.assert_close(SEEN[0][name][row], gradient, atol=1e-5, rtol=1e-4)


def test_the_message_is_the_one_of_the_weights_before_the_step_untouched() -> None:
    plain, private = top(), top(Mean(per_step=5.0))
    assert torch.equal(private.train(SMASHED, LABELS), plain.train(SMASHED, LABELS))
    weight = private.module[0].weight.clone()
    torch.testing.assert_close(weight, plain.module[0].weight)
    private.train(SMASHED, LABELS)
    plain.train(SMASHED, LABELS)
    moved = private.module[0].weight - plain.module[0].weight
    torch.testing.assert_close(moved, torch.full_like(moved, -0.5 * 5.0))  # the second step's state


def test_names_and_predictions_stay_those_of_the_plain_top() -> None:
    plain, private = top(), top(Mean())
    assert tiny.same(plain.module.state_dict(), private.module.state_dict())
    assert private.predict(SMASHED).tolist() == plain.predict(SMASHED).tolist()


def test_nothing_is_hooked_without_such_a_defense() -> None:
    layers = nn.Linear(5, 3)
    assert PrivateSteps.of(layers, (), stream=1) is None
    assert not layers._forward_hooks


def test_a_top_whose_samples_mix_is_refused() -> None:
    layers = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    with pytest.raises(IllegalCombinationError, match=r"mean needs each sample's own .*BatchNorm"):
        PrivateSteps.of(layers, (Mean(),), stream=1)


def test_two_such_defenses_are_refused() -> None:
    with pytest.raises(IllegalCombinationError, match="mean and mean all change the top's steps"):
        top(Mean(), Mean())


def test_copies_of_a_top_are_refused() -> None:
    refuse_private_copies(())
    with pytest.raises(IllegalCombinationError, match="copy of its own; use 'vanilla-split'"):
        refuse_private_copies((Mean(),))


@dataclass(frozen=True, kw_only=True)
class Sent(Defense):
    """Notes the seeds of a message's noise."""

    name: ClassVar[str] = "sent"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})

    def protect_cut_gradient(self, state: DefenseState, gradient: Tensor) -> Any:
        DRAWN.append(("sent", state.generator().initial_seed()))
        return state, gradient


@dataclass(frozen=True, kw_only=True)
class Stepped(Mean):
    def protect_weight_gradients(self, state: DefenseState, gradients: Any) -> Any:
        DRAWN.append(("stepped", state.generator().initial_seed()))
        return super().protect_weight_gradients(state, gradients)


DRAWN: list[tuple[str, int]] = []


@pytest.mark.parametrize("stack", [(Stepped(), Sent()), (Sent(), Stepped())])
def test_steps_and_messages_have_noise_of_their_own(stack: tuple[Defense, ...]) -> None:
    DRAWN.clear()
    trainer = top(*stack)
    for _ in range(3):
        trainer.train(SMASHED, LABELS)
    assert len(DRAWN) == 6
    assert len({seed for _, seed in DRAWN}) == 6
