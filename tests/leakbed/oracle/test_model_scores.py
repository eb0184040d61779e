"""Stolen bottoms are worth what they do under the server's own top."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from leakbed.models import Architecture
from leakbed.oracle import CloneScores, score_clones

ARCHITECTURE = Architecture(name="mlp2", image_shape=(1, 6, 6), num_classes=4, cut=1)


def clones_of(*bottoms: nn.Module) -> dict[str, torch.Tensor]:
    states = [dict(bottom.named_parameters()) for bottom in bottoms]
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


Parts = tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]


@pytest.fixture
def parts() -> Parts:
    bottom, top = ARCHITECTURE.bottom(1), ARCHITECTURE.top(1)
    images = torch.rand(300, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = top(bottom(images)).argmax(1)
    labels = torch.where(torch.arange(300) % 5 == 0, (predicted + 1) % 4, predicted)
    return bottom, top, images, labels


def scored(parts: Parts, clones: dict[str, torch.Tensor], **changes: Any) -> CloneScores:
    bottom, top, images, labels = parts
    settings: dict[str, Any] = {"architecture": ARCHITECTURE, "labels": labels, "stream": 3}
    return score_clones(
        clones, victim_bottom=bottom, server_top=top, images=images, **settings | changes
    )


def test_the_victims_own_bottom_scores_as_the_victim(parts: Parts) -> None:
    bottom, top, images, labels = parts
    found = scored(parts, clones_of(bottom, ARCHITECTURE.bottom(2)))
    assert found.images == 300
    assert found.victim_accuracy == pytest.approx(0.8)
    assert found.accuracy.values[0] == pytest.approx(0.8)
    assert found.agreement.values[0] == 1
    assert found.agreement.values[1] < 0.9
    assert found.untrained_agreement < 0.9
    with torch.no_grad():
        own = top(ARCHITECTURE.bottom(3)(images)).argmax(1)
    assert found.untrained_accuracy == pytest.approx((own == labels).double().mean().item())


def test_the_first_images_are_used_and_modules_stay_as_they_were(parts: Parts) -> None:
    bottom, top, *_ = parts
    before = {name: value.clone() for name, value in bottom.state_dict().items()}
    found = scored(parts, clones_of(bottom), limit=10)
    assert found.images == 10
    assert found.victim_accuracy == pytest.approx(0.8)
    assert found.accuracy.std is None
    assert bottom.training
    assert top.training
    assert all(torch.equal(value, before[name]) for name, value in bottom.state_dict().items())


def test_a_clone_without_finite_outputs_is_never_right(parts: Parts) -> None:
    states = clones_of(parts[0])
    broken = {name: torch.full_like(value, torch.nan) for name, value in states.items()}
    found = scored(parts, broken, labels=torch.zeros(300, dtype=torch.long))
    assert found.accuracy.values[0] == 0
    assert found.agreement.values[0] == 0


def test_the_numbers_become_plain_json(parts: Parts) -> None:
    found = scored(parts, clones_of(parts[0])).as_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["agreement"]["values"] == [1]
