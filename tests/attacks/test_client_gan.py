"""The malicious client: whose turn it is, what it shows, what it learns, what it refuses."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.client_gan import ClientGan
from leakbed.contracts.attack import CraftedBatch, NodeView, UnfitNodeError

VIEW = NodeView(image_shape=(1, 8, 8), num_classes=3, outputs=4, device=torch.device("cpu"))


def small(**settings: Any) -> ClientGan:
    return ClientGan(**{"width": 8, "latent": 4, "generator_rate": 0.01} | settings)


def turns(intruder: ClientGan, count: int) -> list[CraftedBatch]:
    state = intruder.begin(VIEW, seed=1)
    found = []
    for _ in range(count):
        found.append(intruder.turn(VIEW, state, rows=6))
        state = intruder.learn(state, found[-1], None)
    return found


def test_published_settings_are_the_defaults() -> None:
    assert ClientGan() == ClientGan(
        latent=100,
        width=256,
        generator_rate=1e-4,
        epsilon=1e-5,
        generator_turns=1,
        poisoning_turns=1,
        honest_turns=0,
    )


def test_generator_and_poison_alternate_as_published() -> None:
    found = turns(small(), 4)
    assert [turn.trains for turn in found] == [False, True, False, True]
    assert [turn.scale for turn in found] == [1e-5, 1.0, 1e-5, 1.0]
    assert [turn.labels.tolist()[0] for turn in found if turn.labels is not None] == [1, 3, 1, 3]
    assert [turn.images.requires_grad for turn in found if turn.images is not None] == [
        True,
        False,
        True,
        False,
    ]


def test_turns_come_in_the_numbers_asked_for() -> None:
    intruder = small(generator_turns=2, poisoning_turns=1, honest_turns=2)
    kinds = [(turn.images is not None, turn.trains) for turn in turns(intruder, 6)]
    generator, poison, honest = (True, False), (True, True), (False, True)
    assert kinds == [generator, generator, poison, honest, honest, generator]


def test_every_turn_has_noise_of_its_own() -> None:
    images = [turn.images for turn in turns(small(), 4) if turn.images is not None]
    assert len(images) > 1
    assert not any(torch.equal(images[0], other) for other in images[1:])


def test_the_step_is_adams_on_the_gradient_given() -> None:
    intruder = small()
    state = intruder.begin(VIEW, seed=1)
    names = [name for name in state.tensors if name.startswith("generator.")]
    weights = [state.tensors[name].clone().requires_grad_() for name in names]
    adam = torch.optim.Adam(weights, lr=0.01, betas=(0.9, 0.999), eps=1e-7)  # Keras's
    for step in range(5):
        turn = intruder.turn(VIEW, state, rows=6)
        gradient = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        gradient *= 1e-6  # so small that Adam's epsilon shows
        if turn.sources and turn.images is not None:
            ours = [turn.sources[name.removeprefix("generator.")] for name in names]
            found = torch.autograd.grad(turn.images, ours, gradient, retain_graph=True)
            for weight, value in zip(weights, found, strict=True):
                weight.grad = value
            adam.step()
        state = intruder.learn(state, turn, gradient)
        for name, weight in zip(names, weights, strict=True):
            assert torch.equal(state.tensors[name], weight.detach())
    assert float(state.tensors["adam.step"]) == 3


def test_only_a_generator_turn_changes_the_generator() -> None:
    intruder = small(honest_turns=1)
    state = intruder.begin(VIEW, seed=1)
    changed = []
    for _ in range(3):
        turn = intruder.turn(VIEW, state, rows=6)
        after = intruder.learn(state, turn, torch.ones(6, 1, 8, 8))
        changed.append(not same(state.tensors, after.tensors))
        state = after
    assert changed == [True, False, False]


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def test_against_a_fixed_judge_of_brightness_the_generator_finds_what_it_calls_the_target() -> None:
    """A network whose target is whatever is bright above and dark below."""
    mask = torch.ones(1, 8, 8)
    mask[:, 4:] = -1

    class Judge(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            score = (images * mask).flatten(1).sum(1)
            return torch.stack([-score, score, torch.zeros_like(score)], 1)

    judge, intruder = Judge(), small(generator_rate=0.02, poisoning_turns=0)
    state = intruder.begin(VIEW, seed=1)

    def contrast() -> float:
        return float((intruder.samples(VIEW, state, count=20) * mask).mean())

    before = contrast()
    for _ in range(40):
        turn = intruder.turn(VIEW, state, rows=16)
        assert turn.images is not None
        assert turn.labels is not None
        leaf = turn.images.detach().requires_grad_()
        loss = nn.functional.cross_entropy(judge(leaf), turn.labels)
        state = intruder.learn(state, turn, *torch.autograd.grad(loss, [leaf]))
    assert abs(before) < 0.05
    assert contrast() > 0.15


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"target_class": 3}, "target_class is 3, but the labels are 0 to 2"),
        ({"target_class": -1}, "target_class is -1"),
        ({"dummy_class": 4}, "dummy_class is 4; it must be one of the network's outputs, 0 to 3"),
        ({"dummy_class": 1}, "other than target_class = 1"),
    ],
)
def test_classes_that_are_not_there_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(UnfitNodeError, match=what):
        small(**settings).begin(VIEW, seed=0)


def test_without_a_spare_output_a_dummy_class_must_be_named() -> None:
    full = replace(VIEW, outputs=3)
    with pytest.raises(UnfitNodeError, match=r"set model\.extra_classes = 1, or dummy_class"):
        small().begin(full, seed=0)
    intruder = small(dummy_class=2)
    state = intruder.begin(full, seed=0)
    state = intruder.learn(state, intruder.turn(full, state, rows=2), torch.zeros(2, 1, 8, 8))
    labels = intruder.turn(full, state, rows=2).labels
    assert labels is not None
    assert labels.tolist() == [2, 2]


def test_images_too_small_are_refused() -> None:
    with pytest.raises(UnfitNodeError, match="a side must have 4 pixels or more"):
        small().begin(replace(VIEW, image_shape=(1, 3, 8)), seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"latent": 0},
        {"width": 3},
        {"generator_turns": 0},
        {"poisoning_turns": -1},
        {"honest_turns": -1},
        {"generator_rate": 0.0},
        {"epsilon": 0.0},
        {"epsilon": 1.5},
        {"generator_beta": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is"):
        ClientGan(**settings)
