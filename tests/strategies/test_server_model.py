from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from defenses import SmashedNoise
from leakbed.contracts import Defense, DefenseState, IllegalCombinationError, Protects
from leakbed.models.cutting import cut
from strategies.server_model import MiddleTrainer, TopTrainer, UnfitBatchError
from tests.support import tiny

SMASHED = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


def top(**settings: Any) -> TopTrainer:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 3))
    return TopTrainer(layers, torch.optim.SGD(layers.parameters(), lr=0.5), **settings)


def middle() -> MiddleTrainer:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(5, 2), nn.Tanh())
    return MiddleTrainer(layers, torch.optim.SGD(layers.parameters(), lr=0.5))


def test_a_step_returns_the_gradient_of_the_weights_before_it() -> None:
    trainer, twin = top(), top()
    gradient = trainer.train(SMASHED, LABELS)
    received = SMASHED.clone().requires_grad_()
    nn.functional.cross_entropy(twin.module(received), LABELS).backward()
    assert received.grad is not None
    assert torch.equal(gradient, received.grad)
    moved = twin.module[0].weight - 0.5 * twin.module[0].weight.grad
    assert torch.equal(trainer.module[0].weight, moved)


def test_a_step_does_not_change_what_it_received() -> None:
    smashed = SMASHED.clone()
    top().train(smashed, LABELS)
    assert torch.equal(smashed, SMASHED)


@pytest.mark.parametrize("is_cut", [True, False])
def test_a_first_layer_in_place_changes_no_step_and_nothing_received(is_cut: bool) -> None:
    def trained(*, inplace: bool) -> tuple[Tensor, list[int], dict[str, Tensor]]:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Flatten(), nn.ReLU(inplace=inplace), nn.Linear(5, 3))
        if is_cut:
            layers = cut(layers, 0, image_shape=(1, 1, 5)).top
        trainer = TopTrainer(layers, torch.optim.SGD(layers.parameters(), lr=0.5))
        assert len(trainer.module._forward_pre_hooks) == inplace, "what is given is copied once"
        gradient = trainer.train(smashed, LABELS)
        seen = trainer.predict(smashed).tolist()
        return gradient, seen, trainer.module.state_dict()

    smashed = SMASHED.clone()
    gradient, seen, weights = trained(inplace=True)
    expected = trained(inplace=False)
    assert torch.equal(smashed, SMASHED)
    assert torch.equal(gradient, expected[0])
    assert seen == expected[1]
    assert tiny.same(weights, expected[2])


def test_a_joint_step_is_a_step_on_all_rows_as_one_batch() -> None:
    together, apart = top(), top()
    whole = together.train(SMASHED, LABELS)
    parts = apart.train_jointly([(SMASHED[:1], LABELS[:1]), (SMASHED[1:], LABELS[1:])])
    assert [len(part) for part in parts] == [1, 3]
    assert torch.equal(torch.cat(parts), whole)
    assert tiny.same(together.module.state_dict(), apart.module.state_dict())


def test_a_merged_step_is_a_step_on_the_merged_batch_and_each_party_gets_its_share() -> None:
    whole_top, merged_top = top(), top(defenses=(Count(times=2.0),))
    whole = whole_top.train(SMASHED, LABELS)
    received = [merged_top.received(part) for part in SMASHED.split([2, 3], dim=1)]
    parts = merged_top.train_merged(
        received, LABELS, merge=lambda each: torch.cat(list(each), dim=1)
    )
    left, right = whole.split([2, 3], dim=1)
    assert torch.equal(parts[0], left * 2)
    assert torch.equal(parts[1], (right + 1) * 2)  # protected as the second message of its own
    assert tiny.same(whole_top.module.state_dict(), merged_top.module.state_dict())


def test_weights_load_and_come_back_the_same() -> None:
    one, two = top(), top()
    one.train(SMASHED, LABELS)
    two.load(one.arrays())
    assert tiny.same(one.module.state_dict(), two.module.state_dict())
    assert one.predict(SMASHED).tolist() == one.module(SMASHED).argmax(1).tolist()


def test_a_forgetful_optimizer_starts_afresh() -> None:
    def trained(*, forget: bool) -> Tensor:
        trainer = top()
        optimiser = torch.optim.SGD(trainer.module.parameters(), lr=0.5, momentum=0.9)
        trainer = TopTrainer(trainer.module, optimiser)
        trainer.train(SMASHED, LABELS)
        trainer.module.load_state_dict(top().module.state_dict())
        if forget:
            trainer.forget()
        trainer.train(SMASHED, LABELS)
        weight: Tensor = trainer.module[0].weight
        return weight

    plain = top()
    plain.train(SMASHED, LABELS)
    assert torch.equal(trained(forget=True), plain.module[0].weight)
    assert not torch.equal(trained(forget=False), plain.module[0].weight)


