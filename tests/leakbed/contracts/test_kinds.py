"""Kinds of evidence and knowledge that come with the contracts."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leakbed.contracts import (
    BOTTOM_GRADIENTS,
    PAIRS,
    ROUND_UPDATES,
    MissingKnowledgeError,
    Seat,
    Secrets,
    Seen,
    UnfitViewError,
    View,
)
from leakbed.contracts.kinds import Queries, renewed
from leakbed.contracts.threat import Granted
from leakbed.events import BottomGradientUp, Event, Phase, Target, UpdateUp
from leakbed.models import Architecture

NETWORK = Architecture(name="mlp2", image_shape=(1, 2, 2), num_classes=2, cut=1)


def _targets(*nodes: int, row: int | None = None) -> tuple[Target, ...]:
    return tuple(Target(node=n, round=2, step=0, row=row, phase=Phase.TRAIN) for n in nodes)


def _seen(events: list[Event], *nodes: int) -> Seen:
    return Seen(seat=Seat.SERVER, events=tuple(events), targets=_targets(*nodes), about={})


def _update(node: int, round_: int) -> UpdateUp:
    before = {"w": np.full((1, 2), node, np.float32), "count": np.array([3])}
    after = {"w": before["w"] + round_, "count": before["count"]}
    return UpdateUp(node=node, round=round_, before=before, after=after)


def test_weights_of_several_rounds_are_stacked_by_target() -> None:
    events: list[Event] = [_update(node, round_) for round_ in (1, 2) for node in (0, 1)]
    found = ROUND_UPDATES.tensors(_seen(events, 1, 0))
    assert isinstance(found, dict)
    assert sorted(found) == ["after/w", "before/w"], "counters are no weights"
    assert found["after/w"].shape == (2, 2, 1, 2)
    assert found["after/w"][:, :, 0, 0].tolist() == [[2, 3], [1, 2]]
    with pytest.raises(UnfitViewError, match="node 0: 2, node 1: 1"):
        ROUND_UPDATES.tensors(_seen(events[:3], 0, 1))


def test_gradients_of_a_bottom_are_stacked_by_target_and_step() -> None:
    events: list[Event] = [
        BottomGradientUp(
            node=node, round=2, step=step, arrays={"w": np.full(3, 10.0 * node + step)}
        )
        for step in (1, 0)
        for node in (0, 1)
    ]
    found = BOTTOM_GRADIENTS.tensors(_seen(events, 1, 0))
    assert isinstance(found, dict)
    assert found["w"][:, :, 0].tolist() == [[10, 11], [0, 1]]
    with pytest.raises(UnfitViewError, match="different numbers of steps"):
        BOTTOM_GRADIENTS.tensors(_seen(events[:3], 0, 1))


def test_every_run_of_an_attack_has_all_its_queries() -> None:
    ask = Queries(lambda images, _: images.flatten(1), granted=3, stream=1)
    images = torch.rand(2, 1, 2, 2)
    assert torch.equal(ask(images), images.flatten(1))
    assert ask.left == 1
    with pytest.raises(MissingKnowledgeError, match="about 4 images, and the experiment grants 3"):
        ask(images)
    view = View(
        seat=Seat.SERVER, image_shape=(1, 2, 2), num_classes=2, targets=1, granted=Granted(ask=ask)
    )
    assert renewed(view).granted["ask"].left == 3
    assert view.granted["ask"].left == 1


@pytest.mark.parametrize("testing", [False, True])
def test_pairs_are_of_private_images_that_are_not_attacked(testing: bool) -> None:
    images = torch.arange(6.0).reshape(6, 1, 1, 1).expand(-1, 1, 2, 2) / 6
    phase = Phase.EVALUATE if testing else Phase.TRAIN
    place = Target(node=0, round=2, step=0, row=0, phase=phase)
    known: dict[str, Any] = {"test_images": images, "public_images": images, "images": images}
    labels = torch.zeros(6).long()
    secrets = Secrets(
        targets=(place, place),
        behind=torch.tensor([[1], [4]]),
        labels=labels,
        test_labels=labels,
        public_labels=labels,
        architecture=NETWORK,
        about={},
        bottom=nn.Identity,
        sends=lambda given, _: 2 * given.flatten(1),
        stream=3,
        device=torch.device("cpu"),
        **known,
    )
    found = PAIRS.grant(secrets, count=4)
    numbers = sorted((6 * found["images"][:, 0, 0, 0]).round().int().tolist())
    assert testing or numbers == [0, 2, 3, 5]
    assert torch.equal(found["smashed"], 2 * found["images"].flatten(1))
    assert torch.equal(PAIRS.grant(secrets, count=4)["images"], found["images"])
    with pytest.raises(UnfitViewError, match=f"{6 if testing else 4} private images stand"):
        PAIRS.grant(secrets, count=7)
