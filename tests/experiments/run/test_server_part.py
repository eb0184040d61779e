"""The server's part as whoever attacks may read it: a copy, frozen, of the layers it holds."""

import torch
from torch import nn

from experiments.run.server_part import Mirror, layers
from leakbed.models import Architecture
from tests.support import tiny


def u_shaped() -> Architecture:
    return Architecture(
        name="tests.support.hijackable:blocks",
        image_shape=tiny.IMAGE_SHAPE,
        num_classes=tiny.CLASSES,
        cut=2,
        upper_cut=5,
    )


def test_it_ends_in_the_logits_or_where_the_head_begins() -> None:
    vanilla = tiny.architecture()
    assert tiny.same(layers(vanilla, stream=3).state_dict(), vanilla.top(3).state_dict())
    middle = layers(u_shaped(), stream=3)
    assert tiny.same(middle.state_dict(), u_shaped().middle(3).state_dict())
    rows = torch.zeros(2, *u_shaped().smashed_shape)
    assert tuple(middle(rows).shape[1:]) == u_shaped().features_shape


def test_it_is_frozen_and_evaluates() -> None:
    part = layers(tiny.architecture())
    assert not part.training
    assert not any(each.requires_grad for each in part.parameters())


def test_a_mirror_follows_what_is_trained_and_is_not_it() -> None:
    trained: nn.Module = tiny.architecture().top(4)
    mirror = Mirror(tiny.architecture(), lambda _: trained, device=torch.device("cpu"))
    first = {name: value.clone() for name, value in mirror(0).state_dict().items()}
    assert tiny.same(first, trained.state_dict())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    assert tiny.same(mirror(0).state_dict(), trained.state_dict())
    assert not tiny.same(first, trained.state_dict())
    for parameter in mirror(0).parameters():
        parameter.zero_()
    assert not tiny.same(first, mirror(0).state_dict())
    assert tiny.same(mirror(0).state_dict(), trained.state_dict())
