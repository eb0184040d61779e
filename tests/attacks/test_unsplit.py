"""UnSplit against a slow literal reading of the paper, and what it must not do."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

from attacks.unsplit import UnSplit
from benchmarks.unsplit_targets import literal, variation
from leakbed.contracts import (
    Attack,
    MissingKnowledgeError,
    Seat,
    UnfitViewError,
    View,
)
from leakbed.models import Architecture
from leakbed.seeds import generator
from tests.support.unsplit_reading import (
    DIGIT,
    SEED,
    architecture,
    first_clone,
    images,
    small_view,
    view_of,
)


# Not below mnistnet's second pool: on the published start, a constant image, every window ties, and
# there rounding decides which pixel gets the gradient.
@pytest.mark.parametrize(
    ("name", "cut"),
    [
        *(("mnistnet", cut) for cut in (0, 1, 2, 4)),
        ("cifarnet", 3),
        ("lenet-sigmoid", 5),
        ("mlp2", 1),
        ("tests.support.unsplit_reading:used_twice", 3),
    ],
)
def test_first_iterations_equal_the_literal_reading(name: str, cut: int) -> None:
    layers = architecture(cut, name)
    view = view_of(layers.bottom(1000), images(3, layers.image_shape), layers, torch.float64)
    assert view.smashed is not None
    attack = UnSplit(outer_steps=2, input_steps=3, model_steps=2, tv=0.3, l2=0.7)
    guess = attack.run(view, seed=SEED)
    for target, row in enumerate(view.smashed):
        clone = first_clone(layers, target).double()
        image = literal(clone, row[None], layers, attack=attack)
        torch.testing.assert_close(guess.images[target], image, rtol=0, atol=1e-6)
        for weight_name, weight in clone.named_parameters():
            stolen = guess.clones[weight_name][target]
            torch.testing.assert_close(stolen, weight.detach(), rtol=0, atol=1e-6)


def test_warm_clone_is_the_published_loop() -> None:
    view, layers = small_view(targets=3, dtype=torch.float64), architecture(1)
    attack = UnSplit(outer_steps=2, input_steps=3, model_steps=2, clone="warm")
    guess = attack.run(view, seed=SEED)
    clone = first_clone(layers, 0).double()
    for target, row in enumerate(view.smashed):
        image = literal(clone, row[None], layers, attack=attack)
        torch.testing.assert_close(guess.images[target], image, rtol=0, atol=1e-6)
        for name, weight in clone.named_parameters():
            torch.testing.assert_close(
                guess.clones[name][target], weight.detach(), rtol=0, atol=1e-6
            )


def test_shared_clone_steps_on_the_mean_over_targets() -> None:
    view, layers = small_view(targets=3, dtype=torch.float64), architecture(1)
    attack = UnSplit(outer_steps=1, input_steps=1, model_steps=1, model_rate=0.01, clone="shared")
    guess = attack.run(view, seed=SEED)
    clone = first_clone(layers, 0).double()
    nn.functional.mse_loss(clone(guess.images[:, 0]), view.smashed).backward()
    torch.optim.Adam(clone.parameters(), lr=0.01, amsgrad=True).step()
    for name, weight in clone.named_parameters():
        for target in range(3):
            torch.testing.assert_close(
                guess.clones[name][target], weight.detach(), rtol=0, atol=1e-6
            )


def test_final_quality_is_the_literal_readings() -> None:
    view, layers = small_view(cut=2, targets=4), architecture(2)
    attack = UnSplit(outer_steps=12, input_steps=5, model_steps=5, input_rate=0.01, model_rate=0.01)
    guess = attack.run(view, seed=SEED)
    for target, row in enumerate(view.smashed):
        clone = first_clone(layers, target)
        image = literal(clone, row[None], layers, attack=attack)
        loss = nn.functional.mse_loss(clone(image), row[None])
        loss = loss + attack.tv * variation(image) + attack.l2 * image.square().mean()
        assert guess.objective[target].item() == pytest.approx(loss.item(), rel=0.02)


def test_objective_is_the_formula_at_the_result() -> None:
    view, layers = small_view(cut=2), architecture(2)
    attack = UnSplit(outer_steps=1, input_steps=2, model_steps=2, tv=0.3, l2=0.7)
    guess = attack.run(view, seed=SEED)
    bottom = layers.bottom(0)
    for target, row in enumerate(view.smashed):
        clone = {name: each[target] for name, each in guess.clones.items()}
        image = guess.images[target]
        loss = nn.functional.mse_loss(functional_call(bottom, clone, (image,)), row[None])
        loss = loss + 0.3 * variation(image) + 0.7 * image.square().mean()
        torch.testing.assert_close(guess.objective[target], loss.detach())


QUICK = UnSplit(outer_steps=2, input_steps=2, model_steps=2)


def test_same_seed_same_bits_and_the_view_stays_as_it_was() -> None:
    view = small_view()
    before = view.smashed.clone()
    first, again, other = (QUICK.run(view, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(view.smashed, before)
    assert isinstance(QUICK, Attack)
    assert first.images.shape == (3, 1, *DIGIT)
    assert first.images.dtype == torch.float32


@pytest.mark.parametrize("clone", ["fresh", "warm", "shared"])
@pytest.mark.parametrize(("outer_steps", "rate"), [(1, 0.01), (12, 0.01), (12, 1e-9)])
def test_a_fit_that_still_falls_at_its_end_stopped_on_the_budget(
    clone: str, outer_steps: int, rate: float
) -> None:
    attack = UnSplit(
        outer_steps=outer_steps,
        input_steps=3,
        model_steps=3,
        input_rate=rate,
        model_rate=rate,
        clone=clone,
        restarts=2,
    )
    view = small_view(targets=3)
    view.smashed[2, 0, 3, 3] = torch.nan
    falls = rate > 1e-3  # else nothing moves, and more steps would not either
    assert attack.run(view, seed=SEED).stopped_on_budget.tolist() == [falls, falls, False]


def test_clones_are_drawn_apart_from_each_other_and_from_any_plain_seed() -> None:
    still = UnSplit(outer_steps=1, input_steps=1, model_steps=1, model_rate=0.0)
    weights = still.run(small_view(), seed=SEED).clones["0.weight"]
    assert not torch.equal(weights[0], weights[1])
    plain = architecture(1).bottom(SEED)[0].weight
    assert not any(torch.equal(plain, each) for each in weights)


def test_a_target_that_is_not_finite_stands_still_and_disturbs_no_other() -> None:
    view = small_view(targets=4)
    sound = QUICK.run(view, seed=SEED)
    view.smashed[2, 0, 3, 3] = torch.nan
    broken = QUICK.run(view, seed=SEED)
    others = [0, 1, 3]
    assert broken.failed.tolist() == [False, False, True, False]
    assert torch.equal(broken.images[others], sound.images[others])
    for name, each in broken.clones.items():
        assert torch.equal(each[others], sound.clones[name][others])
    assert (broken.images[2] == 0.5).all()
    assert broken.objective[2].isinf()


def test_a_shared_clone_ignores_a_target_that_is_not_finite() -> None:
    view = small_view(targets=4)
    view.smashed[2, 0, 3, 3] = torch.nan
    shared = UnSplit(outer_steps=2, input_steps=2, model_steps=9, model_rate=0.05, clone="shared")
    guess = shared.run(view, seed=SEED)
    assert guess.failed.tolist() == [False, False, True, False]
    others = [0, 1, 3]
    without = shared.run(replace(view, targets=3, smashed=view.smashed[others]), seed=SEED)
    for name, each in without.clones.items():
        torch.testing.assert_close(guess.clones[name][0], each[0], rtol=0, atol=1e-4)


def test_a_target_that_overflows_keeps_its_last_finite_state() -> None:
    view = small_view(targets=2)
    view.smashed[0] = 3e38
    guess = UnSplit(outer_steps=3, input_steps=2, model_steps=2).run(view, seed=SEED)
    assert guess.failed.tolist() == [True, False]
    assert guess.images.isfinite().all()
    assert all(each.isfinite().all() for each in guess.clones.values())


def test_restarts_keep_the_lowest_objective() -> None:
    view = small_view(targets=4)
    once = QUICK.run(view, seed=SEED).objective
    thrice = UnSplit(outer_steps=2, input_steps=2, model_steps=2, restarts=3).run(view, seed=SEED)
    assert (thrice.objective <= once).all()
    assert (thrice.objective < once).any()


def test_a_bottom_with_batch_norm_is_attacked_from_rows_of_a_training_batch() -> None:
    network = "tests.support.train_mode_networks:normalised"
    layers = Architecture(name=network, image_shape=(1, 12, 12), num_classes=4, cut=2)
    private = torch.rand(5, 1, 12, 12, generator=generator(3))
    view = view_of(layers.bottom(1000).train(), private, layers)
    short, long = replace(QUICK, model_rate=0.02), replace(QUICK, model_rate=0.02, outer_steps=20)
    first, again, later = short.run(view, seed=1), short.run(view, seed=1), long.run(view, seed=1)
    assert torch.equal(first.images, again.images)
    assert not first.failed.any()
    for name, each in first.clones.items():
        assert torch.equal(each, again.clones[name])
    assert not torch.equal(later.clones["1.weight"], torch.ones(5, 8))
    assert (later.objective < first.objective).all()
    alone = short.run(replace(view, targets=1, smashed=view.smashed[:1]), seed=1)
    torch.testing.assert_close(alone.images[0], first.images[0], rtol=0, atol=1e-5)


def weightless() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def test_what_is_missing_or_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = View(seat=Seat.SERVER, image_shape=DIGIT, num_classes=10, targets=3)
    with pytest.raises(MissingKnowledgeError, match="lacks smashed"):
        QUICK.run(bare, seed=0)
    view = small_view(cut=2)
    wrong = replace(view, architecture=architecture(1))
    with pytest.raises(UnfitViewError, match=r"\(8, 12, 12\).*\(8, 24, 24\)"):
        QUICK.run(wrong, seed=0)
    flat = Architecture(name="tests_unsplit_flat:network", image_shape=DIGIT, num_classes=10, cut=0)
    monkeypatch.setitem(sys.modules, "tests_unsplit_flat", SimpleNamespace(network=weightless))
    with pytest.raises(UnfitViewError, match="no weights to steal"):
        QUICK.run(replace(view, architecture=flat), seed=0)
    with pytest.raises(ValueError, match="did you mean 'fresh'"):
        UnSplit(clone="fersh")
    with pytest.raises(ValueError, match="outer_steps is 0"):
        UnSplit(outer_steps=0)


def test_one_activation_object_is_attacked_like_three() -> None:
    """Equal weights and equal smashed data, so equal guesses, bit for bit."""
    guesses = []
    for name in ("one_activation", "three_activations"):
        layers = Architecture(
            name=f"tests.support.strange_networks:{name}",
            image_shape=(1, 6, 6),
            num_classes=3,
            cut=3,
        )
        private = torch.rand(2, 1, 6, 6, generator=generator(3))
        view = view_of(layers.bottom(1000), private, layers)
        guesses.append(UnSplit(outer_steps=3, input_steps=4, model_steps=4).run(view, seed=SEED))
    assert torch.equal(guesses[0].images, guesses[1].images)
    for name, clone in guesses[0].clones.items():
        assert torch.equal(clone, guesses[1].clones[name])


@pytest.mark.parametrize("name", ["tied", "repeated"])
def test_tied_weights_are_one_weight_to_the_literal_reading_too(name: str) -> None:
    layers = Architecture(
        name=f"tests.support.strange_networks:{name}", image_shape=(1, 6, 6), num_classes=3, cut=6
    )
    private = torch.rand(2, 1, 6, 6, generator=generator(3))
    view = view_of(layers.bottom(1000), private, layers, torch.float64)
    assert view.smashed is not None
    attack = UnSplit(outer_steps=2, input_steps=3, model_steps=2)
    guess = attack.run(view, seed=SEED)
    for target, row in enumerate(view.smashed):
        clone = first_clone(layers, target).double()
        image = literal(clone, row[None], layers, attack=attack)
        torch.testing.assert_close(guess.images[target], image, rtol=0, atol=1e-6)
        for weight_name, weight in clone.named_parameters():
            stolen = guess.clones[weight_name][target]
            torch.testing.assert_close(stolen, weight.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clone", ["fresh", "warm", "shared"])
def test_smaller_stacks_find_the_same(clone: str) -> None:
    view = small_view()
    whole, parts = (replace(QUICK, clone=clone, stack=n).run(view, seed=1) for n in (64, 2))
    assert whole.images.shape == parts.images.shape
    assert whole.clones.keys() == parts.clones.keys()
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.objective, parts.objective, rtol=0, atol=1e-6)
    assert torch.equal(whole.stopped_on_budget, parts.stopped_on_budget)
    for name, stolen in whole.clones.items():
        torch.testing.assert_close(stolen, parts.clones[name], rtol=0, atol=1e-6)


def test_a_stack_fits_no_more_targets_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, fit = [], UnSplit._fit

    def watched(self: UnSplit, run: Any, start: Any, smashed: torch.Tensor, shape: Any) -> Any:
        sizes.append(len(smashed))
        return fit(self, run, start, smashed, shape)

    monkeypatch.setattr(UnSplit, "_fit", watched)
    replace(QUICK, stack=2).run(small_view(), seed=1)
    assert sizes == [2, 1]
    with pytest.raises(ValueError, match="stack is 0; it must be at least 1"):
        replace(QUICK, stack=0)
