"""What both weight-update attacks promise: restarts, independence of targets, repeatability."""

from dataclasses import replace

import pytest
import torch

from attacks.deep_leakage_from_model import DeepLeakageFromModel
from attacks.deep_leakage_from_model_plus import DeepLeakageFromModelPlus
from attacks.gradient_matching import GradientMatching
from leakbed.contracts import Guess, Knowledge, Seat, UnfitViewError, View
from tests.attacks.weight_updates import small_victims

BOTH = [DeepLeakageFromModel, DeepLeakageFromModelPlus]


def seen(guess: Guess) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert guess.images is not None
    assert guess.labels is not None
    assert guess.objective is not None
    return guess.images, guess.labels, guess.objective


def without(view: View, target: int) -> View:
    """Return the view with one target's update poisoned."""
    assert view.after is not None
    after = {name: tensor.clone() for name, tensor in view.after.items()}
    for tensor in after.values():
        tensor[target] = torch.nan
    return replace(view, after=after)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("attack", BOTH)
def test_a_poisoned_target_fails_alone(attack: type[GradientMatching], optimizer: str) -> None:
    view = small_victims(3).view
    settings = attack(iterations=12, restarts=2, optimizer=optimizer)
    sound = settings.run(view, seed=1)
    hurt = settings.run(without(view, 1), seed=1)
    for before, after in zip(seen(sound), seen(hurt), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert hurt.failed is not None
    assert hurt.failed.tolist() == [False, True, False]
    assert sound.failed is not None
    assert not sound.failed.any()


@pytest.mark.parametrize("attack", BOTH)
def test_same_seed_same_bits_and_another_seed_another_start(attack: type[GradientMatching]) -> None:
    view = small_victims(2).view
    settings = attack(iterations=5, restarts=1)
    images, labels, objective = seen(settings.run(view, seed=1))
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = seen(settings.run(view, seed=1))
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert torch.equal(objective, again[2])
    assert not torch.equal(images, seen(settings.run(view, seed=2))[0])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("attack", BOTH)
def test_the_try_of_lowest_mismatch_is_kept(attack: type[GradientMatching]) -> None:
    view = small_victims(3).view
    once = seen(attack(iterations=20, restarts=1).run(view, seed=1))[2]
    often = seen(attack(iterations=20, restarts=3).run(view, seed=1))[2]
    assert (often <= once).all()
    assert (often < once).any()
    done = seen(attack(iterations=20, restarts=3, solved=1e9).run(view, seed=1))[2]
    assert torch.equal(done, once)


def test_targets_split_over_stacks_start_where_they_would_in_one() -> None:
    view = small_victims(3).view
    one = seen(DeepLeakageFromModelPlus(iterations=5, restarts=1).run(view, seed=1))[0]
    split = seen(DeepLeakageFromModelPlus(iterations=5, restarts=1, stack=2).run(view, seed=1))[0]
    torch.testing.assert_close(one, split, rtol=0, atol=1e-5)


def test_several_images_and_steps_have_their_shapes() -> None:
    view = small_victims(2, rows=4, local_steps=2).view
    images, labels, _ = seen(DeepLeakageFromModelPlus(iterations=4, restarts=1).run(view, seed=1))
    assert images.shape == (2, 4, 1, 12, 12)
    assert labels.shape == (2, 4)


@pytest.mark.parametrize("attack", BOTH)
def test_images_come_back_through_batch_norm_up_to_contrast(attack: type[GradientMatching]) -> None:
    network = "tests.attacks.train_mode_networks:normalised"
    victims = small_victims(2, rows=2, model=network)
    images, labels, _ = seen(attack(iterations=200, restarts=2).run(victims.view, seed=1))
    for target in range(2):
        assert set(labels[target].tolist()) == set(victims.labels[target].tolist())
        found = images[target, labels[target].argsort()].flatten(1)
        private = victims.images[target, victims.labels[target].argsort()].flatten(1)
        for pair in zip(found, private, strict=True):
            assert torch.corrcoef(torch.stack(pair))[0, 1] > 0.95


@pytest.mark.parametrize("attack", BOTH)
def test_more_samples_than_a_search_can_hold_are_refused(attack: type[GradientMatching]) -> None:
    view = small_victims(1, rows=5).view
    with pytest.raises(UnfitViewError, match=r"5 samples .* most_rows = 4.*720 pixels.*batch_size"):
        attack(most_rows=4).run(view, seed=1)
    seen(attack(most_rows=5, iterations=1, restarts=1).run(view, seed=1))
    with pytest.raises(UnfitViewError, match="450 samples"):
        attack().run(replace(view, rows=450), seed=1)


@pytest.mark.parametrize("attack", BOTH)
def test_true_labels_are_declared_where_they_are_used(attack: type[GradientMatching]) -> None:
    assert attack().threat.needs == {Knowledge.ARCHITECTURE, Knowledge.BATCH_PLAN}
    assert attack(labels="analytic").threat.needs == attack().threat.needs
    assert Knowledge.LABELS in attack(labels="given").threat.needs
    assert attack().threat.seat is Seat.SERVER


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "known"}, "unknown labels 'known'"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"restarts": 0}, "restarts is 0"),
        ({"most_rows": 0}, "most_rows is 0"),
    ],
)
def test_illegal_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepLeakageFromModelPlus(**settings)  # type: ignore[arg-type]
