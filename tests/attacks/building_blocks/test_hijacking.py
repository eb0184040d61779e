"""What hijackers share: settings, networks for what will be sent, and where the pilot ends."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from attacks.building_blocks.hijacking import HijackSettings, Steering
from leakbed.contracts import MissingKnowledgeError, Seat, UnfitViewError, View
from leakbed.seeds import derive

SHAPE, SMASHED, ROWS = (1, 12, 12), (6, 6, 6), 4
IMAGES = torch.rand(10, *SHAPE, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class Settings(HijackSettings):
    name: ClassVar[str] = "somebody"


def view(**changes: Any) -> View:
    known: dict[str, Any] = {
        "seat": Seat.SERVER,
        "image_shape": SHAPE,
        "num_classes": 2,
        "targets": 0,
        "rows": ROWS,
        "smashed_shape": SMASHED,
    }
    return View(**known | changes)


def steering(**own: Any) -> Steering:
    settings = Settings(nets="small", **own)
    return settings.steering(settings.plan(view()), IMAGES, seed=5)


def test_pilot_and_critic_fit_what_is_sent_and_come_from_streams_of_their_own() -> None:
    first, again = steering(), steering()
    maps = first.mapped(IMAGES)
    assert maps.shape == (10, *SMASHED)
    assert first.critic.network(maps).shape == (10, 1)
    assert torch.equal(maps, again.mapped(IMAGES))
    plan = Settings(nets="small").plan(view())
    alike = plan.pilot(derive(5, "pilot"))
    assert torch.equal(alike(IMAGES), maps)
    assert torch.equal(first.draws.batch(3), again.draws.batch(3))


def test_the_pilot_reads_pixels_as_it_is_told() -> None:
    centred, unit = steering(), steering(pixels="unit")
    images = IMAGES.mul(2).sub(1)
    assert torch.allclose(unit.mapped(images), centred.mapped(IMAGES), atol=1e-5)
    assert not torch.allclose(unit.mapped(images), centred.mapped(images), atol=1e-2)


@pytest.mark.parametrize(
    ("output", "least", "rectified"),
    [("auto", 0.0, True), ("auto", -0.1, False), ("linear", 1.0, False), ("relu", -1.0, True)],
)
def test_the_first_batch_alone_says_what_ends_the_pilot(
    output: str, least: float, rectified: bool
) -> None:
    steered = steering(output=output)
    sent = torch.full((ROWS, *SMASHED), least)
    assert torch.equal(steered.received(sent), sent)
    assert steered.rectified is rectified
    steered.received(-1 - sent)
    assert steered.rectified is rectified
    assert bool((steered.mapped(IMAGES) >= 0).all()) is rectified


def test_channels_that_a_client_leaves_silent_are_silent_in_the_pilot_until_it_uses_them() -> None:
    steered, deaf = steering(mask_dead_channels=True, output="linear"), steering(output="linear")
    untouched = deaf.mapped(IMAGES)
    assert torch.equal(steered.mapped(IMAGES), untouched)  # before the first batch
    sent = torch.zeros(ROWS, *SMASHED)
    sent[2, 1, 3, 4] = -0.5  # one number of one row is enough
    sent[:, 4:] = 1.0
    for each in (steered, deaf):
        each.received(sent)
    active_channels = [False, True, False, False, True, True]
    maps = steered.mapped(IMAGES)
    assert maps.flatten(2).any(2).any(0).tolist() == active_channels
    assert torch.equal(maps[:, active_channels], untouched[:, active_channels])
    assert torch.equal(deaf.mapped(IMAGES), untouched)
    steered.received(sent + 1)
    assert torch.equal(steered.mapped(IMAGES), untouched)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"smashed_shape": None}, MissingKnowledgeError, "somebody builds .* set smashed_shape"),
        ({"smashed_shape": (6, 5, 5)}, UnfitViewError, "somebody: .* which no pilot makes"),
    ],
)
def test_what_no_pilot_can_answer_is_refused_in_its_name(
    changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        Settings().plan(view(**changes))


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"nets": "smal"}, "did you mean 'small'"),
        ({"activations": "relu"}, "legal: linear, swish"),
        ({"padding": "same"}, "legal: auto, padded, unpadded"),
        ({"output": "tanh"}, "legal: auto, linear, relu"),
        ({"pixels": "byte"}, "legal: centred, unit"),
        ({"penalty": "batch"}, "legal: channel, sample"),
        ({"critic_rate": 0.0}, "critic_rate is 0"),
        ({"pilot_rate": -1.0}, "pilot_rate is -1"),
        ({"gradient_scale": float("nan")}, "gradient_scale is nan"),
    ],
)
def test_settings_out_of_range_are_refused(own: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Settings(**own)