@pytest.mark.parametrize(
    ("smashed", "labels", "match"),
    [
        (SMASHED.double(), LABELS, r"smashed data are torch.float64, the server's part is torch.f"),
        (SMASHED, LABELS[:3], "3 labels from 0 to 2 came with 4 smashed rows of a model with 3"),
        (SMASHED, LABELS + 1, "4 labels from 1 to 3 came with 4 smashed rows"),
        (SMASHED, LABELS - 1, "4 labels from -1 to 1 came with 4 smashed rows"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(smashed: Tensor, labels: Tensor, match: str) -> None:
    trainer = top()
    with pytest.raises(UnfitBatchError, match=match):
        trainer.train(smashed, labels)
    assert tiny.same(trainer.module.state_dict(), top().module.state_dict())


def test_a_batch_too_small_for_its_layers_is_refused() -> None:
    layers = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    trainer = TopTrainer(layers, torch.optim.SGD(layers.parameters(), lr=0.5))
    with pytest.raises(UnfitBatchError, match="cannot train on this batch: Expected more than 1"):
        trainer.train(SMASHED[:1], LABELS[:1])


def test_a_middle_passes_features_up_and_gradients_down() -> None:
    trainer, twin = middle(), middle()
    features = trainer.forward(SMASHED)
    upper = torch.ones_like(features)
    lower = trainer.finish(upper)
    received = SMASHED.clone().requires_grad_()
    expected = twin.module(received)
    expected.backward(upper)
    assert torch.equal(features, expected.detach())
    assert received.grad is not None
    assert torch.equal(lower, received.grad)
    moved = twin.module[0].weight - 0.5 * twin.module[0].weight.grad
    assert torch.equal(trainer.module[0].weight, moved)
    assert torch.equal(trainer.features(SMASHED), trainer.module(SMASHED).detach())


def test_a_gradient_of_other_features_is_refused() -> None:
    trainer = middle()
    trainer.forward(SMASHED)
    with pytest.raises(UnfitBatchError, match=r"a gradient of \(3, 2\) torch.float32 came for"):
        trainer.finish(torch.ones(3, 2))


@dataclass(frozen=True, kw_only=True)
class Count(Defense):
    """Adds the number of messages so far, then multiplies."""

    name: ClassVar[str] = "count"
    source: ClassVar[str] = "nowhere"
    protects: ClassVar[frozenset[Protects]] = frozenset({Protects.CUT_GRADIENT})
    times: float = 1.0

    def protect_cut_gradient(
        self, state: DefenseState, gradient: Tensor
    ) -> tuple[DefenseState, Tensor]:
        return state, (gradient + state.messages) * self.times


def test_cut_gradients_are_protected_in_order_and_the_state_advances() -> None:
    plain, defended = top(), top(defenses=(Count(times=2.0), Count()), defense_stream=3)
    for message in range(3):
        gradient = plain.train(SMASHED, LABELS)
        protected = defended.train(SMASHED, LABELS)
        torch.testing.assert_close(protected, (gradient + message) * 2 + message)
    assert tiny.same(plain.module.state_dict(), defended.module.state_dict())  # only what is sent


@pytest.mark.parametrize("kind", [TopTrainer, MiddleTrainer])
def test_a_defense_that_is_not_the_servers_is_refused(kind: Any) -> None:
    layers = nn.Sequential(nn.Linear(5, 3))
    optimiser = torch.optim.SGD(layers.parameters(), lr=0.5)
    with pytest.raises(IllegalCombinationError, match="smashed-noise protects smashed, which is"):
        kind(layers, optimiser, defenses=(SmashedNoise(),))


def test_counters_that_an_average_made_fractions_are_rounded() -> None:
    layers = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
    part = TopTrainer(layers, torch.optim.SGD(layers.parameters(), lr=0.5))
    arrays = {name: value.float() for name, value in layers.state_dict().items()}
    arrays["0.num_batches_tracked"] = torch.tensor(8.999999, dtype=torch.float64)
    part.load(ArrayRecord(arrays))
    assert int(layers.state_dict()["0.num_batches_tracked"]) == 9


def test_a_top_without_finite_logits_predicts_no_class() -> None:
    broken = top()
    with torch.no_grad():
        broken.module[0].bias[1] = torch.nan
    assert broken.predict(SMASHED).tolist() == [-1] * 4
