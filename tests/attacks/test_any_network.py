"""Attacks on updates of networks that cannot be cut, which are most of those people write."""

from dataclasses import replace

import pytest
import torch

from attacks import DeepLeakageFromModelPlus
from attacks.building_blocks.dummy_gradients import Dummies, check_last_bias, clues
from leakbed.contracts import UnfitViewError
from leakbed.models import Architecture, ModelMismatchError, weights_as_run
from tests.attacks.building_blocks.test_dummy_gradients import first, truth
from tests.support.weight_updates import SMALL, small_victims

NETWORKS = "tests.support.whole_networks"


@pytest.mark.parametrize("model", ["Whole", "Reusing", "Tied", "Skipping"])
def test_the_truth_explains_a_step_of_a_network_that_cannot_be_cut(model: str) -> None:
    victims = small_victims(1, rows=2, learning_rate=0.05, model=f"{NETWORKS}:{model}")
    told = first(clues(victims.view, labels="inferred"))
    gradient = Dummies.of(victims.view).gradient(truth(victims), told)
    assert set(gradient) == set(victims.view.before or {})
    for name, tensor in gradient.items():
        torch.testing.assert_close(0.05 * tensor, told.update[name], rtol=0, atol=1e-7)


def test_images_and_labels_of_such_a_network_come_back() -> None:
    victims = small_victims(2, model=f"{NETWORKS}:Whole")
    attack = DeepLeakageFromModelPlus(restarts=1, good_enough=1e-8)
    guess = attack.run(victims.view, seed=6)
    assert (victims.errors(guess) < 1e-3).all()
    assert guess.labels is not None
    assert torch.equal(guess.labels, victims.labels)


def test_the_last_weights_are_those_used_last_whatever_was_made_first() -> None:
    shown = {
        model: weights_as_run(whole(model).build(0), SMALL)[-1]
        for model in ("Whole", "Reusing", "Tied")
    }
    assert set(shown.values()) == {"second.bias", "output.bias"}
    victims = small_victims(6, model=f"{NETWORKS}:Whole")
    told = clues(victims.view, labels="analytic")
    assert torch.equal(told.labels.argmax(-1), victims.labels)


def test_scores_that_no_last_layer_returns_have_no_last_bias() -> None:
    view = small_victims(1, model=f"{NETWORKS}:Skipping").view
    with pytest.raises(UnfitViewError, match=r"Skipping' are not what its last layer.*use 'x'"):
        check_last_bias(view, setting="labels = 'analytic'", instead="'x'")
    plain = small_victims(1, model=f"{NETWORKS}:Reusing").view
    check_last_bias(plain, setting="labels = 'analytic'", instead="'x'")


def test_what_a_function_drops_is_refused() -> None:
    view = small_victims(1, rows=2, model=f"{NETWORKS}:Dropping").view
    with pytest.raises(UnfitViewError, match="Dropping computes something else in training"):
        Dummies.of(view)


def test_a_cut_of_such_a_network_says_why_there_is_none() -> None:
    with pytest.raises(ModelMismatchError, match=r"Whole cannot be cut.*leave `cut` out"):
        replace(whole("Whole"), cut=0).build(0)


def whole(name: str) -> Architecture:
    return Architecture(name=f"{NETWORKS}:{name}", image_shape=SMALL, num_classes=4)
