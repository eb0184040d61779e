"""What a view says about an update, and the gradients of dummies."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from attacks.building_blocks.dummy_gradients import PRECISION, Clues, Dummies, clues
from leakbed.contracts import MissingKnowledgeError, Seat, UnfitViewError, View
from leakbed.models import Architecture
from tests.support.weight_updates import Victims, small_victims

NETWORKS = "tests.support.train_mode_networks"
ROUNDED = 2e-7  # what float32 leaves of weights near 1


def truth(victims: Victims, *, target: int = 0, sure: float = 60.0) -> Tensor:
    """Return the point of the true images and (nearly) hard true labels."""
    scores = sure * one_hot(victims.labels[target], victims.view.num_classes).to(PRECISION)
    return torch.cat([victims.images[target].to(PRECISION).flatten(), scores.flatten()])


def first(told: Clues) -> Clues:
    """Return the clues about the first target, without the leading axis."""
    return Clues(
        weights={name: tensor[0] for name, tensor in told.weights.items()},
        update={name: tensor[0] for name, tensor in told.update.items()},
        labels=told.labels[0],
        rounding={name: tensor[0] for name, tensor in told.rounding.items()},
    )


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in weights.values()])


@pytest.mark.parametrize("rows", [1, 3])
def test_the_truth_explains_a_step_of_sgd_to_the_rounding_of_the_weights(rows: int) -> None:
    victims = small_victims(1, rows=rows, learning_rate=0.05)
    told = first(clues(victims.view, labels="inferred"))
    gradient = Dummies.of(victims.view).gradient(truth(victims), told)
    for name, tensor in gradient.items():
        torch.testing.assert_close(0.05 * tensor, told.update[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "rows", "local_steps"),
    [
        ("normalised", 1, 1),
        ("normalised", 2, 1),
        ("normalised", 4, 2),
        ("normalised_features", 3, 1),
        ("idle", 2, 1),
    ],
)
def test_the_truth_explains_a_step_in_training_mode(
    model: str, rows: int, local_steps: int
) -> None:
    rate = 1e-3 if local_steps == 1 else 1e-5  # two steps are as one where both are short
    victims = small_victims(
        1, rows=rows, local_steps=local_steps, learning_rate=rate, model=f"{NETWORKS}:{model}"
    )
    told = first(clues(victims.view, labels="inferred"))
    gradient = Dummies.of(victims.view).gradient(truth(victims), told)
    for name, tensor in gradient.items():
        expected = local_steps * tensor  # the mean over both steps' images, twice
        torch.testing.assert_close(told.update[name] / rate, expected, rtol=0, atol=ROUNDED / rate)


@pytest.mark.parametrize(
    ("model", "layer"),
    [("dropping", "1 (Dropout)"), ("with_statistics_of_its_own", "1 (InstanceNorm2d)")],
)
def test_what_no_dummy_can_repeat_is_refused(model: str, layer: str) -> None:
    view = small_victims(1, rows=2, model=f"{NETWORKS}:{model}").view
    with pytest.raises(UnfitViewError, match=f"layer {re.escape(layer)} computes something else"):
        Dummies.of(view)


def test_one_sample_has_no_batch_statistics() -> None:
    view = small_victims(1, rows=2, model=f"{NETWORKS}:normalised_features").view
    with pytest.raises(
        UnfitViewError, match=r"layer 2 \(BatchNorm1d\).*of 1: Expected more than 1"
    ):
        Dummies.of(replace(view, rows=1))


def test_the_networks_own_weights_are_never_read() -> None:
    victims = small_victims(1)
    told = first(clues(victims.view, labels="inferred"))
    dummies = Dummies.of(victims.view)
    expected = dummies.gradient(truth(victims), told)
    with torch.no_grad():
        for parameter in dummies.network.parameters():
            parameter.fill_(torch.nan)
    again = dummies.gradient(truth(victims), told)
    assert torch.equal(flat(expected), flat(again))


def test_a_label_is_read_off_the_last_bias() -> None:
    victims = small_victims(6)
    told = clues(victims.view, labels="analytic")
    assert torch.equal(told.labels.argmax(-1), victims.labels)


def test_given_labels_are_those_of_the_view() -> None:
    victims = small_victims(2)
    told = clues(replace(victims.view, labels=victims.labels), labels="given")
    assert torch.equal(told.labels.argmax(-1), victims.labels)
    with pytest.raises(MissingKnowledgeError, match="labels = 'given'"):
        clues(victims.view, labels="given")


def test_several_labels_cannot_be_read_off_one_bias() -> None:
    with pytest.raises(UnfitViewError, match="one sample per update, not 2"):
        clues(small_victims(1, rows=2).view, labels="analytic")


def test_missing_knowledge_is_named() -> None:
    view = small_victims(1).view
    with pytest.raises(MissingKnowledgeError, match="no weights before and after"):
        clues(replace(view, after=None), labels="inferred")
    with pytest.raises(MissingKnowledgeError, match="no architecture"):
        Dummies.of(replace(view, architecture=None))


def test_a_smaller_last_batch_under_batch_norm_is_refused() -> None:
    layers = Architecture(name=f"{NETWORKS}:normalised", image_shape=(1, 12, 12), num_classes=4)
    view = View(
        seat=Seat.SERVER,
        image_shape=(1, 12, 12),
        num_classes=4,
        targets=1,
        rows=5,
        local_steps=2,
        architecture=layers,
    )
    with pytest.raises(UnfitViewError, match="leave a smaller batch"):
        Dummies.of(view)
